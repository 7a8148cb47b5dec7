"""What a compiled program sends between devices, read off its text.

Every collective counts as often as the loops around it run: a loop's number of iterations is the
one integer that its condition compares with. All branches of a conditional count. Of a collective
the bytes of its result on one device are counted.

Example:
    >>> text = '''
    ... %layer (p: f32[8]) -> f32[8] {
    ...   %r = f32[8]{0} all-gather(%p), dimensions={0}
    ... }
    ... %is_inside (p: f32[8]) -> pred[] {
    ...   %n = s32[] constant(3)
    ... }
    ... ENTRY %main (p: f32[8]) -> f32[8] {
    ...   ROOT %w = f32[8]{0} while(%p), condition=%is_inside, body=%layer
    ... }
    ... '''
    >>> collectives(text)
    {'all-gather': Traffic(runs=3, bytes=96)}
"""

import math
import re
from collections import Counter, defaultdict
from typing import NamedTuple

_KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_BITS = {"pred": 8, "bf16": 16}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_CALLED = re.compile(r"\b(?:calls|to_apply|condition|body)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+?(\d+)\w*)\[([\d,]*)\]")


class Traffic(NamedTuple):
    """Collectives of one kind: how often they run, and the bytes that a device receives."""

    runs: int
    bytes: int


def collectives(text: str) -> dict[str, Traffic]:
    """The collectives of a compiled program, by kind."""
    lines: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            current = start[2]
            lines[current] = []
            entry = current if start[1] else entry
        elif current:
            lines[current].append(line)
    runs: Counter[str] = Counter()
    _count_runs(lines, entry, 1, runs)
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, times in runs.items():
        for line in lines[name]:
            kind = re.search(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(", line)
            if kind:
                found[kind[2]][0] += times
                found[kind[2]][1] += times * _bytes(kind[1], is_pair=bool(kind[3]))
    return {kind: Traffic(*found[kind]) for kind in _KINDS if kind in found}


def _count_runs(lines: dict[str, list[str]], name: str, times: int, runs: Counter[str]) -> None:
    """Adds to `runs` how often each computation runs, if one of them runs so many times."""
    runs[name] += times
    for line in lines.get(name, ()):
        branches = [name for names in _BRANCHES.findall(line) for name in names.split(",")]
        called = [*_CALLED.findall(line), *(name.strip("% ") for name in branches)]
        is_loop = " while(" in line
        for callee in called:
            if callee in lines:
                _count_runs(lines, callee, times * (_trips(line, lines) if is_loop else 1), runs)


def _trips(line: str, lines: dict[str, list[str]]) -> int:
    """The iterations of a loop; 1 if its condition does not say."""
    condition = re.search(r"condition=%?([\w.-]+)", line)
    text = "\n".join(lines.get(condition[1], ())) if condition else ""
    bounds = re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", text)
    return int(bounds[0]) if len(bounds) == 1 else 1


def _bytes(shapes: str, is_pair: bool) -> int:
    """Of a result; where an operation only starts, its operands are named before its results."""
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * _BITS.get(kind, int(bits or 0)) // 8
        for kind, bits, dims in _ARRAY.findall(shapes)
    ]
    return max(sizes, default=0) if is_pair else sum(sizes)
