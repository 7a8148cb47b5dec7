"""What one use of a parameter leaf reads of it.

An entry of a leaf is its number in the flattened leaf; a `Digit` is the part of that number that
one axis of the leaf, or a part of an axis, stands for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from proma_jax.capture import _operations
from proma_jax.capture.pieces import Piece
from proma_jax.capture.search import Use


class Digit(NamedTuple):
    """A part of the number of an entry in a flattened leaf: number // stride % size."""

    stride: int
    size: int

    def of(self, numbers: np.ndarray) -> np.ndarray:
        return numbers // self.stride % self.size


@dataclasses.dataclass(frozen=True, eq=False)
class Access:
    """What one use reads of one leaf.

    Attributes:
      use: the use.
      piece: one of its pieces.
      rows: axes of the piece that are contracted, or the one along which indices choose.
      columns: axes that remain.
      batch: axes that are a batch of the product.
    """

    use: Use
    piece: Piece
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    batch: tuple[int, ...]

    def vectors(self, axes: Iterable[int]) -> list[np.ndarray]:
        return [self.piece.axes[i] for i in axes]


def accesses(uses: Iterable[Use]) -> dict[int, list[Access]]:
    """What all uses read of each leaf."""
    found: dict[int, list[Access]] = {}
    for use in uses:
        operation = use.operation
        if isinstance(operation, _operations.Matmul):
            batch, rows, columns = operation.kernel_axes
        else:
            batch, rows = (), (operation.axis,)
            columns = tuple(i for i in range(len(use.pieces[0].axes)) if i != operation.axis)
        for piece in use.pieces:
            found.setdefault(piece.leaf, []).append(Access(use, piece, rows, columns, batch))
    return found
