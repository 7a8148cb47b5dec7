"""The factors of a leaf's scores, put together from what the taps of its uses report.

A use reports arrays (iterations of scans..., axes of its operand). A `Reading` says which of these
axes are entries (of which each belongs to a layer), tokens and features. An `Assembly` makes of the
entries of all uses the (*layers, tokens, d) arrays of a score leaf: where a layer is used several
times, the tokens follow one another, and where a use sees a part of the rows or columns, the rest
is zero.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proma_jax.capture._operations import Lookup
from proma_jax.capture.layout import Placement
from proma_jax.capture.pieces import ABSENT
from proma_jax.capture.search import Path

Array = jax.Array
_OwnAxes = tuple[list[int], list[int], list[int]]
"""Axes of an operand or result that are entries, tokens and features."""


class Reported(NamedTuple):
    """What the taps of a use give, each with the scans around it as leading axes.

    Attributes:
      data: what is multiplied, or the indices; of the scans only those around the data's source.
      result_grad: the gradient of the use's result.
    """

    data: Array
    result_grad: Array


class Reading(NamedTuple):
    """How a use's arrays are read as (entries, tokens, features).

    The axes are those of an array that has one for each scan around the use in front.

    Attributes:
      source: the variable that the data go back to.
      data: axes of the data that are entries, tokens and features.
      lengths: of the scans around the use; 1 for those whose iterations are columns.
      rows: says to which rows of the leaf the data's features belong.
    """

    source: Any
    data: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    rows: bytes


def reading(placement: Placement) -> Reading:
    """How the data of an access are read."""
    access = placement.access
    use, operation = access.use, access.use.operation
    lengths = [1 if d in placement.column_scans else n for d, n in enumerate(use.scans)]
    tokens = [d for d in range(len(lengths)) if d not in placement.entry_scans]
    if isinstance(operation, Lookup):
        num_axes = use.eqn.invars[operation.data].aval.ndim - (operation.column is not None)
        own_axes: _OwnAxes = [], list(range(num_axes)), []
    else:
        batch, token_axes, contracted = operation.input_axes
        features = _in_order(contracted, operation.kernel_axes[1], access.rows)
        own_axes = *_divided_batch(batch, token_axes, placement.entry_batch), features
    own_entries, own_tokens, own_features = own_axes
    axes = (
        (*placement.entry_scans, *_own(use, own_entries)),
        (*tokens, *_own(use, own_tokens)),
        _own(use, own_features),
    )
    return Reading(use.sources[0], axes, tuple(lengths), placement.rows.tobytes())


def result_axes(placement: Placement) -> tuple[tuple[int, ...], ...]:
    """Axes of the gradient of a use's result that are entries, tokens and features."""
    access = placement.access
    use, operation = access.use, access.use.operation
    tokens = [
        d
        for d in range(len(use.scans))
        if d not in (*placement.entry_scans, *placement.column_scans)
    ]
    if isinstance(operation, Lookup):
        kept = [axis for axis in access.columns if axis in operation.result_axes]
        features = [operation.result_axes.index(axis) for axis in kept]
        others = [i for i in range(len(operation.result_axes)) if i not in features]
        own_axes: _OwnAxes = [], others, features
    else:
        batch, token_axes, free = operation.output_axes
        features = _in_order(free, operation.kernel_axes[2], access.columns)
        own_axes = *_divided_batch(batch, token_axes, placement.entry_batch), features
    own_entries, own_tokens, own_features = own_axes
    return (
        (*placement.entry_scans, *_own(use, own_entries)),
        (*tokens, *_own(use, own_tokens)),
        (*placement.column_scans, *_own(use, own_features)),
    )


def _own(use: Any, axes: Sequence[int]) -> tuple[int, ...]:
    """An operand's axes, behind those of the scans."""
    return tuple(len(use.scans) + i for i in axes)


