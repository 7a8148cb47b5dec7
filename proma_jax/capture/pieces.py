"""What a traced variable holds of a parameter, for whatever chain of slices and reshapes led to it.

A `Piece` says it entry by entry: entry (i, j, ...) of the variable is a constant times the entry
number `offset + axes[0][i] + axes[1][j] + ...` of the flattened parameter leaf. Slices,
transpositions, reshapes, concatenations and the like only rearrange these few numbers. A variable
holds a tuple of pieces: several where parameters are concatenated or added up.

Everything here is NumPy, computed while a program is traced.

Example:
  >>> stack = whole(leaf=0, shape=(3, 4, 5))                    # a parameter: 3 kernels of 4 x 5
  >>> kernel = stack.slice((1, 0, 0), (2, 4, 5)).squeeze((0,))  # stack[1]
  >>> int(kernel.offsets), kernel.axes[0].tolist(), kernel.axes[1].tolist()
  (20, [0, 5, 10, 15], [0, 1, 2, 3, 4])
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

ABSENT = -1
"""In place of a number: this entry of the variable is not of the parameter."""


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """Entries of a parameter leaf in a variable; see the top of this module.

    Attributes:
      leaf: number of the parameter leaf.
      offsets: one axis for each scan around the variable: the offset in each of its iterations. An
        axis has size 1 where all iterations have the same.
      axes: a vector for each axis of the variable. All numbers are at least 0, or ABSENT.
      scale: the constant.
      selected: vectors of axes of the leaf that are gone, because an index that is known only when
        the program runs has chosen one of their entries.
    """

    leaf: int
    offsets: np.ndarray
    axes: tuple[np.ndarray, ...]
    scale: float = 1.0
    selected: tuple[np.ndarray, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the variable."""
        return tuple(len(axis) for axis in self.axes)

    @property
    def is_nowhere(self) -> bool:
        """Whether no entry of the variable is of the parameter."""
        return any(bool(np.all(numbers == ABSENT)) for numbers in (self.offsets, *self.axes))

    def is_same(self, other: Piece) -> bool:
        """Whether two pieces say the same."""

        def said(piece: Piece) -> tuple[object, ...]:
            arrays = (piece.offsets, *piece.axes, *piece.selected)
            return piece.leaf, piece.scale, [(x.shape, x.tobytes()) for x in arrays]

        return said(self) == said(other)

    def times(self, factor: float) -> Piece:
        return dataclasses.replace(self, scale=self.scale * factor)

    def _with_axes(self, axes: Sequence[np.ndarray]) -> Piece:
        return dataclasses.replace(self, axes=tuple(axes))

    def transpose(self, permutation: Sequence[int]) -> Piece:
        return self._with_axes([self.axes[i] for i in permutation])

    def slice(
        self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int] | None = None
    ) -> Piece:
        steps = strides or (1,) * len(self.axes)
        return self._with_axes(
            [axis[a:b:c] for axis, a, b, c in zip(self.axes, starts, limits, steps, strict=True)]
        )

    def reverse(self, dimensions: Sequence[int]) -> Piece:
        return self._with_axes(
            [axis[::-1] if i in dimensions else axis for i, axis in enumerate(self.axes)]
        )

    def take(self, dimension: int, indices: np.ndarray) -> Piece:
        """The entries along one axis that indices, which are in bounds, choose."""
        axes = list(self.axes)
        axes[dimension] = axes[dimension][indices]
        return self._with_axes(axes)

    def pad(self, paddings: Sequence[tuple[int, int, int]]) -> Piece:
        """As of `jax.lax.pad`: what is added is not of the parameter."""
        axes = []
        for axis, (low, high, interior) in zip(self.axes, paddings, strict=True):
            spread = np.full(max(0, len(axis) * (interior + 1) - interior), ABSENT)
            spread[:: interior + 1] = axis
            spread = np.pad(spread, (max(0, low), max(0, high)), constant_values=ABSENT)
            axes.append(spread[max(0, -low) : len(spread) - max(0, -high)])
        return self._with_axes(axes)

    def placed(self, dimension: int, start: int, size: int) -> Piece:
        """As a part of a larger variable, from `start` on along one axis of `size` entries."""
        paddings = [(0, 0, 0)] * len(self.axes)
        paddings[dimension] = (start, size - start - len(self.axes[dimension]), 0)
        return self.pad(paddings)

    def squeeze(self, dimensions: Sequence[int]) -> Piece:
        kept = [axis for i, axis in enumerate(self.axes) if i not in dimensions]
        dropped = [self.axes[i] for i in dimensions]
        offsets = functools.reduce(_sum, [axis[0] for axis in dropped], self.offsets)
        return dataclasses.replace(self, axes=tuple(kept), offsets=offsets)

    def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> Piece:
        """As of `jax.lax.broadcast_in_dim`."""
        axes = [np.zeros(size, np.int64) for size in shape]
        for axis, i in zip(self.axes, dimensions, strict=True):
            axes[i] = np.broadcast_to(axis, shape[i])
        return self._with_axes(axes)

    def reshape(self, shape: Sequence[int]) -> Piece | None:
        """Read with other axes; None if the parameter's entries then are not a sum over axes."""
        if 0 in shape:
            return None
        ones = [i for i, size in enumerate(self.shape) if size == 1]
        squeezed = self.squeeze(ones)
        wanted = [size for size in shape if size != 1]
        blocks = _common_blocks(squeezed.shape, wanted)
        axes: list[np.ndarray] = []
        for old, new in blocks:
            merged = functools.reduce(outer_sum, [squeezed.axes[i] for i in old])
            divided = split(merged, [wanted[i] for i in new])
            if divided is None:
                return None
            axes += divided
        of_others = iter(axes)
        with_ones = [np.zeros(1, np.int64) if size == 1 else next(of_others) for size in shape]
        return squeezed._with_axes(with_ones)

    def at(self, dimension: int, starts: np.ndarray, size: int) -> Piece | None:
        """A window of `size` entries along one axis, which may begin elsewhere in each iteration.

        Args:
          dimension: the axis.
          starts: shaped like `offsets`, or broadcastable.
          size: of the window.

        Returns:
          The window; None if its iterations are not moved copies of one another.
        """
        windows = self.axes[dimension][starts[..., None] + np.arange(size)]
        divided = split(windows.ravel(), [starts.size, size])
        if divided is None:
            return None
        moved, window = divided
        axes = list(self.axes)
        axes[dimension] = window
        offsets = _without_repeats(_sum(self.offsets, moved.reshape(starts.shape)))
        return dataclasses.replace(self, axes=tuple(axes), offsets=offsets)

    def select(self, dimension: int) -> Piece:
        """One entry along an axis, which stays with size 1; which, an index says at run time."""
        axes = list(self.axes)
        selected = axes[dimension]
        axes[dimension] = np.zeros(1, np.int64)
        return dataclasses.replace(self, axes=tuple(axes), selected=(*self.selected, selected))

    def in_loop(self) -> Piece:
        """What a scan sees of a variable that it does not slice."""
        return dataclasses.replace(self, offsets=self.offsets[..., None])

    def sliced(self) -> Piece:
        """What a scan sees of a variable that it slices."""
        offsets = _without_repeats(_sum(self.offsets[..., None], self.axes[0]))
        return dataclasses.replace(self, offsets=offsets, axes=self.axes[1:])

    def stacked(self, length: int) -> Piece | None:
        """What a scan makes of a variable of its `length` iterations; None if that is no piece."""
        around = self.offsets.shape[:-1]
        flat = np.broadcast_to(self.offsets, (*around, length)).ravel()
        divided = split(flat, [math.prod(around), length])
        if divided is None:
            return None
        offsets, axis = divided
        return dataclasses.replace(self, offsets=offsets.reshape(around), axes=(axis, *self.axes))

    def after_loop(self) -> Piece | None:
        """What leaves a scan that carried it unchanged; None if iterations differ."""
        if self.offsets.shape[-1] != 1:
            return None
        return dataclasses.replace(self, offsets=self.offsets[..., 0])


