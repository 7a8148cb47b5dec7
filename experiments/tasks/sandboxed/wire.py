"""How the two processes talk: lines of JSON that hold plain data and numbers of objects, no code.

Reading a line can make None, bools, numbers, texts, bytes, lists, tuples, sets, dicts, ranges and
built-in types, all of Python's own types exactly, whatever is in the line. Nothing else of the
program's crosses over: it stays where it is and goes by a number.
"""

from __future__ import annotations

import builtins
import json
import os

TYPE_CHECKING = False  # typing takes longer to import than the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

MOST_BYTES = 1 << 22
"""Of a line; a longer one is an error."""

_CONTAINERS: dict[str, Callable[[Iterable], Iterable]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}

_TYPES = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and not name.startswith("_")
}


def encode(value: object, number_of: Callable[[Any], int]) -> Any:
    """A value as JSON; subclasses of plain types become these types.

    Args:
        value: anything.
        number_of: the number of an object that is no plain data; it may refuse it.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["int", hex(value)]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__, value.hex()]
    if isinstance(value, range):
        return ["range", *map(hex, (value.start, value.stop, value.step))]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [encode(item, number_of) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(part, number_of) for part in item] for item in value.items()]]
    if isinstance(value, type) and value in _TYPES.values():
        return ["type", value.__name__]
    return ["object", number_of(value)]


def decode(data: Any, object_of: Callable[[int], Any]) -> Any:
    """The value that `encode` wrote.

    Args:
        data: JSON.
        object_of: the object with a number.

    Raises:
        ValueError: it is nothing that `encode` writes; or TypeError, if it is not hashable in a
            place where it must be.
    """
    match data:
        case None | bool() | str():
            return data
        case ["int", str(digits)]:
            return int(digits, 16)
        case ["float", str(digits)]:
            return float.fromhex(digits)
        case ["complex", str(real), str(imaginary)]:
            return complex(float.fromhex(real), float.fromhex(imaginary))
        case ["bytes", str(digits)]:
            return bytes.fromhex(digits)
        case ["bytearray", str(digits)]:
            return bytearray.fromhex(digits)
        case ["range", str(start), str(stop), str(step)]:
            return range(int(start, 16), int(stop, 16), int(step, 16))
        case ["list" | "tuple" | "set" | "frozenset" as name, [*items]]:
            return _CONTAINERS[name](decode(item, object_of) for item in items)
        case ["dict", [*items]]:
            return {decode(key, object_of): decode(value, object_of) for key, value in items}
        case ["type", str(name)] if name in _TYPES:
            return _TYPES[name]
        case ["object", int(number)]:
            return object_of(number)
    raise ValueError(f"no value: {data!r:.80}")


def send(file: int, message: Any) -> None:
    """Writes a line to a file descriptor."""
    line = json.dumps(message).encode() + b"\n"
    if len(line) > MOST_BYTES:
        raise ValueError(f"{len(line)} bytes are more than the {MOST_BYTES} that may be passed")
    while line:
        line = line[os.write(file, line) :]


class Reader:
    """Reads lines from a file descriptor."""

    def __init__(self, file: int):
        self._file = open(file, "rb", closefd=False)  # noqa: SIM115

    def read(self) -> Any:
        """The next message.

        Raises:
            EOFError: the other process has ended, or sent more than a line may hold.
        """
        line = self._file.readline(MOST_BYTES)
        if not line.endswith(b"\n"):
            raise EOFError("the other process has ended or sent too much")
        return json.loads(line)