def _divided_batch(
    batch: Sequence[int], tokens: Sequence[int], entry_batch: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Batch axes that are entries, and tokens with the other batch axes before them."""
    others = [axis for i, axis in enumerate(batch) if i not in entry_batch]
    return [batch[i] for i in entry_batch], [*others, *tokens]


def _in_order(axes: Sequence[int], of_kernel: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Axes that stand for the kernel's first axes `of_kernel`, in the order that `wanted` has them.

    Axes of the kernel for which none stands have size 1.
    """
    stands_for = dict(zip(of_kernel, axes, strict=False))
    return [stands_for[i] for i in wanted if i in stands_for]


def _gathered(array: Array, lengths: Sequence[int], axes: Sequence[Sequence[int]]) -> Array:
    """An array as (entries, tokens, features); without the first where no axes are entries.

    It may lack the last of the scans' axes: then all their iterations have the same.
    """
    present = array.ndim + len(lengths) - sum(map(len, axes))
    if present < len(lengths):
        shape = (*array.shape[:present], *lengths[present:], *array.shape[present:])
        kept = [*range(present), *range(len(lengths), len(shape))]
        array = jax.lax.broadcast_in_dim(array, shape, kept)
    groups = axes if axes[0] else axes[1:]
    order = [i for group in groups for i in group]
    sizes = tuple(math.prod(array.shape[i] for i in group) for group in groups)
    if order != sorted(order):
        array = array.transpose(order)
    return array if array.shape == sizes else array.reshape(sizes)


def _placed(array: Array, where: np.ndarray, size: int) -> Array:
    """An array whose last axis is moved to places in one of another size, and zero elsewhere.

    What has no place (ABSENT) is left out; what share one are added.
    """
    chosen = np.flatnonzero(where != ABSENT)
    to = where[chosen]
    if np.array_equal(where, np.arange(size)):
        return array
    if chosen.size and _is_range(chosen) and _is_range(to):
        part = array[..., chosen[0] : chosen[-1] + 1]
        return jnp.pad(part, [(0, 0)] * (array.ndim - 1) + [(to[0], size - 1 - to[-1])])
    zeros = jnp.zeros_like(array, shape=(*array.shape[:-1], size))
    return zeros.at[..., to].add(array[..., chosen])


def _is_range(numbers: np.ndarray) -> bool:
    return bool(np.all(np.diff(numbers) == 1))


class _Entry(NamedTuple):
    """One entry of one block, which holds tokens of a layer."""

    block: int
    entry: int
    layer: int


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Accesses that read the same of the same data, and other columns of the same layers each."""

    reading: Reading
    placements: tuple[Placement, ...]
    num_tokens: int

    @property
    def layers(self) -> np.ndarray:
        return self.placements[0].layers

    @property
    def has_entries(self) -> bool:
        """Whether its arrays have an axis of entries in front."""
        return bool(self.reading.data[0])


class Assembly:
    """How the factors of some uses of a leaf, laid out alike, become those of a score leaf.

    Args:
      placements: where each use belongs.
      layer_shape: of the score leaf.
      matrix_shape: (d_in, d_out) of a layer.

    Attributes:
      placements: see above.
      layer_shape: see above.
      matrix_shape: see above.
      is_lookup: whether the uses are lookups in a table.
      blocks: the accesses; those that may be taken together are.
      num_tokens: of a layer.
      inputs_key: two assemblies with the same key have the same inputs.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        layer_shape: tuple[int, ...],
        matrix_shape: tuple[int, int],
    ) -> None:
        self.placements = placements
        self.layer_shape, self.matrix_shape = layer_shape, matrix_shape
        self.is_lookup = placements[0].access.use.is_lookup
        self._num_layers = math.prod(layer_shape)
        self.blocks: list[Block] = []
        for placement in placements:
            self._add(reading(placement), placement)
        self._sheets = self._arranged()
        self.num_tokens = sum(self.blocks[sheet[0].block].num_tokens for sheet in self._sheets)
        self.inputs_key = (
            tuple(block.reading for block in self.blocks),
            (*layer_shape, matrix_shape[0]),
            tuple(map(tuple, self._sheets)),
        )

    @property
    def dtype(self) -> Any:
        """Of what is multiplied."""
        use = self.placements[0].access.use
        return use.eqn.invars[use.operation.data].aval.dtype

    def _add(self, of_data: Reading, placement: Placement) -> None:
        """Adds an access to a block that it completes, or as a block of its own."""
        for i, block in enumerate(self.blocks):
            if block.reading == of_data and self._completes(placement, block):
                joined = (*block.placements, placement)
                self.blocks[i] = dataclasses.replace(block, placements=joined)
                return
        use = placement.access.use
        shape = (*use.scans, *use.eqn.outvars[0].aval.shape)
        num_tokens = math.prod(shape[i] for i in result_axes(placement)[1])
        self.blocks.append(Block(of_data, (placement,), num_tokens))

    def _completes(self, placement: Placement, block: Block) -> bool:
        """Whether an access has other columns of the same layers than a block."""
        taken = np.concatenate([p.columns for p in block.placements])
        own = placement.columns[placement.columns != ABSENT]
        is_alike = not self.is_lookup and np.array_equal(block.layers, placement.layers)
        return is_alike and not np.intersect1d(taken, own).size

    def _arranged(self) -> list[list[_Entry]]:
        """Entries in sheets: each has at most one for each layer, all with as many tokens."""
        sheets: list[dict[int, _Entry]] = []
        num_tokens: list[int] = []
        for number, block in enumerate(self.blocks):
            for entry, layer in enumerate(block.layers.tolist()):
                if layer == ABSENT:
                    continue
                fits = (
                    i
                    for i, sheet in enumerate(sheets)
                    if num_tokens[i] == block.num_tokens and layer not in sheet
                )
                place = next(fits, len(sheets))
                if place == len(sheets):
                    sheets.append({})
                    num_tokens.append(block.num_tokens)
                sheets[place][layer] = _Entry(number, entry, layer)
        return [[sheet[layer] for layer in sorted(sheet)] for sheet in sheets]

    def joined(self, of_blocks: Sequence[Array]) -> Array:
        """(*layers, tokens, ...) from arrays ((entries,) tokens, ...), one for each block."""
        if len(of_blocks) == 1 and np.array_equal(
            self.blocks[0].layers, np.arange(self._num_layers)
        ):
            (whole,) = of_blocks
            has_entries = self.blocks[0].has_entries
        else:
            with_entries = [
                array if block.has_entries else array[None]
                for block, array in zip(self.blocks, of_blocks, strict=True)
            ]
            sheets = [self._sheet(sheet, with_entries) for sheet in self._sheets]
            whole = sheets[0] if len(sheets) == 1 else jnp.concatenate(sheets, axis=1)
            has_entries = True
        shape = (*self.layer_shape, *whole.shape[has_entries:])
        return whole if whole.shape == shape else whole.reshape(shape)

    def _sheet(self, sheet: Sequence[_Entry], of_blocks: Sequence[Array]) -> Array:
        """(layers, tokens, ...), zero for layers without an entry."""
        numbers = sorted({entry.block for entry in sheet})
        chosen = {n: [entry.entry for entry in sheet if entry.block == n] for n in numbers}
        parts, place_of, start = [], np.full(self._num_layers, -1), 0
        for number, entries in chosen.items():
            array = of_blocks[number]
            is_whole = entries == list(range(array.shape[0]))
            parts.append(array if is_whole else array[np.asarray(entries)])
            layers = [entry.layer for entry in sheet if entry.block == number]
            place_of[layers] = start + np.arange(len(layers))
            start += len(layers)
        if start < self._num_layers:
            parts.append(jnp.zeros_like(parts[0][:1]))
            place_of = np.where(place_of < 0, start, place_of)
        joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        in_order = np.array_equal(place_of, np.arange(self._num_layers))
        return joined if in_order else joined[place_of]

    def data(self, reported: Mapping[Path, Reported]) -> list[Array]:
        """For each block ((entries,) tokens, d_in) what is multiplied, or the rows looked up."""
        return [self._data(block, reported) for block in self.blocks]

    def _data(self, block: Block, reported: Mapping[Path, Reported]) -> Array:
        placement = block.placements[0]
        use = placement.access.use
        if isinstance(use.operation, Lookup):
            return _looked_up(block, use.operation, reported[use.path].data)[0]
        inputs = _gathered(reported[use.path].data, block.reading.lengths, block.reading.data)
        return _placed(inputs, placement.rows, self.matrix_shape[0])

    def grads(self, reported: Mapping[Path, Reported]) -> list[Array]:
        """For each block ((entries,) tokens, d_out) the gradients of its results."""
        return [self._grads(block, reported) for block in self.blocks]

    def _grads(self, block: Block, reported: Mapping[Path, Reported]) -> Array:
        parts = []
        for placement in block.placements:
            use, scale = placement.access.use, placement.access.piece.scale
            grads = _gathered(reported[use.path].result_grad, use.scans, result_axes(placement))
            grads = grads if scale == 1 else grads * jnp.asarray(scale, grads.dtype)
            parts.append(_placed(grads, placement.columns, self.matrix_shape[1]))
        total = functools.reduce(jnp.add, parts)
        use = block.placements[0].access.use
        if isinstance(use.operation, Lookup):
            _, are_there = _looked_up(block, use.operation, reported[use.path].data)
            total = jnp.where(are_there[..., None], total, 0)
        return total


