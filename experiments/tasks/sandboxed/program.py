"""The program's process: runs it, then does what the tests' process asks for, until that ends.

Nothing here is trusted by anyone: the program can change all of it. All that it can win is to
choose what is returned to the tests.
"""

from __future__ import annotations

import operator
import os
import sys
import types

from . import process, wire

TYPE_CHECKING = False  # typing takes longer to import than the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def main() -> None:
    """Serves the tests' process until that ends."""
    try:
        serve()
    except EOFError:
        os._exit(0)


def serve() -> None:
    """Does what the tests' process asks for, first of all runs the program."""
    given = process.begin()
    requests, replies = wire.Reader(process.move(0)), process.move(1)
    wire.send(replies, ["started"])
    objects: list[Any] = []
    numbers: dict[int, int] = {}
    module = types.ModuleType("program")
    sys.modules["program"] = module

    def number_of(value: Any) -> int:
        number = numbers.setdefault(id(value), len(objects))
        if number == len(objects):
            objects.append(value)  # which keeps its id its own
        return number

    def named(name: str) -> Any:
        if name not in vars(module):
            raise NameError(f"name {name!r} is not defined")
        return vars(module)[name]

    operations: dict[str, Callable[..., Any]] = {
        "load": lambda: exec(compile(given["program"], "program", "exec"), vars(module)),
        "named": named,
        "call": lambda function, positional, keyword: function(*positional, **keyword),
        "getattr": getattr,
        "setattr": setattr,
        "item": operator.getitem,
        "iter": iter,
        "next": next,
        "len": len,
        "bool": bool,
        "str": str,
        "repr": repr,
    }
    while True:
        operation, arguments = requests.read()
        try:
            result = operations[operation](*wire.decode(arguments, objects.__getitem__))
            reply = ["returned", wire.encode(result, number_of)]
            wire.send(replies, reply)
        except BaseException as error:
            wire.send(replies, ["raised", type(error).__name__, str(error)[:500]])