def whole(leaf: int, shape: Sequence[int]) -> Piece:
    """A variable that is a parameter leaf of this shape."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    axes = tuple(
        stride * np.arange(size, dtype=np.int64)
        for stride, size in zip(strides, shape, strict=True)
    )
    return Piece(leaf, np.zeros((), np.int64), axes)


def are_same(pieces: Sequence[Piece], others: Sequence[Piece]) -> bool:
    """Whether two variables hold the same of the parameters."""
    return len(pieces) == len(others) and all(map(Piece.is_same, pieces, others))


def _sum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sums of numbers; ABSENT where either is."""
    return np.where((x == ABSENT) | (y == ABSENT), ABSENT, x + y)


def outer_sum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """All sums of a number of `x` and one of `y`, those of the first of `x` first."""
    return _sum(x[:, None], y[None]).ravel()


def _without_repeats(offsets: np.ndarray) -> np.ndarray:
    """Offsets whose last axis has size 1 if all along it are equal."""
    alike = offsets.shape[-1:] > (1,) and bool(np.all(offsets == offsets[..., :1]))
    return offsets[..., :1] if alike else offsets


def split(numbers: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray] | None:
    """Vectors of these sizes whose outer sum is `numbers`, None if there are none."""
    if numbers.size == 0:
        return None
    if len(sizes) == 1:
        return [numbers]
    grid = numbers.reshape(sizes)
    least = np.unravel_index(
        np.argmin(np.where(grid == ABSENT, np.iinfo(np.int64).max, grid)), sizes
    )
    if grid[least] == ABSENT:
        return [np.full(size, ABSENT) for size in sizes]
    vectors = []
    for i in range(len(sizes)):
        line = grid[tuple(slice(None) if i == axis else at for axis, at in enumerate(least))]
        vectors.append(np.where(line == ABSENT, ABSENT, line - (grid[least] if i else 0)))
    return vectors if np.array_equal(functools.reduce(outer_sum, vectors), numbers) else None


def _common_blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of neighbouring axes that a reshape turns into one another."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old):
        olds, news = [i], [j]
        while (a := math.prod(old[k] for k in olds)) != (b := math.prod(new[k] for k in news)):
            if a < b:
                olds.append(olds[-1] + 1)
            else:
                news.append(news[-1] + 1)
        blocks.append((olds, news))
        i, j = olds[-1] + 1, news[-1] + 1
    return blocks
