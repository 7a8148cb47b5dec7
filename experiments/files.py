"""A run's files: read or named as damaged, written whole or not at all, by one process alone."""

import contextlib
import fcntl
import itertools
import json
import logging
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO


class Failure(Exception):
    """What a user can mend: its message, of one or two lines, says what is wrong and what to do."""


def parse(
    content: bytes, kind: type[dict] | type[list], name: str, cure: str, keys: Iterable[str] = ()
) -> Any:
    """The dict, with at least these keys, or the list in a file or a line of JSON.

    Raises:
        Failure: it holds none; says the cure.
    """

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    with contextlib.suppress(ValueError):
        parsed = json.loads(content, parse_constant=refuse)
        if isinstance(parsed, kind) and all(key in parsed for key in keys):
            return parsed
    needed = " with ".join([kind.__name__, *keys])
    raise Failure(f"{name} is damaged: it is no JSON {needed}. {cure}")


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a whole file, or, if interrupted, nothing."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def free(path: pathlib.Path) -> pathlib.Path:
    """The path or, if something is there, the first of <name>-2, <name>-3, ... that is free."""
    beside = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(there for there in itertools.chain([path], beside) if not there.exists())


@contextlib.contextmanager
def using(directory: pathlib.Path) -> Iterator[None]:
    """Makes a Failure of what the system has against reading and writing in a directory."""
    try:
        yield
    except OSError as error:
        raise Failure(
            f"{directory} cannot be used: {error}. Make it a folder that can be read and written, "
            "or choose another."
        ) from error


def check_writable(*directories: pathlib.Path) -> None:
    """Makes sure, without leaving a trace, that files can be made in directories yet to be made.

    Raises:
        Failure: one cannot be.
    """
    for directory in directories:
        with using(directory):
            here = directory.absolute()
            existing = next(path for path in (here, *here.parents) if path.exists())
            tempfile.TemporaryFile(dir=existing).close()


@contextlib.contextmanager
def alone(directory: pathlib.Path, while_waiting: Callable[[], None]) -> Iterator[None]:
    """Waits until no other process is in here; one that is killed leaves as well.

    Args:
        directory: the directory, which is there.
        while_waiting: called again and again; what it raises ends the waiting.
    """
    with (directory / "lock").open("w") as file:
        is_told = False
        while not _try_lock(file):
            while_waiting()
            if not is_told:
                logging.getLogger(__name__).warning(
                    "%s: waiting for another process that works on it", directory
                )
                is_told = True
            time.sleep(0.1)
        yield


def _try_lock(file: TextIO) -> bool:
    """Locks a file, unless another process has; says whether it did."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
