"""Which node adds what to which layers of a parameter leaf's total.

A leaf is made by nodes, in the backward pass, if each of its layers is used at one node only, in
one iteration, or if it is not projected, so that what the nodes add may be summed up; else late,
from its scores after the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from proma_jax.capture.factors import Assembly
from proma_jax.capture.layout import Layout, Placement, place
from proma_jax.capture.pieces import ABSENT
from proma_jax.capture.program import Program
from proma_jax.capture.search import Path
from proma_jax.scores.leaf import View

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What is done with one parameter leaf.

    Attributes:
      accumulates: whether the accumulation variant projects it.
      intra: whether the intra variant does.
      view: how the leaf is read in the layout of its total, which is that of its scores.
    """

    accumulates: bool
    intra: bool
    view: View


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """What a node adds to one leaf's total.

    Attributes:
      leaf: its number.
      layers: (scans around the node..., layers), which layers of the total the node adds to in
        which iteration.
      assembly: of the factors of these layers.
      view: how the total is read as (layers, d_in, d_out), but for the number of layer axes.
    """

    leaf: int
    layers: np.ndarray
    assembly: Assembly
    view: View

    @property
    def scans(self) -> tuple[int, ...]:
        """The lengths of the scans around the node."""
        return self.layers.shape[:-1]

    def seen(self, total: Array, layers: Array) -> Array:
        """What a node sees of a total in the iteration of `layers`, in the layout of the scores."""
        rows = self.view.apply(total).reshape(-1, *self.assembly.matrix_shape)
        if self._is_run:
            rows = jax.lax.dynamic_slice_in_dim(rows, layers[0], len(layers))
        else:
            rows = rows[layers]
        return rows.reshape(*self.assembly.layer_shape, *self.assembly.matrix_shape)

    def seen_first(self, total: Array) -> Array:
        """What a node sees of a total in the first iteration."""
        return self.seen(total, jnp.asarray(self.layers[(0,) * len(self.scans)]))

    def replaced(self, total: Array, layers: Array, seen: Array) -> Array:
        """A total with something else in the place of what a node sees."""
        in_view = self.view.apply(total)
        rows = in_view.reshape(-1, *self.assembly.matrix_shape)
        seen = seen.reshape(len(layers), *self.assembly.matrix_shape)
        if self._is_run:
            rows = jax.lax.dynamic_update_slice_in_dim(rows, seen, layers[0], axis=0)
        else:
            rows = rows.at[layers].set(seen)
        return self.view.invert(rows.reshape(in_view.shape))

    @property
    def _is_run(self) -> bool:
        """Whether the layers of each iteration follow one another."""
        return bool(np.all(np.diff(self.layers) == 1))


def slots_of(program: Program, leaf: int, is_projected: bool) -> list[tuple[Path, Slot]] | None:
    """The nodes that make a leaf and what each adds; None if it is late."""
    parts, slots = program.parts[leaf], []
    for layout, assembly in parts:
        groups: dict[Path, list[Placement]] = {}
        for placement in assembly.placements:
            group = program.first[placement.access.use.path]
            groups.setdefault(group, []).append(placement)
        view = View() if len(parts) == 1 else layout.view(program.shapes[leaf])
        for group, placements in groups.items():
            slot = slot_of(leaf, placements, layout, view)
            if slot is None:
                return None
            slots.append((group, slot))
    is_summed = adds_twice([slot for _, slot in slots])
    return None if is_projected and is_summed else slots


def adds_twice(slots: Sequence[Slot]) -> bool:
    """Whether any layer of a leaf is added to more than once."""
    layers = np.concatenate([slot.layers.ravel() for slot in slots])
    return len(np.unique(layers)) < len(layers)


def with_shared_inputs(program: Program, leaves: set[int]) -> set[int]:
    """Some leaves, and those that share an input with one of them, and so on."""
    together = [program.leaves_of(group) for group in program.members]
    while True:
        more = leaves.union(*(group for group in together if group & leaves))
        if more == leaves:
            return leaves
        leaves = more


def slot_of(leaf: int, placements: Sequence[Placement], layout: Layout, view: View) -> Slot | None:
    """The layers of a leaf that a node sees, None if they differ from iteration to iteration."""
    scans = placements[0].access.use.scans[: placements[0].access.use.num_source_scans]
    depth, of_each = len(scans), []
    for placement in placements:
        if any(d < depth for d in placement.column_scans):
            return None
        varied = [length if d in placement.entry_scans else 1 for d, length in enumerate(scans)]
        layers = placement.layers.reshape(*varied, -1)
        of_each.append(np.broadcast_to(layers, (*scans, layers.shape[-1])))
    seen = np.concatenate(of_each, axis=-1)
    rows = seen.reshape(-1, seen.shape[-1])
    present = rows != ABSENT
    if np.any(present != present[0]):
        return None
    rows = rows[:, present[0]]
    moved = rows[:, :1] - rows[:1, :1]
    if np.any(rows - moved != rows[:1]):
        return None
    first = np.unique(rows[0])
    in_node = [_in_node(placement, layout, depth, first) for placement in placements]
    layer_shape = (len(first),) if len(first) > 1 else ()
    assembly = Assembly(in_node, layer_shape, layout.matrix_shape)
    return Slot(leaf, (first + moved).reshape(*seen.shape[:-1], -1), assembly, view)


def _in_node(placement: Placement, layout: Layout, depth: int, layers: np.ndarray) -> Placement:
    """A placement as it is inside of the outermost scans, in an order of the layers there."""
    access = placement.access
    sources = tuple(s._replace(num_scans=s.num_scans - depth) for s in access.use.sources)
    use = dataclasses.replace(access.use, scans=access.use.scans[depth:], sources=sources)
    piece = dataclasses.replace(access.piece, offsets=access.piece.offsets[(0,) * depth])
    inside = place(dataclasses.replace(access, use=use, piece=piece), layout)
    numbers = np.where(inside.layers == ABSENT, ABSENT, np.searchsorted(layers, inside.layers))
    return dataclasses.replace(inside, layers=numbers)
