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
from proma_jax.capture.reading import Reading, gathered, placed, reading, result_axes
from proma_jax.capture.search import Path
from proma_jax.scores.leaves import LayerFactors
from proma_jax.scores.tables import LookupFactors

Array = jax.Array


class Reported(NamedTuple):
    """What the taps of a use give, each with the scans around it as leading axes.

    Attributes:
      data: what is multiplied, or the indices; of the scans only those around the data's source.
      result_grad: the gradient of the use's result.
    """

    data: Array
    result_grad: Array


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
        inputs = gathered(reported[use.path].data, block.reading.lengths, block.reading.data)
        return placed(inputs, placement.rows, self.matrix_shape[0])

    def grads(self, reported: Mapping[Path, Reported]) -> list[Array]:
        """For each block ((entries,) tokens, d_out) the gradients of its results."""
        return [self._grads(block, reported) for block in self.blocks]

    def _grads(self, block: Block, reported: Mapping[Path, Reported]) -> Array:
        parts = []
        for placement in block.placements:
            use, scale = placement.access.use, placement.access.piece.scale
            grads = gathered(reported[use.path].result_grad, use.scans, result_axes(placement))
            grads = grads if scale == 1 else grads * jnp.asarray(scale, grads.dtype)
            parts.append(placed(grads, placement.columns, self.matrix_shape[1]))
        total = functools.reduce(jnp.add, parts)
        use = block.placements[0].access.use
        if isinstance(use.operation, Lookup):
            _, are_there = _looked_up(block, use.operation, reported[use.path].data)
            total = jnp.where(are_there[..., None], total, 0)
        return total


def _looked_up(block: Block, operation: Lookup, data: Array) -> tuple[Array, Array]:
    """((entries,) tokens), the leaf's rows that are looked up, and whether there are such rows."""
    chosen = data if operation.column is None else data[..., operation.column]
    indices = gathered(chosen, block.reading.lengths, block.reading.data)[..., 0]
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


def groups(assemblies: Sequence[Assembly]) -> list[int]:
    """Which factors share an input: for each leaf a number, the same for the same inputs."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(assembly.inputs_key, len(numbers)) for assembly in assemblies]


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
    shared: dict[int, tuple[Array, Array | None]] = {}
    results = []
    for assembly, of_blocks, group in zip(assemblies, grads, groups(assemblies), strict=True):
        if group not in shared:
            data = assembly.joined(assembly.data(reported))
            in_loss = None
            if not assembly.is_lookup:
                readings = [block.reading for block in assembly.blocks]
                in_loss = assembly.joined([any_nonzero(of_reading[r]) for r in readings])
            shared[group] = data, in_loss
        data, in_loss = shared[group]
        results.append((data, assembly.joined(of_blocks), in_loss))
    return results


def score_leaf(
    assembly: Assembly, factors: tuple[Array, Array, Array | None], group: int, **options: Any
) -> LayerFactors | LookupFactors:
    """The score leaf of some factors, as from `assemble` and `groups`, with further fields."""
    data, grads, in_loss = factors
    options["num_layer_axes"] = len(assembly.layer_shape)
    if assembly.is_lookup:
        return LookupFactors(data, grads, assembly.matrix_shape[0], **options)
    return LayerFactors(data, grads, in_loss=in_loss, input_group=group, **options)


def any_nonzero(arrays: Sequence[Array]) -> Array:
    """Whether any of several (..., d) arrays of one shape but for d has a nonzero row, (...)."""
    return functools.reduce(jnp.logical_or, [jnp.any(x != 0, axis=-1) for x in arrays])
