"""How the arrays that a use reports are read as (entries, tokens, features).

A use reports arrays (iterations of scans..., axes of its operand). A `Reading` says which of these
axes are entries (of which each belongs to a layer), tokens and features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proma_jax.capture._operations import Lookup
from proma_jax.capture.layout import Placement
from proma_jax.capture.pieces import ABSENT

Array = jax.Array

_OwnAxes = tuple[list[int], list[int], list[int]]
"""Axes of an operand or result that are entries, tokens and features."""


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


def gathered(array: Array, lengths: Sequence[int], axes: Sequence[Sequence[int]]) -> Array:
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


def placed(array: Array, where: np.ndarray, size: int) -> Array:
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
