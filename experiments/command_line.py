"""From the command line to settings, and to one or two plain lines where something is refused.

A refusal names the flag, the value and what is allowed, and exits with status 2; what fails later
for a reason that a user can mend (`files.Failure`) exits with 1. Neither shows a traceback, which
is for bugs.
"""

import contextlib
import dataclasses
import io
import logging
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import pydantic
import tyro
from rich import text

from experiments import files, presets

Command = TypeVar("Command")

Unprefixed = tyro.conf.arg(name="")
"""Annotates a class of settings whose flags begin with nothing."""


def run(command: type[Command], main: Callable[[Command], None], prog: str) -> None:
    """Runs `main` with the settings that the command line gives."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs what it raises too
    try:
        main(read(command, prog))
    except files.Failure as failure:
        _exit(1, f"error: {failure}")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.stdout.flush()
        # XLA that was interrupted while it compiled may crash in an ordinary exit.
        os._exit(128 + signal.SIGINT)


def _exit(status: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(status) from None


def read(command: type[Command], prog: str, args: Sequence[str] | None = None) -> Command:
    """The settings that `args` give, by default the command line; exits if they are refused."""
    args = presets.expanded(sys.argv[1:] if args is None else args)
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(command, prog=prog, args=args)
    except (SystemExit, pydantic.ValidationError) as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        invalid = _invalid(error)
        refusal = _in_flags(command, invalid) if invalid else _first_paragraph(shown.getvalue())
    _exit(2, f"error: {refusal}\nAll settings: {prog} --help")


def _invalid(error: BaseException | None) -> pydantic.ValidationError | None:
    """The check of a settings class that led to an error, if one did."""
    if error is None or isinstance(error, pydantic.ValidationError):
        return error
    return _invalid(error.__context__)


def _in_flags(command: type, invalid: pydantic.ValidationError) -> str:
    """What was refused first, each `name=value` of a setting shown as its flag."""
    error = invalid.errors()[0]
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, pydantic.ValidationError):
        return _in_flags(command, cause)
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
    else:
        allowed = re.sub(r"^\w+ should", "must", error["msg"])
        message = f"{error['loc'][0]}={error['input']} {allowed}"
    prefix = dict(_prefixes(command)).get(invalid.title, "")
    return re.sub(
        r"(?<!\S)([a-z_.]+)=", lambda name: f"--{prefix}{name[1]} ".replace("_", "-"), message
    )


def _prefixes(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The name of each class of settings, and what the flags of its fields begin with."""
    yield settings.__name__, prefix
    for field in dataclasses.fields(settings):
        kind, *annotations = typing.get_args(field.type) or [field.type]
        if dataclasses.is_dataclass(kind):
            name = "" if Unprefixed in annotations else f"{field.name}."
            yield from _prefixes(kind, f"{prefix}{name}")


def _first_paragraph(box: str) -> str:
    """What tyro's boxed message says first, below its title."""
    _, _, body = text.Text.from_ansi(box).plain.partition("\n")
    paragraphs = re.split(r"^\W*$", body.replace("│", " "), flags=re.MULTILINE)
    return next(" ".join(words) for words in map(str.split, paragraphs) if words)
