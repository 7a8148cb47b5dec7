"""What a compiled program does on one device, read off its text.

Everything counts as often as the loops around it run: a loop's number of iterations follows from
the one integer that its condition compares with and from what is added to its counter. All
branches of a conditional count.

collectives
    By kind, and the bytes that a device receives if the n devices of a group pass parts around a
    ring: of a gathered array all but its own n-th, as much of one that is exchanged or reduced and
    scattered, and twice that of one that is reduced. A TPU's compiler writes a collective that runs
    beside other work into each program that it runs beside: it counts where it starts.
operations
    Of the matrix products alone, 2 for each multiplication with its addition.
bytes
    What is read from the device's memory and written to it, not to a TPU's fast memory inside the
    chip. Of an array that is only sliced or updated in place, the slice counts.

Example:
    >>> text = '''
    ... %is_inside (p: (s32[], f32[8])) -> pred[] {
    ...   %p = (s32[], f32[8]{0}) parameter(0)
    ...   %i = s32[] get-tuple-element(%p), index=0
    ...   %n = s32[] constant(6)
    ...   ROOT %less = pred[] compare(%i, %n), direction=LT
    ... }
    ... %layer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
    ...   %p = (s32[], f32[8]{0}) parameter(0)
    ...   %i = s32[] get-tuple-element(%p), index=0
    ...   %x = f32[8]{0} get-tuple-element(%p), index=1
    ...   %two = s32[] constant(2)
    ...   %next = s32[] add(%i, %two)
    ...   %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3}}
    ...   ROOT %q = (s32[], f32[8]{0}) tuple(%next, %sum)
    ... }
    ... ENTRY %main (p: (s32[], f32[8])) -> (s32[], f32[8]) {
    ...   %p = (s32[], f32[8]{0}) parameter(0)
    ...   ROOT %w = (s32[], f32[8]{0}) while(%p), condition=%is_inside, body=%layer
    ... }
    ... '''
    >>> Program(text).collectives()
    {'all-reduce': Traffic(runs=3, bytes=144)}
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_BITS = {"pred": 8, "bf16": 16}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.+?) ([a-z][a-z0-9-]*)\(([^)]*)\)(.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|condition|body|\w+_computation)=%?([\w.-]+)")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+?(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLERS = ("while", "conditional", "call", "async-start", "fusion")
_MOVE_NOTHING = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("while", "conditional", "call", "partition-id", "replica-id", "opt-barrier"),
)
_SAME_ENTRIES = ("bitcast", "convert", "copy", "reshape", "transpose")


class Traffic(NamedTuple):
    """Collectives of one kind: how often they run, and the bytes that a device receives."""

    runs: int
    bytes: int


class _Instruction(NamedTuple):
    is_root: bool
    type: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """The names of what it is applied to."""
        return re.findall(r"%([\w.-]+)", self.arguments)

    @property
    def is_number(self) -> bool:
        """Whether it is an integer constant."""
        return self.opcode == "constant" and bool(re.match(r"[su]32\[\]", self.type))

    @property
    def dims(self) -> list[int]:
        """Of its result, one array."""
        return _arrays(self.type)[0].dims

    @property
    def entries(self) -> int:
        """Of its result, all arrays together."""
        return sum(math.prod(array.dims) for array in _arrays(self.type))

    @property
    def called(self) -> list[str]:
        """The computations that it runs."""
        if self.opcode not in _CALLERS:
            return []
        branches = ",".join(re.findall(r"\bbranch_computations=\{([^}]*)\}", self.attributes))
        return _CALLED.findall(self.attributes) + re.findall(r"%([\w.-]+)", branches)


class Program:
    """A compiled program, of the text of one module."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, _Instruction]] = {}
        self._runs: Counter[str] = Counter()
        self._fused: set[str] = set()
        num_devices = re.search(r"\bnum_partitions=(\d+)", text)
        self._num_devices = int(num_devices[1]) if num_devices else 1
        entry = current = ""
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                current = start[2]
                self._computations[current] = {}
                entry = current if start[1] else entry
            elif found := _INSTRUCTION.match(line):
                instruction = _Instruction(bool(found[1]), *found.groups()[2:])
                self._computations[current][found[2]] = instruction
        self._count_runs(entry, 1)

    def collectives(self) -> dict[str, Traffic]:
        """The collectives by kind."""
        found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for name, times in self._runs.items():
            computation = self._computations[name]
            is_start = any("AsyncCollectiveStart" in i.attributes for i in computation.values())
            for i in computation.values():
                kind = i.opcode.removesuffix("-start")
                if kind not in _KINDS or ("chain_id=" in i.attributes and not is_start):
                    continue
                if "all-reduce-scatter" in name:
                    kind = "reduce-scatter"
                size = sum(a.size for name in i.operands for a in _arrays(computation[name].type))
                found[kind][0] += times
                found[kind][1] += times * round(size * _received(kind, self._group_size(i)))
        return {kind: Traffic(*found[kind]) for kind in _KINDS if kind in found}

    def operations(self) -> int:
        """Of the matrix products, 2 for each multiplication with its addition."""
        return sum(
            times * 2 * _multiplications(i, *(computation[name].dims for name in i.operands))
            for computation, times in self._running()
            for i in computation.values()
            if i.opcode in ("dot", "convolution")
        )

    def bytes(self) -> int:
        """Read from the device's memory and written to it."""
        return sum(
            times * self._moved(i, computation)
            for computation, times in self._running(with_fused=False)
            for i in computation.values()
        )

    def _running(self, with_fused: bool = True) -> Iterator[tuple[dict[str, _Instruction], int]]:
        """Each computation, and how often it runs."""
        for name, times in self._runs.items():
            if with_fused or name not in self._fused:
                yield self._computations[name], times

    def _count_runs(self, name: str, times: int) -> None:
        """Adds to `_runs` how often each computation runs, if one of them runs so many times."""
        self._runs[name] += times
        for i in self._computations[name].values():
            for callee in i.called:
                if i.opcode in ("fusion", "async-start"):
                    self._fused.add(callee)
                self._count_runs(callee, times * (self._trips(i) if i.opcode == "while" else 1))

    def _trips(self, loop: _Instruction) -> int:
        """The iterations of a loop that counts from 0; 1 if its condition does not say."""
        condition, body = (
            self._computations[re.findall(rf"\b{name}=%?([\w.-]+)", loop.attributes)[0]]
            for name in ("condition", "body")
        )
        bounds = [i for i in condition.values() if i.is_number]
        counters = [i for i in condition.values() if i.opcode == "get-tuple-element"]
        if len(bounds) != 1 or len(counters) != 1:
            return 1
        [root] = [i for i in body.values() if i.is_root]
        number = int(re.findall(r"index=(\d+)", counters[0].attributes)[0])
        following = body[root.operands[number]]
        added = [body[name] for name in following.operands if body[name].is_number]
        step = int(added[0].arguments) if following.opcode == "add" and added else 1
        return -(-int(bounds[0].arguments) // step)

    def _group_size(self, i: _Instruction) -> int:
        """How many devices take part together."""
        if axes := re.search(r"replica_groups=mesh\[([^]]*)\][^{]*\{([^}]*)\}", i.attributes):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
            return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
        if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", i.attributes):
            return int(iota[1])
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", i.attributes):
            return len(_numbers(listed[1]))
        if "replica_groups=" in i.attributes.replace("replica_groups={}", ""):
            raise ValueError(f"replica_groups of an unknown form: {i.attributes}")
        return self._num_devices

    def _moved(self, i: _Instruction, computation: dict[str, _Instruction]) -> int:
        """The bytes that an instruction reads and writes."""
        if i.opcode in _MOVE_NOTHING or i.opcode.endswith(("-done", "-update")):
            return 0
        results = _arrays(i.type)
        if i.opcode.endswith("-start"):  # its result names its operands too
            return sum(array.bytes for array in results)
        operands = [computation[name].type for name in i.operands]
        callee = self._computations[i.called[0]] if i.opcode == "fusion" else _alone(i, operands)
        in_place = re.findall(r"\{(\d*)\}: \((\d+), ", i.attributes)
        unwritten = {int(result or 0) for result, _ in in_place}
        unread = {operand for _, operand in in_place}
        [(root_name, root)] = [(name, inside) for name, inside in callee.items() if inside.is_root]
        parts = root.operands if root.opcode == "tuple" else [root_name] * len(results)
        moved = [
            self._written(callee, part) / max(1, callee[part].entries) * array.bytes
            for number, (part, array) in enumerate(zip(parts, results, strict=True))
            if number not in unwritten
        ]
        for name, inside in callee.items():
            if inside.opcode == "parameter" and inside.arguments not in unread:
                size = sum(array.bytes for array in _arrays(operands[int(inside.arguments)]))
                moved.append(self._read(callee, name) / max(1, inside.entries) * size)
        return round(sum(moved))

    def _read(self, computation: dict[str, _Instruction], name: str) -> int:
        """The entries of an array that a fused computation reads."""
        entries = 0
        for user_name, user in computation.items():
            for number, operand in enumerate(user.operands):
                if operand == name:
                    entries += self._read_by(computation, user_name, number)
        return min(entries, computation[name].entries)

    def _read_by(self, computation: dict[str, _Instruction], name: str, number: int) -> int:
        """The entries of its operand of that number that an instruction reads."""
        i = computation[name]
        if i.opcode in _SAME_ENTRIES and not i.is_root:
            return self._read(computation, name)
        if i.opcode == "fusion":
            callee = self._computations[i.called[0]]
            return sum(
                self._read(callee, inside)
                for inside, parameter in callee.items()
                if parameter.opcode == "parameter" and int(parameter.arguments) == number
            )
        if number == 0 and i.opcode == "dynamic-update-slice":
            return 0
        if number == 0 and i.opcode in ("dynamic-slice", "slice", "gather"):
            return i.entries
        return computation[i.operands[number]].entries

    def _written(self, computation: dict[str, _Instruction], name: str) -> int:
        """The entries of a result that a fused computation writes."""
        i = computation[name]
        if i.opcode in _SAME_ENTRIES:
            return self._written(computation, i.operands[0])
        if i.opcode == "dynamic-update-slice":
            return computation[i.operands[1]].entries
        if i.opcode == "fusion":
            callee = self._computations[i.called[0]]
            [root] = [inside for inside, found in callee.items() if found.is_root]
            return self._written(callee, root)
        return i.entries


class _Array(NamedTuple):
    dims: list[int]
    size: int
    """Bytes, wherever it is."""
    in_memory: bool
    """Whether it is in the device's large memory."""

    @property
    def bytes(self) -> int:
        """In the device's large memory."""
        return self.size if self.in_memory else 0


def _arrays(text: str) -> list[_Array]:
    """The arrays that a type names."""
    found = []
    for kind, bits, dims, layout in _ARRAY.findall(text):
        sizes = _numbers(dims)
        size = math.prod(sizes) * _BITS.get(kind, int(bits or 0)) // 8
        found.append(_Array(sizes, size, "S(" not in layout))
    return found


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _received(kind: str, n: int) -> float:
    """The bytes that one of n devices receives for each byte that it gives."""
    match kind:
        case "all-gather":
            return n - 1
        case "all-reduce":
            return 2 * (n - 1) / n
        case "collective-permute":
            return 1
    return (n - 1) / n


def _multiplications(i: _Instruction, left: list[int], right: list[int]) -> int:
    """Of a dot or a convolution."""
    result = i.dims
    if i.opcode == "dot":
        contracted = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)[0]
        return math.prod(result) * math.prod(left[d] for d in _numbers(contracted))
    of_left, of_right, of_result = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)[0]
    count = math.prod(result[of_result.index(d)] for d in "bf") * right[of_right.index("i")]
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    options = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    sizes = _numbers(options.get("size", "").replace("x", ","))
    for d, size in enumerate(sizes):
        pad, stride, dilate, kernel_dilate = (
            int(options[name].split("x")[d].split("_")[0]) if name in options else default
            for name, default in (("pad", 0), ("stride", 1), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        outputs = np.arange(result[of_result.index(str(d))])[:, None]
        places = outputs * stride + np.arange(size) * kernel_dilate - pad
        inside = (places >= 0) & (places <= (left[of_left.index(str(d))] - 1) * dilate)
        count *= int(np.sum(inside & (places % dilate == 0)))
    return count


def _alone(i: _Instruction, operands: list[str]) -> dict[str, _Instruction]:
    """An instruction as a fused computation of its own."""
    parameters = {
        str(number): _Instruction(False, of_operand, "parameter", str(number), "")
        for number, of_operand in enumerate(operands)
    }
    arguments = ", ".join(f"%{number}" for number in parameters)
    return parameters | {"root": i._replace(is_root=True, arguments=arguments)}
