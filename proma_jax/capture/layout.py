"""How the scores of a parameter leaf are laid out, from all that a program reads of it.

The axes of a leaf play one of three parts: rows, along which products contract (or indices choose);
columns; and layers, of which every product sees one at a time, be it as a slice of a stack, in an
iteration of a scan, or as a batch of an einsum. Scores then are (layers, d_in, d_out). A product
that sees some of the rows or columns only has zeros for the others.

`arrange` finds these parts, and says where each use belongs. An axis that plays two parts, as of a
stack that is kept flat, is divided if that helps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from proma_jax.capture.access import Access, Digit
from proma_jax.capture.pieces import ABSENT, Piece, outer_sum, split
from proma_jax.scores.leaf import View


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a leaf is read as (*layers, rows, columns).

    Attributes:
      layers: its layer axes.
      rows: axes that together are the rows.
      columns: axes that together are the columns.
      digits: all axes, in the order in which the leaf has them.
    """

    layers: tuple[Digit, ...]
    rows: tuple[Digit, ...]
    columns: tuple[Digit, ...]
    digits: tuple[Digit, ...]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return tuple(digit.size for digit in self.layers)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(d_in, d_out) of one layer."""
        d_in, d_out = (math.prod(d.size for d in group) for group in (self.rows, self.columns))
        return d_in, d_out

    def view(self, shape: Sequence[int]) -> View:
        """The same for a leaf of this shape."""
        sizes = tuple(digit.size for digit in self.digits)
        order = [self.digits.index(d) for d in (*self.layers, *self.rows, *self.columns)]
        view = View().reshape(shape, sizes).transpose(order)
        ordered = tuple(sizes[i] for i in order)
        return view.reshape(ordered, (*self.layer_shape, *self.matrix_shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Where the factors of an access belong in the scores of its leaf.

    The access has entries: combinations of iterations and batch indices, each of which reads one
    layer.

    Attributes:
      access: the access, its rows and columns in the leaf's order.
      entry_scans: the scans, by depth, whose iterations are entries.
      column_scans: the scans whose iterations are columns: chunks of one product with one input.
      entry_batch: positions of the batch axes that are entries; the others are tokens.
      layers: (entries,), number of the layer that each reads, or ABSENT.
      rows: for each of the inputs' features the row of the leaf, or ABSENT.
      columns: for each of the output gradients' features the column of the leaf, or ABSENT.
    """

    access: Access
    entry_scans: tuple[int, ...]
    column_scans: tuple[int, ...]
    entry_batch: tuple[int, ...]
    layers: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


class Part(NamedTuple):
    """Uses of a leaf that are laid out alike: matrix products, or lookups."""

    layout: Layout
    placements: tuple[Placement, ...]


class CannotArrange(Exception):
    """Why the uses of a leaf have no common layout."""


def arrange(shape: Sequence[int], of_leaf: Sequence[Access]) -> list[Part]:
    """The layout of a leaf's scores: one part, or several that are summed, without layers then.

    Args:
      shape: of the leaf.
      of_leaf: what its uses read of it.

    Raises:
      CannotArrange: there is none.
    """
    if 0 in shape:
        raise CannotArrange("has no entries")
    digits = _divided(_digits(shape), of_leaf)
    groups: list[tuple[bool, list[tuple[Access, _Roles]]]] = []
    for access in of_leaf:
        roles = _roles(access, digits)
        for is_lookup, group in groups:
            if is_lookup == access.use.is_lookup and all(roles.agree(other) for _, other in group):
                group.append((access, roles))
                break
        else:
            groups.append((access.use.is_lookup, [(access, roles)]))
    parts = []
    for _, group in groups:
        layout = _layout(digits, [roles for _, roles in group])
        placements = tuple(place(access, layout) for access, _ in group)
        parts.append(Part(layout, placements))
    if len(parts) > 1 and any(part.layout.layers for part in parts):
        raise CannotArrange("used in several ways by stacked layers")
    return parts


