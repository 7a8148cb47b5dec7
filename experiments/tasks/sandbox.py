r"""Whether generated programs pass tests, run in sandboxes that keep them from machine and verdict.

A run has two processes, each in a bubblewrap sandbox of its own: no network, none of the machine's
files but Python's standard library and the shared libraries that it needs, nothing that can be
written, an empty environment, no capabilities, no new processes or threads (`seccomp`), and limits
on CPU time, memory, open files and wall-clock time. The program's process runs the program. The
tests' process runs the tests and writes the verdict to a pipe that it alone has. Whatever the
program does to its own process, all it can choose is what its functions return, and that arrives
as plain data of Python's own types (`sandboxed.wire`). Arguments arrive at the program as copies.

Example:
    >>> program = "def double(x):\n    return 2 * x"
    >>> verdict(program, "assert double(4) == 8")
    'passed'
    >>> verdict(program, ["assert double(4) == 8", "assert double('a') == 'b'"])
    'failed: AssertionError: '
"""

import concurrent.futures
import contextlib
import functools
import json
import math
import os
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from experiments import files
from experiments.tasks import bubblewrap, seccomp
from experiments.tasks.sandboxed import checks

TIMEOUT = 5.0
"""Seconds of processor time that a program may take, by default."""
CLOCK = 3
"""How many times as many seconds it may take by the clock."""
MEMORY = 1 << 29
"""Bytes of address space that each of the two processes may have, by default."""
_START = 60.0
"""Seconds within which both processes must have begun, however busy the machine."""


class Run(NamedTuple):
    """A program and the tests that it is to pass.

    Attributes:
        program: Python source.
        tests: Python source that raises where the program is wrong. Names that it neither defines
            nor finds among Python's own or the standard library's modules are the program's.
        overriding: names that are the program's although Python has them too, such as `sum`.
    """

    program: str
    tests: str | Sequence[str]
    overriding: Sequence[str] = ()


def passes(
    program: str,
    tests: str | Sequence[str],
    *,
    overriding: Sequence[str] = (),
    timeout: float = TIMEOUT,
    memory: int = MEMORY,
) -> bool:
    """Whether a program passes tests; `verdict` says what the arguments are, and why not."""
    outcome = verdict(program, tests, overriding=overriding, timeout=timeout, memory=memory)
    return outcome == checks.PASSED


def passes_all(
    runs: Sequence[Run], *, timeout: float = TIMEOUT, memory: int = MEMORY
) -> list[bool]:
    """Whether each program passes its tests; as many run at once as there are processors."""
    check()

    def passed(run: Run) -> bool:
        return _verdict(_sandbox(), run, timeout, memory) == checks.PASSED

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(passed, runs))


def verdict(
    program: str,
    tests: str | Sequence[str],
    *,
    overriding: Sequence[str] = (),
    timeout: float = TIMEOUT,
    memory: int = MEMORY,
) -> str:
    """The word "passed", or why it did not.

    Args:
        program: see `Run`.
        tests: see `Run`; several are run one after another.
        overriding: see `Run`.
        timeout: seconds of processor time, rounded up to whole ones, that either process may take;
            the run may take `CLOCK` times as many by the clock, whatever else the machine does.
        memory: bytes of address space of each process.

    Raises:
        files.Failure: sandboxes cannot be made here, or one did not start.
    """
    check()
    return _verdict(_sandbox(), Run(program, tests, overriding), timeout, memory)


