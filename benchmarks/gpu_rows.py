"""How the parts of `benchmarks.gpu` say what they found: a JSON object a line, on standard output.

Nothing but the standard library is needed.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def line(row: dict[str, Any]) -> str:
    """A row as strict JSON: null for a number that is not finite."""
    return json.dumps(_finite(row), allow_nan=False)


def emit(row: dict[str, Any]) -> None:
    """Prints a row at once."""
    print(line(row), flush=True)


def say(doing: str) -> None:
    """Prints what is done next, which is the last line of a part that hangs or is killed."""
    print(f"{time.strftime('%H:%M:%S')} {doing}", flush=True)


def parse(text: str) -> dict[str, Any] | None:
    """The row that a line holds, None if it holds none."""
    if not text.startswith("{"):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


def finish(rows: Sequence[dict[str, Any]]) -> NoReturn:
    """Prints the methods' rows and ends the process, with a failure if a method has an error.

    A method has one too if the "norm" of its result is not finite.
    """
    for row in rows:
        if not row["error"] and not math.isfinite(row["norm"]):
            row["error"] = "its result is not finite"
        emit(row)
    errors = "; ".join(f"{row['method']}: {row['error']}" for row in rows if row["error"])
    sys.exit(errors or 0)
