"""What both processes do first: read what they are given, limit themselves, and fall silent."""

from __future__ import annotations

import io
import json
import os
import resource
import sys

TYPE_CHECKING = False  # typing takes longer to import than the rest
if TYPE_CHECKING:
    from typing import Any

FILES = 16
"""Most open file descriptors."""


class _Nowhere(io.TextIOBase):
    """Takes all that is printed."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


def begin() -> dict[str, Any]:
    """What the process is given; after it, the limits hold and nothing that is printed is seen."""
    with open("/given.json", encoding="utf-8") as file:
        given = json.load(file)
    limits = {
        resource.RLIMIT_CPU: given["seconds"],
        resource.RLIMIT_AS: given["memory"],
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))
    sys.stdin = io.StringIO()
    sys.stdout = sys.stderr = _Nowhere()
    return given


def move(file: int) -> int:
    """A file descriptor's copy under another number; the descriptor itself is closed."""
    copy = os.dup(file)
    os.close(file)
    return copy
