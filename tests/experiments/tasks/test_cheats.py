"""Programs that cheat, reach out or do not end: none passes, gets out or outlives its limits."""

import pathlib
import re
import time

import pytest

from experiments import files
from experiments.tasks import sandbox
from experiments.tasks.sandbox import Run, passes, passes_all, verdict

HERE = pathlib.Path(__file__).parent
TEST = "assert double(2) == 4\nassert double(7) == 14"
CATCHING = f"try:\n    double(2)\nexcept Exception:\n    pass\n{TEST}"
ITERATING = f"for item in double([2]):\n    pass\n{TEST}"


def _programs(name):
    """The programs in a file, by their titles."""
    _, *parts = re.split(r"^### (.*)\n", (HERE / "samples" / name).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


CHEATS, ENDLESS = _programs("cheats.txt"), _programs("endless.txt")


@pytest.fixture(autouse=True)
def _sandboxes():
    try:
        sandbox.check()
    except files.Failure as failure:
        pytest.skip(str(failure))


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_cheat_passes(cheat):
    runs = [Run(CHEATS[cheat], tests) for tests in (TEST, CATCHING)]
    assert passes_all(runs, timeout=1) == [False, False]


def test_no_test_can_catch_that_the_program_is_gone():
    tests = "try:\n    double(2)\nexcept Exception:\n    pass"
    assert passes("def double(x): raise ValueError", tests)
    assert not passes("import os\ndouble = lambda x: os._exit(0)", tests)


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (
            "double = int\ndef sorted(x): return 4",
            "assert sorted([double(2)]) == sorted([4])",
        ),
        (
            "double = int\nclass math:\n    isclose = lambda *a, **k: True",
            "assert math.isclose(double(1.0), 2.0)",
        ),
        (
            "class A:\n    __iter__ = lambda self: self\n    __next__ = lambda self: A()\n"
            "    __eq__ = lambda *a: True\ndouble = lambda x: A()",
            "assert all(a == b for a, b in zip(double([1]), [2]))",
        ),
        (
            "class A:\n    __iter__ = lambda self: iter([self])\n    __eq__ = lambda *a: True\n"
            "    __contains__ = lambda *a: True\ndouble = lambda x: A()",
            "assert 2 in double([1])",
        ),
        (
            "class A:\n    __abs__ = __sub__ = lambda *a: 0.0\ndouble = lambda x: A()",
            "assert abs(double(1) - 2) < 1e-6",
        ),
        (
            "def double(x): x.clear()",
            "x = [2]\ndouble(x)\nassert x == []",
        ),
    ],
)
def test_names_comparisons_and_arguments_are_the_tests_own(program, tests):
    assert not passes(program, tests)


REACHES = {
    "passwords": "open('/etc/passwd')",
    "the home folder": f"os.listdir({str(pathlib.Path.home())!r})",
    "homes": "os.listdir('/home')",
    "the project": f"os.listdir({str(HERE.parents[2])!r})",
    "processes": "os.listdir('/proc')",
    "devices": "os.listdir('/dev')",
    "packages": "os.listdir(os.path.dirname(os.__file__) + '/site-packages')[0]",
    "a file of its own": "open('/file', 'w')",
    "a temporary file": "__import__('tempfile').TemporaryFile()",
    "a file in the library": "open(os.__file__ + 'x', 'w')",
    "a socket": "__import__('socket').socket()",
    "a pair of sockets": "__import__('socket').socketpair()",
    "a process": "os.fork()",
    "a command": "__import__('subprocess').run(['/python/bin/python3', '-V'])",
    "a thread": "__import__('_thread').start_new_thread(print, ())",
    "a file in memory": "os.memfd_create('x')",
    "C": "__import__('ctypes')",
    "another user": "os.setuid(0)",
    "a priority": "os.nice(-1)",
    "more files": "__import__('resource').setrlimit(7, (4096, 4096))",
    "more memory": "__import__('resource').setrlimit(9, (1 << 40, 1 << 40))",
    "many files": "[os.dup(0) for _ in range(100)]",
    "the tests": "open('/given.json').read().index('a ' + 'secret')",
}


@pytest.mark.parametrize("reach", REACHES)
def test_nothing_is_within_reach(reach):
    program = f"import os\ndef reach():\n    return repr({REACHES[reach]})"
    assert re.match(
        "failed: (File|Permission|OS|Runtime|Value|Import|ModuleNotFound|Index)",
        verdict(program, "reach()  # a secret"),
    )


def test_environment_and_user_are_nobodys():
    program = "import os\ndef f(): return set(os.environ), os.getuid(), set(os.listdir('/'))"
    tests = (
        "names, user, root = f()\n"
        "assert names <= {'PWD', 'LD_LIBRARY_PATH', 'LC_CTYPE'}, names\n"
        "assert user == 65534\n"
        "assert root <= {'python', 'lib', 'lib64', 'sandboxed', 'given.json'}, root"
    )
    assert verdict(program, tests) == "passed"


def test_what_does_not_end_is_ended():
    runs = [Run(program, ITERATING) for program in ENDLESS.values()]
    started = time.monotonic()
    assert passes_all(runs, timeout=0.4, memory=1 << 28) == [False] * len(runs)
    assert time.monotonic() - started < 120


def test_what_the_tests_hold_is_limited_too():
    assert verdict("", "x = bytearray(1 << 40)") == "failed: MemoryError: "
    assert not passes("", "while True: pass", timeout=0.4)
