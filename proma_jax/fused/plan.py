"""How each parameter leaf's gradient is made of a microbatch, in its backward pass or after it.

`Plan.microbatch` runs the backward pass with nodes in it, which project and accumulate where the
factors of their layers are at hand, and takes care of the leaves that nodes do not make.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from proma_jax._mesh.arrays import (
    automatic,
    rearranged,
    spec_within,
    spread,
    varying_like,
    without_batch_axes,
)
from proma_jax._mesh.axes import Spec, axis_names, without_leading
from proma_jax._mesh.layout import Layout, layout_of
from proma_jax._mesh.scores import SpreadScores
from proma_jax.arithmetic import layer_norms
from proma_jax.capture.checks import DIFFERENTIATED, noted
from proma_jax.capture.factors import Reported, assemble, groups, score_leaf
from proma_jax.capture.program import Program
from proma_jax.capture.search import Path
from proma_jax.fused.late import late_scores, stacked_vectors
from proma_jax.fused.nodes import for_each, node, own_data
from proma_jax.fused.slots import LeafPlan, Slot, slots_of, together, with_shared_inputs
from proma_jax.project import core
from proma_jax.scores.leaf import ScoreLeaf, View
from proma_jax.settings import Accumulation, Intra

Array = jax.Array

_UNMAPPED = (
    "accumulated_gradient needs jax.vmap to map logprob_fn over the sequences. Where that is not "
    "possible, sequence_scores takes them one after the other: use it with accumulate and "
    "project_intra."
)


class Plan:
    """How each leaf's gradient is made, by nodes or late (slots.py): static, without any arrays.

    Attributes:
      leaves: for each parameter leaf.
      specs: for each, how its total is spread over Auto axes, None if that is not known.
      nodes: for each group of uses that has a node, what the node adds to which leaf.
    """

    def __init__(
        self,
        program: Program,
        params: Any,
        accumulation: Accumulation | None,
        intra: Intra | None,
        spmd_axis_name: str | tuple[str, ...] | None,
        param_specs: Sequence[Spec],
    ) -> None:
        self.program, self.accumulation, self.intra = program, accumulation, intra
        self.spmd_axis_name = spmd_axis_name
        arrays = jax.tree.leaves(params)
        self.dtypes = [leaf.dtype for leaf in arrays]
        self.paths = paths = [
            jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        kinds = [(path, program.kind(i)) for i, path in enumerate(paths)]
        accumulates, in_intra = (
            settings.projects(kinds, params) if settings else [False] * len(kinds)
            for settings in (accumulation, intra)
        )
        self.leaves = [
            LeafPlan(a, i, program.view(leaf))
            for leaf, (a, i) in enumerate(zip(accumulates, in_intra, strict=True))
        ]
        self.specs = [
            None if spec is None else spec_within(leaf, of_leaf.view.apply, spec)
            for leaf, of_leaf, spec in zip(arrays, self.leaves, param_specs, strict=True)
        ]
        slots = {
            leaf: slots_of(program, leaf, self.leaves[leaf].accumulates or self.leaves[leaf].intra)
            for leaf in program.parts
        }
        self.late = with_shared_inputs(program, {i for i in slots if slots[i] is None})
        self.nodes: dict[Path, list[Slot]] = {}
        for leaf, of_leaf in slots.items():
            if leaf not in self.late:
                for group, slot in of_leaf or ():
                    self.nodes.setdefault(group, []).append(slot)

    def spread(self, totals: Sequence[Array]) -> list[Array]:
        """The totals, spread over Auto axes like the parameters."""
        return [spread(total, spec) for total, spec in zip(totals, self.specs, strict=True)]

    def zeros(self, leaves: Sequence[Array], dtype: DTypeLike) -> list[Array]:
        """The totals at the start, spread like the parameters."""

        def in_layout(leaf: Array, view: View) -> Array:
            return rearranged(lambda leaf: view.apply(jnp.zeros_like(leaf, dtype)), leaf)

        return self.spread(
            [in_layout(leaf, spec.view) for spec, leaf in zip(self.leaves, leaves, strict=True)]
        )

    def microbatch(
        self,
        leaves: list[Array],
        totals: list[Array],
        microbatch: Any,
        coefficients: Array,
        numbers: core.Microbatch,
    ) -> tuple[list[Array], Any, Array]:
        """What a microbatch adds to each total, the outputs, and the norms of `_parts`."""
        program = self.program
        whole, whole_totals = without_batch_axes((leaves, totals), coefficients)
        for_each_sequence = functools.partial(for_each, coefficients)
        dense = {i: for_each_sequence(whole[i]) for i in program.dense}
        late_groups = [group for group in program.members if group not in self.nodes]
        late = jax.tree.map(for_each_sequence, program.probes(late_groups))
        nodes: dict[Path, list[tuple[Array, Array | None]]] = {}
        specs: dict[Path, list[Spec]] = {}
        for group, slots in self.nodes.items():
            seen = [self._seen_by_node(slot, whole_totals[slot.leaf]) for slot in slots]
            nodes[group] = [
                (total, None if norms is None else varying_like(norms, coefficients))
                for total, norms, _ in seen
            ]
            specs[group] = [spec for _, _, spec in seen]

        def per_sequence(
            differentiated: tuple[Any, ...],
            numbers: core.Microbatch,
            coefficient: Array,
            sequence: Any,
        ) -> tuple[Array, Any]:
            dense, late, nodes = differentiated
            values = [dense.get(i, leaf) for i, leaf in enumerate(whole)]
            visit = functools.partial(self._visit, specs, coefficient, numbers)
            return program.run([*values, *jax.tree.leaves(sequence)], late | nodes, visit)

        def value(differentiated: tuple[Any, ...]) -> tuple[Array, Any]:
            axes = ((0, 0, None), None, 0, 0)
            logprobs, outputs = jax.vmap(per_sequence, axes, spmd_axis_name=self.spmd_axis_name)(
                differentiated, numbers, coefficients, microbatch
            )
            return jnp.sum(logprobs), outputs

        with noted(DIFFERENTIATED), noted(_UNMAPPED, NotImplementedError):
            (dense, late, nodes), outputs = jax.grad(value, has_aux=True)((dense, late, nodes))
        parts, norms = automatic(
            self._collect,
            (totals, None),
            dense,
            late,
            nodes,
            totals,
            coefficients,
            numbers,
        )
        return parts, outputs, norms

    def _seen_by_node(self, slot: Slot, total: Array) -> tuple[Array, Array | None, Spec]:
        """What a node gets of a total, the place of its norms, and how it is spread over Auto axes.

        The first two have an axis for each scan around the node.
        """
        if slot.layers is None:
            return total, None, None
        scans = slot.layers.shape[:-1]
        layers = rearranged(slot.of_total, total)
        known = self.specs[slot.leaf]
        spec = None if known is None else spec_within(total, slot.of_total, known)
        in_node = None if spec is None else without_leading(spec, len(scans))
        return layers, jnp.zeros((*scans, 3), jnp.float32), in_node

    def _collect(
        self,
        dense: dict[int, Array],
        late: dict[Path, Any],
        nodes: dict[Path, list[tuple[Array, Array | None]]],
        totals: list[Array],
        coefficients: Array,
        numbers: core.Microbatch,
    ) -> tuple[list[Array], Array]:
        """The parts of all leaves and the norms of `_parts`, from what the backward pass made."""
        program = self.program
        norms = [jnp.zeros((1, 3), jnp.float32)]
        made: dict[int, list[tuple[Slot, Array]]] = {}
        for group, slots in self.nodes.items():
            for slot, (part, of_part) in zip(slots, nodes[group], strict=True):
                made.setdefault(slot.leaf, []).append((slot, part))
                if of_part is not None:
                    norms.append(of_part.reshape(-1, 3))
        parts = {leaf: together(of_leaf, totals[leaf]) for leaf, of_leaf in made.items()}
        norms += [
            jnp.stack([core.norm(None), core.norm(None), core.norm(parts[leaf])])[None]
            for leaf in made
            if made[leaf][0][0].layers is None
        ]
        scores = late_scores(program, dense, late, {i: self.dtypes[i] for i in sorted(self.late)})
        kinds = [self.leaves[i].accumulates for i in scores]
        groups = stacked_vectors(scores, totals, kinds)
        found = self._parts(
            [group.leaves[0] for group in groups],
            [group.total for group in groups],
            [group.scores for group in groups],
            coefficients,
            numbers,
        )
        for (leaves, _, _), (added, of_leaves) in zip(groups, found, strict=True):
            norms.append(of_leaves[None])
            parts |= zip(leaves, added if len(leaves) > 1 else [added], strict=True)
        in_order = [parts[i].astype(total.dtype) for i, total in enumerate(totals)]
        return in_order, layer_norms(jnp.concatenate(norms).T, 1)

    def _visit(
        self,
        specs: dict[Path, list[Spec]],
        coefficient: Array,
        numbers: core.Microbatch,
        group: Path,
        data: Array,
        extra: dict[Path, Any],
    ) -> tuple[Array, dict[Path, Any]]:
        """Puts a node where a group of uses is met, unless their leaves are late."""
        program = self.program
        data = own_data(jnp.asarray(data), coefficient)
        if group not in self.nodes:
            return program.reported(group, data, extra)
        slots, members = self.nodes[group], program.members[group]
        num_scans = program.uses[group].num_source_scans
        like = [
            (program.uses[path].eqn.outvars[0], program.uses[path].scans[num_scans:])
            for path in members
        ]
        axes = axis_names(self.spmd_axis_name)

        def fold(data: Array, coefficients: Array, totals: Any, *rest: Any) -> Any:
            layouts = [
                None
                if slot.layers is None
                else layout_of(
                    total, coefficients, lambda x: x, len(slot.assembly.layer_shape), axes, spec
                )
                for slot, (total, _), spec in zip(slots, totals, specs[group], strict=True)
            ]
            of_all = functools.partial(self._fold, slots, members, layouts)
            parts = automatic(of_all, totals, data, coefficients, totals, *rest)
            return varying_like(parts, coefficients)

        fixed = jax.lax.stop_gradient(data)
        probes = node(fold, like)(fixed, coefficient, extra[group], numbers)
        return data, {path: (None, probe) for path, probe in zip(members, probes, strict=True)}

    def _fold(
        self,
        slots: Sequence[Slot],
        members: Sequence[Path],
        layouts: Sequence[Layout | None],
        data: Array,
        coefficients: Array,
        totals: Sequence[tuple[Array, Array | None]],
        numbers: core.Microbatch,
        result_grads: Sequence[Array],
    ) -> list[tuple[Array, Array | None]]:
        """What a microbatch adds to the totals of uses with the same data.

        Args:
          slots: what the node adds to.
          members: the uses.
          layouts: of the scores of each slot.
          data: (b, ...), what they multiply, or the indices.
          coefficients: (b,).
          totals: of each slot, its total and the place of its norms, or None.
          numbers: of the microbatch.
          result_grads: of each use, (b, ...).

        Returns:
          Of each slot, the part to add and what is in its place, in the types of `totals`.
        """
        assemblies = [slot.assembly for slot in slots]

        def one_sequence(data: Array, grads: Sequence[Array]) -> Any:
            reported = {p: Reported(data, g) for p, g in zip(members, grads, strict=True)}
            return assemble(assemblies, reported)

        factors = jax.vmap(one_sequence)(data, list(result_grads))
        made = map(score_leaf, assemblies, factors, groups(assemblies))
        scores = [
            of_slot if layout is None else SpreadScores(of_slot, None, layout)
            for of_slot, layout in zip(made, layouts, strict=True)
        ]
        specs = [self.leaves[slot.leaf] for slot in slots]
        seen = [
            slot.view.apply(spec.view.invert(total)) if slot.layers is None else total
            for slot, spec, (total, _) in zip(slots, specs, totals, strict=True)
        ]
        parts = self._parts([slot.leaf for slot in slots], seen, scores, coefficients, numbers)
        results: list[tuple[Array, Array | None]] = []
        for slot, spec, (total, place_of_norms), part in zip(
            slots, specs, totals, parts, strict=True
        ):
            added = part.added
            if slot.layers is None:
                added = spec.view.apply(slot.view.invert(added))
            kept = None if place_of_norms is None else part.norms
            results.append((added.astype(total.dtype), kept))
        return results

    def _parts(
        self,
        leaves: Sequence[int],
        totals: Sequence[Array],
        scores: Sequence[ScoreLeaf],
        coefficients: Array,
        numbers: core.Microbatch,
    ) -> list[core.Part]:
        """What a microbatch adds to the totals of some leaves, in the layout of the scores."""
        of_leaves = [
            core.Leaf(
                scores=of_leaf,
                total=total if self.leaves[i].accumulates else None,
                in_intra=self.leaves[i].intra,
            )
            for i, total, of_leaf in zip(leaves, totals, scores, strict=True)
        ]
        return core.parts(
            of_leaves,
            numbers,
            accumulation=self.accumulation,
            intra=self.intra,
            coefficients=coefficients,
        )