def _verdict(sandbox: Sequence[str], run: Run, timeout: float, memory: int) -> str:
    tests = run.tests if isinstance(run.tests, str) else "\n".join(run.tests)
    limits = {"seconds": math.ceil(timeout), "memory": memory}
    program = {"program": run.program, **limits}
    checked = {"tests": tests, "overriding": list(run.overriding), **limits}
    with (
        _pipe() as (requests_end, requests),
        _pipe() as (replies_end, replies),
        _pipe() as (verdict_end, verdict),
        _process(sandbox, "program", program, requests_end, replies, subprocess.DEVNULL),
        _process(sandbox, "checks", checked, replies_end, requests, verdict),
    ):
        for file in (requests_end, requests, replies_end, replies, verdict):
            file.close()
        return _read(verdict_end, CLOCK * timeout)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The reading and the writing end of a pipe."""
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as reader, open(writing, "wb", buffering=0) as writer:
        yield reader, writer


@contextlib.contextmanager
def _process(
    sandbox: Sequence[str],
    name: str,
    given: dict[str, Any],
    stdin: BinaryIO,
    stdout: BinaryIO,
    stderr: BinaryIO | int,
) -> Iterator[None]:
    """A process of `sandboxed` in a sandbox, both of which end with the context."""
    start = f"import sys; sys.path.append('/'); from sandboxed import {name}; {name}.main()"
    with _file(json.dumps(given).encode()) as given_file, _file(seccomp.program()) as filter_file:
        process = subprocess.Popen(
            [
                *sandbox,
                *("--file", str(given_file), "/given.json", "--remount-ro", "/"),
                *("--seccomp", str(filter_file), "--"),
                *(bubblewrap.PYTHON, "-I", "-S", "-c", start),
            ],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=(given_file, filter_file),
            env={},
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[int]:
    """The descriptor of a file in memory."""
    with open(os.memfd_create("given"), "wb", buffering=0) as file:
        while content:
            content = content[file.write(content) :]
        file.seek(0)
        yield file.fileno()


def _read(verdict: BinaryIO, seconds: float) -> str:
    """The verdict, which the tests' process writes after a sign that both have started."""
    if _read_until(verdict, time.monotonic() + _START, len(checks.STARTED)) != checks.STARTED:
        raise files.Failure(
            "A sandbox for generated code did not start, though others did before: the machine may "
            "be out of memory or processes. Run fewer at once."
        )
    content = _read_until(verdict, time.monotonic() + seconds, 4 * checks.MOST_CHARACTERS)
    if content is None:
        return f"failed: it took longer than {seconds} seconds"
    return content.decode(errors="replace") or "failed: the tests' process ended without a verdict"


def _read_until(pipe: BinaryIO, deadline: float, most: int) -> bytes | None:
    """What a pipe holds up to its end, or `most` bytes; None if the deadline comes first."""
    content = b""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while len(content) < most:
        if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
            return None
        more = pipe.read(most - len(content))
        if not more:
            break
        content += more
    return content


def check() -> None:
    """Makes sure that sandboxes can be made here and hold what is promised.

    Raises:
        files.Failure: they cannot; says why and what to do.
    """
    _sandbox()


_PROBE = """
import os, socket

def fork():
    if os.fork() == 0:
        os._exit(0)

def within_reach(paths):
    found = [path for path in paths if os.path.exists(path)]
    for name, attempt in {
        "a process": fork,
        "a socket": socket.socket,
        "a file": lambda: open("/file", "w"),
    }.items():
        try:
            attempt()
        except OSError:
            continue
        found.append(name)
    return found
"""


@functools.cache
def _sandbox() -> tuple[str, ...]:
    """The command of a sandbox that passed the self-test, but for what is run in it."""
    reasons = []
    for binary in bubblewrap.binaries():
        command = (binary, *bubblewrap.arguments())
        home = os.path.expanduser("~")
        forbidden = ["/etc/passwd", "/home", "/root", "/proc", "/sys", "/tmp"]
        forbidden += [home] if home != "/" else []
        tests = f"assert within_reach({forbidden}) == [], within_reach({forbidden})"
        broken = bubblewrap.what_is_wrong(command)
        if broken is None:
            outcome = _verdict(command, Run(_PROBE, tests), _START, MEMORY)
            if outcome == checks.PASSED:
                return command
            broken = f"what runs in it reaches what it must not: {outcome}"
        reasons.append(f"{binary}: {broken}")
    raise files.Failure(
        "Generated code is run in bubblewrap sandboxes alone, which cannot be made here: "
        + ("; ".join(reasons) or "there is no bwrap on the PATH")
        + ". Install bubblewrap (pip install '.[tasks]' in the clone, or the system's package), on "
        "a Linux that lets users make namespaces (sysctl kernel.unprivileged_userns_clone, "
        "kernel.apparmor_restrict_unprivileged_userns; Docker: --security-opt seccomp=unconfined)"
    )
