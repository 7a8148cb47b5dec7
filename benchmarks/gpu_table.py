"""The table of `benchmarks/gpu.sh`: every method's time and memory, or why there is none.

A ratio of seconds is to plain policy gradient: the library's methods' to the fastest of its plain
forms, in the same round where they ran together, PyTorch's to its eager plain step. Beside it
stands the ratio to the fastest plain step of both.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]

_HEADERS = (
    "method",
    "seconds",
    "x plain",
    "quartiles",
    "x fastest plain",
    "trace + compile s",
    "compiler's peak GiB",
    "allocator's peak GiB",
    "failed",
)
_EXPLAINED = """seconds: of an optimizer step's gradient, median of rounds; (alone): of one run
x plain: to the fastest plain form of the library, PyTorch's to its eager plain step
x fastest plain: to the fastest plain step of both
trace + compile: with no program known; of torch.compile, its first run less a later one
compiler's peak: temporary memory, arguments and results by XLA's analysis
allocator's peak: of the device's memory in use; <=: something else in that process reached it
"""


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "method" in row:
            found.setdefault(row["method"], []).append(row)
    return found


def _is_alone(row: Row) -> bool:
    return row["part"].startswith("jax ")


def _timed(rows: Sequence[Row]) -> Row | None:
    """The row that counts: that of rounds, else that of a run alone."""
    ran = [row for row in rows if row["seconds"] and not row["error"]]
    return min(ran, key=_is_alone, default=None)


def _median(row: Row) -> float:
    return statistics.median(row["seconds"])


def _plain_for(row: Row, every: Mapping[str, Sequence[Row]]) -> Row | None:
    """What a row's ratio is to: in the same part, or alone too."""
    is_torch = row["method"].startswith("torch")
    beside = [
        other
        for name, rows in every.items()
        if (name == "torch_plain" if is_torch else name.startswith("plain"))
        for other in rows
        if other["seconds"] and not other["error"]
        if other["part"] == row["part"] or (_is_alone(other) and _is_alone(row))
    ]
    return min(beside, key=_median, default=None)


def _times(row: Row, plain: Row | None, fastest_seconds: float) -> list[str]:
    alone = " (alone)" * _is_alone(row)
    cells = [f"{_median(row):.4f}{alone}", "", "", f"{_median(row) / fastest_seconds:.3f}"]
    if plain is not None:
        ratios = [s / p for s, p in zip(row["seconds"], plain["seconds"], strict=True)]
        cells[1] = f"{statistics.median(ratios):.3f}"
        if len(ratios) > 1:
            lower, _, upper = statistics.quantiles(ratios, n=4, method="inclusive")
            cells[2] = f"[{lower:.3f}, {upper:.3f}]"
    return cells


def _allocator_peak(rows: Sequence[Row]) -> str:
    """The least of the bounds that the method's processes give."""
    bounds = []
    for memory in (row["memory"] for row in rows):
        if "device_peak" in memory:
            reached_before = memory.get("device_peak_before") == memory["device_peak"]
            bounds.append((memory["device_peak"], reached_before))
    if not bounds:
        return ""
    peak, reached_before = min(bounds)
    return f"{'<= ' if reached_before else ''}{peak / 2**30:.2f}"


def _compiler_peak(rows: Sequence[Row]) -> str:
    for memory in (row["memory"] for row in rows):
        if "temp" in memory:
            parts = sum(memory[kind] for kind in ("temp", "argument", "output"))
            return f"{(parts - memory.get('alias', 0)) / 2**30:.2f}"
    return ""


def _compilation(rows: Sequence[Row], timed: Row | None) -> str:
    first = rows[0]
    if first.get("compile_seconds") is not None:
        return f"{first['trace_seconds']:.1f} + {first['compile_seconds']:.1f}"
    if timed is not None and first["method"] == "torch_plain_compiled":
        return f"{timed['first_seconds'] - _median(timed):.1f}"
    return ""


def _why(method: str, rows: Sequence[Row], outcomes: Sequence[Row]) -> str:
    said = [row["error"] for row in rows if row["error"]]
    if not rows:
        ended = [outcome for outcome in outcomes if outcome["part"] == f"jax {method}"]
        said += [f"{outcome['status']}: {outcome['said']}" for outcome in ended]
    return "; ".join(dict.fromkeys(said)).replace("|", "/")[:200]


def brief(row: Row) -> str:
    """A row in a line, for when its part ends."""
    if "method" not in row:
        return ", ".join(f"{key} {value}" for key, value in row.items() if key != "part")
    seconds = f"{_median(row):.4f} s, {len(row['seconds'])} runs" if row["seconds"] else "no time"
    return f"{row['method']}: {row['error'] or seconds}"


def table(rows: Sequence[Row], outcomes: Sequence[Row], size: str, device: str) -> str:
    """The table in Markdown, with the machine above it and the parts that failed below.

    Args:
        rows: what the parts printed, with the "part" that did.
        outcomes: how each part ended, with "part", "status" and "said".
        size: of the decoder.
        device: "gpu", or "cpu" for a rehearsal.
    """
    every = _by_method(rows)
    for outcome in outcomes:
        if outcome["part"].startswith("jax "):
            every.setdefault(outcome["part"].removeprefix("jax "), [])
    timed = {name: _timed(found) for name, found in every.items()}
    plain = [_median(row) for name, row in timed.items() if row and "plain" in name]
    lines = []
    for machine in (row for row in rows if "versions" in row):
        versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
        lines += [f"{machine['device']}; Python {machine['python']}, {versions}"]
    lines += [f"Size {size}" + (": a rehearsal, its numbers mean nothing" * (device == "cpu")), ""]
    lines += [f"| {' | '.join(_HEADERS)} |", f"|{'---|' * len(_HEADERS)}"]
    for name, found in every.items():
        row = timed[name]
        cells = [""] * 4
        if row:
            fastest = min(plain, default=float("nan"))
            cells = _times(row, _plain_for(row, every), fastest)
        cells += [_compilation(found, row) if found else "", _compiler_peak(found)]
        cells += [_allocator_peak(found), _why(name, found, outcomes)]
        lines.append(f"| {' | '.join([name, *cells])} |")
    lines += ["", _EXPLAINED]
    for outcome in outcomes:
        if outcome["status"] != "ok":
            lines.append(f"{outcome['part']} {outcome['status']}: {outcome['said']}")
    return "\n".join(lines) + "\n"
