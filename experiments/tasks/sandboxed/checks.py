"""The tests' process: runs the tests, never the program, and writes the verdict.

A name that the tests use and do not define is a built-in one, a module of the standard library, or
else the program's. What the program returns arrives as plain data of Python's own types, or as a
`Remote`, which has the program do whatever is done with it; a comparison is decided here.
"""

from __future__ import annotations

import builtins
import importlib
import os
import sys

from . import process, wire

TYPE_CHECKING = False  # typing takes longer to import than the rest
if TYPE_CHECKING:
    from typing import Any, NoReturn

REPLIES, REQUESTS, VERDICT = 0, 1, 2
"""File descriptors."""
STARTED = b"+"
"""Written when both processes are ready."""
PASSED = "passed"
"""The verdict if the tests ran to their end; another one says why they did not."""
MOST_CHARACTERS = 500
"""Of a verdict."""


class Program:
    """The program, in its own process."""

    def __init__(self, requests: int, replies: int):
        self._requests = requests
        self._replies = wire.Reader(replies)
        if self._replies.read() != ["started"]:
            raise EOFError("the program's process did not start")

    def ask(self, operation: str, *arguments: Any) -> Any:
        """What the program's process returns, or raises as far as that is a built-in exception."""
        wire.send(self._requests, [operation, wire.encode(arguments, self._number_of)])
        try:
            kind, *content = self._replies.read()
            if kind == "raised":
                name, message = content
                raised = _exception(name)(str(message))
            else:
                (data,) = content
                return wire.decode(data, lambda number: Remote(self, number))
        except Exception as error:  # no test may catch it
            end(f"failed: no reply from the program: {error}")
        raise raised

    def _number_of(self, value: Any) -> int:
        if type(value) is not Remote or value._program is not self:
            raise TypeError(f"{type(value).__name__} cannot be given to the program")
        return value._number


def _exception(name: str) -> type[Exception]:
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return RuntimeError
    takes_more = issubclass(kind, UnicodeError | ExceptionGroup)
    return RuntimeError if takes_more else kind


class Remote:
    """An object of the program's. It equals nothing but itself, whatever its class says."""

    __slots__ = ("_number", "_program")

    def __init__(self, program: Program, number: int):
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        return self._program.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask("setattr", self, name, value)

    def __call__(self, *positional: Any, **keyword: Any) -> Any:
        return self._program.ask("call", self, positional, keyword)

    def __getitem__(self, key: Any) -> Any:
        return self._program.ask("item", self, key)

    def __iter__(self) -> Any:
        return self._program.ask("iter", self)

    def __next__(self) -> Any:
        return self._program.ask("next", self)

    def __len__(self) -> int:
        return self._program.ask("len", self)

    def __bool__(self) -> bool:
        return self._program.ask("bool", self)

    def __str__(self) -> str:
        return self._program.ask("str", self)

    def __repr__(self) -> str:
        return self._program.ask("repr", self)

    def __eq__(self, other: Any) -> bool:
        return type(other) is Remote and self._number == other._number

    def __hash__(self) -> int:
        return hash(self._number)


class Names(dict):
    """The tests' global names."""

    def __init__(self, program: Program, overriding: list[str]):
        super().__init__(__name__="tests")
        self._program = program
        self._overriding = overriding

    def __missing__(self, name: str) -> Any:
        if name not in self._overriding:
            if hasattr(builtins, name):
                raise KeyError(name)
            if name in sys.stdlib_module_names:
                return importlib.import_module(name)
        return self._program.ask("named", name)


def main() -> None:
    """Runs the tests."""
    given = process.begin()
    program = Program(process.move(REQUESTS), process.move(REPLIES))
    os.write(VERDICT, STARTED)
    try:
        program.ask("load")
        exec(compile(given["tests"], "tests", "exec"), Names(program, given["overriding"]))
    except BaseException as error:
        end(f"failed: {type(error).__name__}: {error}")
    end(PASSED)


def end(verdict: str) -> NoReturn:
    """Writes the verdict and ends the process."""
    os.write(VERDICT, verdict[:MOST_CHARACTERS].encode(errors="replace"))
    os._exit(0)