def layers_of_dense(shape: Sequence[int], touched: Sequence[Piece]) -> tuple[int, ...]:
    """The axes of a leaf with dense scores that are layers: all see single indices along them.

    A single entry that is read by itself is no layer, unless a scan reads all of them so.
    """
    digits = () if 0 in shape else _digits(shape)
    inside: set[Digit] = set()
    single: set[Digit] = set()
    for piece in touched:
        varying = _varying(piece.axes, digits)
        inside |= varying
        if varying or piece.offsets.size > 1:
            single |= set(digits) - varying
    layers = single - inside
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return tuple(i for i, axis in enumerate(zip(strides, shape, strict=True)) if axis in layers)


def _digits(shape: Sequence[int]) -> tuple[Digit, ...]:
    """One for each axis of a leaf with more than one entry."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return tuple(Digit(n, size) for n, size in zip(strides, shape, strict=True) if size > 1)


def _varying(vectors: Iterable[np.ndarray], digits: Iterable[Digit]) -> set[Digit]:
    """The digits in which entries of any vector differ."""
    found = set()
    for vector in vectors:
        numbers = vector[vector != ABSENT]
        if numbers.size > 1:
            of_digits = ((digit, digit.of(numbers)) for digit in digits)
            found |= {digit for digit, of in of_digits if of.min() != of.max()}
    return found


class _Roles(NamedTuple):
    """Which digits change along what, in one access.

    Attributes:
      rows: along its rows.
      columns: along its columns.
      layers: from entry to entry.
    """

    rows: frozenset[Digit]
    columns: frozenset[Digit]
    layers: frozenset[Digit]

    def agree(self, other: _Roles) -> bool:
        return not (
            self.rows & (other.columns | other.layers)
            or self.columns & (other.rows | other.layers)
            or self.layers & (other.rows | other.columns)
        )


def _along(offsets: np.ndarray, depth: int) -> list[np.ndarray]:
    """The lines of an array along one axis."""
    return list(np.moveaxis(offsets, depth, -1).reshape(-1, offsets.shape[depth]))


def _roles(access: Access, digits: Sequence[Digit]) -> _Roles:
    rows = _varying(access.vectors(access.rows), digits)
    columns = _varying(access.vectors(access.columns), digits)
    layers = _varying(access.vectors(access.batch), digits)
    for depth in range(access.piece.offsets.ndim):
        changing = _varying(_along(access.piece.offsets, depth), digits)
        layers |= changing - columns if _has_one_input(access, depth) else changing
    return _Roles(frozenset(rows), frozenset(columns), frozenset(layers))


def _has_one_input(access: Access, depth: int) -> bool:
    """Whether all iterations of a scan multiply the same, so that they may be columns of one."""
    return not access.use.is_lookup and access.use.num_source_scans <= depth


def _divided(digits: tuple[Digit, ...], of_leaf: Sequence[Access]) -> tuple[Digit, ...]:
    """Digits of which each plays one role in each access; those that do not are divided."""
    while True:
        for access in of_leaf:
            rows, columns, layers = _roles(access, digits)
            both = (rows & columns) | (rows & layers) | (columns & layers)
            if both:
                digit = next(iter(both))
                digits = _divide(digits, digit, _size_of_inner(access, digit, digits))
                break
        else:
            return digits


def _size_of_inner(access: Access, digit: Digit, digits: Sequence[Digit]) -> int:
    """The coarsest step in which the digit changes along what shares it."""
    steps = []
    along = [*access.vectors((*access.rows, *access.columns, *access.batch))]
    for depth in range(access.piece.offsets.ndim):
        along += _along(access.piece.offsets, depth)
    for vector in along:
        numbers = digit.of(vector[vector != ABSENT])
        if numbers.size and np.ptp(numbers) > 0:
            steps.append(int(np.gcd.reduce(numbers - numbers.min())))
    return max(steps)


def _divide(digits: tuple[Digit, ...], digit: Digit, size: int) -> tuple[Digit, ...]:
    if digit.size % size or not 1 < size < digit.size:
        raise CannotArrange("its rows, columns and layers share an axis")
    inner = Digit(digit.stride, size)
    outer = Digit(digit.stride * size, digit.size // size)
    return tuple(new for old in digits for new in ((outer, inner) if old == digit else (old,)))


def _layout(digits: tuple[Digit, ...], roles: Sequence[_Roles]) -> Layout:
    rows, columns = (set().union(*(r[i] for r in roles)) for i in (0, 1))
    return Layout(
        layers=tuple(d for d in digits if d not in rows | columns),
        rows=tuple(d for d in digits if d in rows),
        columns=tuple(d for d in digits if d in columns),
        digits=digits,
    )


def place(access: Access, layout: Layout) -> Placement:
    """Where an access belongs in a layout.

    Raises:
      CannotArrange: in no single place.
    """
    piece = access.piece
    rows_axes, columns_axes = (
        tuple(sorted(axes, key=lambda i: -np.ptp(piece.axes[i]) / max(1, len(piece.axes[i]) - 1)))
        for axes in (access.rows, access.columns)
    )
    depths = range(piece.offsets.ndim)
    column_scans = tuple(
        depth
        for depth in depths
        if _has_one_input(access, depth) and _varying(_along(piece.offsets, depth), layout.columns)
    )
    entry_scans = tuple(d for d in depths if d not in column_scans and piece.offsets.shape[d] > 1)
    entry_batch = tuple(
        i for i, vector in enumerate(access.vectors(access.batch)) if np.ptp(vector) > 0
    )
    fixed_batch = [v for v in access.vectors(access.batch) if np.ptp(v) == 0]
    first = tuple(slice(None) if d in (*entry_scans, *column_scans) else 0 for d in depths)
    chosen = piece.offsets[first]
    in_order = [d for d in depths if d in (*entry_scans, *column_scans)]
    offsets = chosen.transpose([in_order.index(d) for d in (*entry_scans, *column_scans)])
    num_iterations = math.prod(piece.offsets.shape[d] for d in entry_scans)
    divided = split(offsets.ravel(), [num_iterations, offsets.size // num_iterations])
    if divided is None:
        raise CannotArrange("its rows, columns and layers share an axis")
    entries = functools.reduce(
        outer_sum,
        [*(v[:1] for v in fixed_batch), *(access.vectors(access.batch)[i] for i in entry_batch)],
        divided[0],
    )
    rows = functools.reduce(outer_sum, access.vectors(rows_axes), np.zeros(1, np.int64))
    columns = functools.reduce(outer_sum, access.vectors(columns_axes), divided[1])
    groups = (entries, rows, columns)
    layers, to_rows, to_columns = (
        _numbers(groups, which, digits)
        for which, digits in enumerate((layout.layers, layout.rows, layout.columns))
    )
    in_order_of_leaf = dataclasses.replace(access, rows=rows_axes, columns=columns_axes)
    return Placement(
        in_order_of_leaf, entry_scans, column_scans, entry_batch, layers, to_rows, to_columns
    )


def _numbers(groups: Sequence[np.ndarray], which: int, digits: Sequence[Digit]) -> np.ndarray:
    """For each entry of one group of offsets, its number in some digits; ABSENT stays.

    The other groups add a constant to it.
    """
    own, others = groups[which], [group[group != ABSENT] for group in groups]
    present = own != ABSENT
    total = np.zeros(len(own), np.int64)
    for digit in digits:
        numbers = digit.of(own)
        for i, group in enumerate(others):
            if i != which:
                of_group = digit.of(group)
                if of_group.min() != of_group.max():
                    raise CannotArrange("its rows, columns and layers share an axis")
                numbers = numbers + of_group[0]
        if numbers.max(initial=0, where=present) >= digit.size:
            raise CannotArrange("its rows, columns and layers share an axis")
        total = total * digit.size + numbers
    return np.where(present, total, ABSENT)
