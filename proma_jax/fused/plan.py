"""How each parameter leaf's gradient is made of a microbatch, in its backward pass or after it.

`Plan.microbatch` runs the backward pass with nodes in it, which project and accumulate where the
factors of their layers are at hand, and takes care of the leaves that nodes do not make.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
from proma_jax._mesh.axes import Spec, axis_names, explicit_batch_axes
from proma_jax._mesh.layout import Layout, layout_of
from proma_jax._mesh.lookups import shared
from proma_jax._mesh.scores import with_layout
from proma_jax.arithmetic import layer_norms
from proma_jax.capture.checks import DIFFERENTIATED, noted
from proma_jax.capture.factors import Reported, assemble, groups, score_leaf
from proma_jax.capture.program import Carried, Program
from proma_jax.capture.search import Path
from proma_jax.fused.late import late_scores, stacked_vectors
from proma_jax.fused.nodes import for_each, node, own_data
from proma_jax.fused.slots import LeafPlan, Slot, adds_twice, slots_of, with_shared_inputs
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
      made: the leaves to which nodes add.
      apart: those whose part is made apart from the total, since its norm is asked for and a layer
        is added to more than once.
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
        of_leaves: dict[int, list[Slot]] = {}
        for slot in [slot for of_node in self.nodes.values() for slot in of_node]:
            of_leaves.setdefault(slot.leaf, []).append(slot)
        self.made = sorted(of_leaves)
        self.apart = [leaf for leaf in self.made if intra and adds_twice(of_leaves[leaf])]

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
        """The totals after a microbatch, the outputs, and the norms of `_parts`."""
        program = self.program
        whole = without_batch_axes(leaves, coefficients)
        for_each_sequence = functools.partial(for_each, coefficients)
        dense = {i: for_each_sequence(whole[i]) for i in program.dense}
        late_groups = [group for group in program.members if group not in self.nodes]
        late = jax.tree.map(for_each_sequence, program.probes(late_groups))
        layers = {
            group: [jnp.asarray(slot.layers) for slot in slots]
            for group, slots in self.nodes.items()
        }
        places = {
            group: [jnp.zeros((*slot.scans, 3), jnp.float32) for slot in slots]
            for group, slots in self.nodes.items()
        }
        zeros = {i: jnp.zeros_like(totals[i]) for i in self.made}
        places, zeros = varying_like((places, zeros), coefficients)
        before = {i: zeros[i] if i in self.apart else totals[i] for i in self.made}

        def value(
            dense: dict[int, Array], late: dict[Path, Any], places: Any, carried: Carried
        ) -> tuple[Any, Any]:
            of_nodes = {group: (layers[group], places[group]) for group in self.nodes}

            def per_sequence(
                dense: dict[int, Array], late: dict[Path, Any], coefficient: Array, sequence: Any
            ) -> tuple[Array, Any, Carried]:
                values = [dense.get(i, leaf) for i, leaf in enumerate(whole)]
                visit = functools.partial(self._visit, coefficient, numbers)
                arguments = [*values, *jax.tree.leaves(sequence)]
                return program.run(arguments, late | of_nodes, visit, carried)

            mapped = jax.vmap(per_sequence, 0, (0, 0, None), spmd_axis_name=self.spmd_axis_name)
            logprobs, outputs, carried = mapped(dense, late, coefficients, microbatch)
            return (jnp.sum(logprobs), carried), outputs

        layouts = {
            i: self._layout(i, totals[i], coefficients, program.num_layer_axes(i))
            for i in (*program.dense, *self.late)
        }
        with noted(DIFFERENTIATED), noted(_UNMAPPED, NotImplementedError):
            (logprob, _), pullback, outputs = jax.vjp(
                value, dense, late, places, zeros, has_aux=True
            )
            dense, late, places, made = pullback((jnp.ones_like(logprob), before))
        totals, norms = automatic(
            functools.partial(self._collect, layouts),
            (totals, None),
            dense,
            late,
            places,
            made,
            totals,
            coefficients,
            numbers,
        )
        return totals, outputs, norms

    def _collect(
        self,
        layouts: dict[int, Layout | None],
        dense: dict[int, Array],
        late: dict[Path, Any],
        places: dict[Path, list[Array]],
        made: dict[int, Array],
        totals: list[Array],
        coefficients: Array,
        numbers: core.Microbatch,
    ) -> tuple[list[Array], Array]:
        """All totals and the norms of `_parts`, from what the backward pass made."""
        program = self.program
        new = dict(made)
        norms = [jnp.zeros((1, 3), jnp.float32)]
        for group, slots in self.nodes.items():
            for slot, of_slot in zip(slots, places[group], strict=True):
                if slot.leaf not in self.apart:
                    norms.append(of_slot.reshape(-1, 3))
        for leaf in self.apart:
            norms.append(jnp.stack([core.norm(None), core.norm(None), core.norm(made[leaf])])[None])
            new[leaf] = totals[leaf] + made[leaf]
        scores = late_scores(program, dense, late, {i: self.dtypes[i] for i in sorted(self.late)})
        kinds = [self.leaves[i].accumulates for i in scores]
        alike = stacked_vectors(scores, totals, kinds, layouts)
        found = self._parts(
            [of_alike.leaves[0] for of_alike in alike],
            [of_alike.total for of_alike in alike],
            [of_alike.scores for of_alike in alike],
            coefficients,
            numbers,
        )
        for of_alike, part in zip(alike, found, strict=True):
            norms.append(part.norms[None])
            added = part.added if len(of_alike.leaves) > 1 else [part.added]
            for leaf, of_leaf in zip(of_alike.leaves, added, strict=True):
                new[leaf] = totals[leaf] + of_leaf.astype(totals[leaf].dtype)
        return [new[i] for i in range(len(totals))], layer_norms(jnp.concatenate(norms).T, 1)

    def _visit(
        self,
        coefficient: Array,
        numbers: core.Microbatch,
        group: Path,
        data: Array,
        extra: dict[Path, Any],
        carried: Carried,
    ) -> tuple[Array, dict[Path, Any], Carried]:
        """Puts a node where a group of uses is met, unless their leaves are late."""
        program = self.program
        data = own_data(jnp.asarray(data), coefficient)
        if group not in self.nodes:
            return program.reported(group, data, extra, carried)
        slots, members = self.nodes[group], program.members[group]
        num_scans = program.uses[group].num_source_scans
        like = [
            (program.uses[path].eqn.outvars[0], program.uses[path].scans[num_scans:])
            for path in members
        ]

        def fold(
            data: Array,
            coefficients: Array,
            layers: Any,
            numbers: core.Microbatch,
            totals: Carried,
            result_grads: Sequence[Array],
        ) -> Any:
            layouts = [self._slot_layout(slot, totals[slot.leaf], coefficients) for slot in slots]
            batch_axes = axis_names(self.spmd_axis_name) or explicit_batch_axes(coefficients)
            of_all = functools.partial(self._fold, slots, members, layouts, batch_axes)
            arguments = data, coefficients, layers, numbers, totals, result_grads
            found = automatic(of_all, (None, totals), *arguments)
            return varying_like(found, coefficients)

        fixed = jax.lax.stop_gradient(data)
        layers, places = extra[group]
        used = {slot.leaf: carried[slot.leaf] for slot in slots}
        probes, used = node(fold, like)(fixed, coefficient, layers, numbers, places, used)
        of_members = {path: (None, probe) for path, probe in zip(members, probes, strict=True)}
        return data, of_members, carried | used

    def _slot_layout(self, slot: Slot, total: Array, coefficients: Array) -> Layout | None:
        """How the scores of what a node sees of a total are spread."""
        num_layer_axes = len(slot.assembly.layer_shape)
        return self._layout(slot.leaf, total, coefficients, num_layer_axes, slot.seen_first)

    def _added_spec(self, slot: Slot, total: Array) -> Spec:
        """How to spread what a node adds over Auto axes; None if its scores know or nobody does."""
        spec = self.specs[slot.leaf]
        if spec is None or self.leaves[slot.leaf].accumulates:
            return None
        return spec_within(total, slot.seen_first, spec)

    def _layout(
        self,
        leaf: int,
        total: Array,
        coefficients: Array,
        num_layer_axes: int,
        seen: Callable[[Array], Array] = lambda total: total,
    ) -> Layout | None:
        """How the scores of a leaf, or of what is seen of its total, are spread."""
        if not self.leaves[leaf].accumulates:
            return None
        axes = axis_names(self.spmd_axis_name)
        return layout_of(total, coefficients, seen, num_layer_axes, axes, self.specs[leaf])

    def _fold(
        self,
        slots: Sequence[Slot],
        members: Sequence[Path],
        layouts: Sequence[Layout | None],
        batch_axes: Sequence[str],
        data: Array,
        coefficients: Array,
        layers: Sequence[Array],
        numbers: core.Microbatch,
        totals: Carried,
        result_grads: Sequence[Array],
    ) -> tuple[list[Array], Carried]:
        """Adds to the totals of uses with the same data what a microbatch adds.

        Args:
          slots: what the node adds to.
          members: the uses.
          layouts: of the scores of each slot.
          batch_axes: the mesh axes over which the sequences are spread.
          data: (b, ...), what they multiply, or the indices.
          coefficients: (b,).
          layers: of each slot, those of this iteration.
          numbers: of the microbatch.
          totals: of the leaves of the slots.
          result_grads: of each use, (b, ...).

        Returns:
          The norms of each slot's part, and the totals.
        """
        assemblies = [slot.assembly for slot in slots]

        def one_sequence(data: Array, grads: Sequence[Array]) -> Any:
            reported = {p: Reported(data, g) for p, g in zip(members, grads, strict=True)}
            return assemble(assemblies, reported)

        factors = jax.vmap(one_sequence)(data, list(result_grads))
        of_leaves = [slot.leaf for slot in slots]
        made = map(score_leaf, assemblies, factors, groups(assemblies))
        scores = [
            with_layout(of_slot, layout)
            if self.leaves[leaf].accumulates
            else shared(of_slot, batch_axes)
            for leaf, of_slot, layout in zip(of_leaves, made, layouts, strict=True)
        ]
        seen = [
            slot.seen(totals[slot.leaf], of_slot)
            for slot, of_slot in zip(slots, layers, strict=True)
        ]
        parts = self._parts(of_leaves, seen, scores, coefficients, numbers)
        for slot, of_slot, before, part in zip(slots, layers, seen, parts, strict=True):
            added = spread(
                part.added.astype(before.dtype), self._added_spec(slot, totals[slot.leaf])
            )
            after = before + added
            totals = totals | {slot.leaf: slot.replaced(totals[slot.leaf], of_slot, after)}
        return [part.norms for part in parts], totals

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