def _looked_up(block: Block, operation: Lookup, data: Array) -> tuple[Array, Array]:
    """((entries,) tokens), the leaf's rows that are looked up, and whether there are such rows."""
    chosen = data if operation.column is None else data[..., operation.column]
    indices = _gathered(chosen, block.reading.lengths, block.reading.data)[..., 0]
    rows, last = block.placements[0].rows, operation.num_embeddings - 1
    are_there = (indices >= 0) & (indices <= last)
    if operation.out_of_bounds == "clip":
        are_there = jnp.ones_like(are_there)
    indices = jnp.clip(indices, 0, last).astype(jnp.int32)
    if not np.array_equal(rows, np.arange(last + 1)):
        indices = jnp.asarray(rows, jnp.int32)[indices]
        are_there &= indices != ABSENT
        indices = jnp.maximum(indices, 0)
    return indices, are_there


def assemble(
    assemblies: Sequence[Assembly], reported: Mapping[Path, Reported]
) -> list[tuple[Array, Array, Array | None]]:
    """The factors of several leaves, of which those that read the same input share it.

    Returns:
      For each assembly inputs (*layers, tokens, d_in) or indices (*layers, tokens); output
      gradients (*layers, tokens, d_out); and, unless it is of lookups, (*layers, tokens) bool: the
      tokens with an output gradient in this leaf or in another that reads the same input.
    """
    grads = [assembly.grads(reported) for assembly in assemblies]
    of_reading: dict[Reading, list[Array]] = {}
    for assembly, of_blocks in zip(assemblies, grads, strict=True):
        for block, array in zip(assembly.blocks, of_blocks, strict=True):
            of_reading.setdefault(block.reading, []).append(array)
    shared: dict[Any, tuple[Array, Array | None]] = {}
    results = []
    for assembly, of_blocks in zip(assemblies, grads, strict=True):
        key = assembly.inputs_key
        if key not in shared:
            data = assembly.joined(assembly.data(reported))
            in_loss = None
            if not assembly.is_lookup:
                readings = [block.reading for block in assembly.blocks]
                in_loss = assembly.joined([any_nonzero(of_reading[r]) for r in readings])
            shared[key] = data, in_loss
        data, in_loss = shared[key]
        results.append((data, assembly.joined(of_blocks), in_loss))
    return results


def any_nonzero(arrays: Sequence[Array]) -> Array:
    """Whether any of several (..., d) arrays of one shape but for d has a nonzero row, (...)."""
    return functools.reduce(jnp.logical_or, [jnp.any(x != 0, axis=-1) for x in arrays])
