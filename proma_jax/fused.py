"""PROMA inside the backward pass: `accumulated_gradient`, for large, scanned or remat models.

`accumulate` and `project_intra` take scores, which exist for all layers at once. Here the backward
pass of each layer, where the scores of that layer are at hand, projects and accumulates, so that no
score outlives its layer. The result is that of the two transformations up to rounding. It is the
gradient of one optimizer step, from all its microbatches, and any optax chain may follow.

The taps of `capture` make it possible: where the first matrix product with some input is met, a
node is put into the program that hands each product with this input a probe of zeros. In the
backward pass the node gets the gradients of these products' results as the probes' gradients,
together, and returns what the microbatch adds to each kernel's accumulated gradient G as the
"gradient" of G. A node is mapped over the microbatch's sequences by a `custom_vmap`, so that it
sees them all.

Example:
  >>> import jax, jax.numpy as jnp, optax
  >>> import proma_jax as proma
  >>> def logprob_fn(params, x):
  ...     return jnp.sum(jax.nn.log_softmax(jnp.tanh(x @ params["w1"]) @ params["w2"])[:, 0])
  >>> params = {"w1": jnp.ones((8, 16)) / 8, "w2": jnp.ones((16, 4)) / 16}
  >>> batch = jax.random.normal(jax.random.key(0), (3, 4, 5, 8))     # k=3 microbatches of b=4
  >>> coefficients = jax.random.normal(jax.random.key(1), (3, 4))    # −advantage / tokens
  >>> gradient_fn = proma.accumulated_gradient(logprob_fn, accumulation=proma.Accumulation())
  >>> grads, metrics = jax.jit(gradient_fn)(params, batch, coefficients, step=0)
  >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  >>> updates, state = tx.update(grads, tx.init(params), params)
  >>> metrics.logprobs.shape, metrics.accumulation_fraction.shape
  ((3, 4), (3,))
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from proma_jax import core
from proma_jax._mesh import (
    Layout,
    automatic,
    axis_names,
    batch_axes_of,
    layout_of,
    spec_of,
    spec_within,
    specs_of_leaves,
    spread,
    varying_like,
    without_batch_axes,
)
from proma_jax.capture import _jaxpr
from proma_jax.capture.api import (
    check_function,
    check_parameters,
    differentiating,
    for_one_sequence,
)
from proma_jax.capture.factors import Assembly, Reported, assemble
from proma_jax.capture.layout import Layout as LeafLayout
from proma_jax.capture.layout import Placement, place
from proma_jax.capture.pieces import ABSENT
from proma_jax.capture.program import Program, trace
from proma_jax.capture.search import Path
from proma_jax.dominant import Starts, random_starts
from proma_jax.projection import layer_norms
from proma_jax.scores import (
    LayerFactors,
    LookupFactors,
    ScoreLeaf,
    View,
    divide,
    stacked_vectors,
)
from proma_jax.settings import Accumulation, Intra, at_step, prng_key
from proma_jax.spread import SpreadScores

Array = jax.Array


class GradientMetrics(NamedTuple):
    """What `accumulated_gradient` says of its k microbatches.

    Attributes:
      logprobs: (k, b), the log-probability of each sequence.
      accumulation_fraction: (k,) float32, ‖removed‖ / ‖G‖ over all leaves, as `accumulate` has it.
      intra_fraction: (k,) float32, ‖removed‖ / ‖g‖ over all leaves, as `project_intra` has it.
      aux: what `logprob_fn` returns beside the log-probability, stacked (k, b, ...); or None.
    """

    logprobs: Array
    accumulation_fraction: Array
    intra_fraction: Array
    aux: Any


def accumulated_gradient(
    logprob_fn: Callable[..., Any],
    *,
    accumulation: Accumulation | None = None,
    intra: Intra | None = None,
    has_aux: bool = False,
    accumulator_dtype: DTypeLike = "float32",
    spmd_axis_name: str | tuple[str, ...] | None = None,
    param_specs: Any = None,
) -> Callable[..., tuple[Any, GradientMetrics]]:
    """Makes a function from an optimizer step's microbatches to its projected gradient.

    The gradient is that of Σ c_i log π_i, summed over the microbatches one after the other, with
    the projections of one or both variants; with neither it is plain policy gradient.

    Args:
      logprob_fn: `logprob_fn(params, sequence) -> scalar`, as in `sequence_scores`.
      accumulation: settings of the accumulation variant. Default: None, it is not used.
      intra: settings of the intra-microbatch variant. Default: None, it is not used.
      has_aux: whether `logprob_fn` returns `(scalar, aux)`. Default False, as in `jax.grad`.
      accumulator_dtype: of the accumulated gradient. Default: float32.
      spmd_axis_name: as in `sequence_scores`. Default None.
      param_specs: as in `sequence_scores`. Default None.

    Returns:
      `gradient_fn(params, batch, coefficients, step) -> (grads, GradientMetrics)`. `batch` is a
      pytree of sequences with two leading axes (k, b); `coefficients` is (k, b), the sequences'
      weights in the loss gradient; `step` counts the optimizer steps taken so far, from which
      schedules and the random starts of `intra` follow. `grads` has the structure, shapes and
      dtypes of `params`. Call it under `jax.jit`.

      They are what `accumulate(inner, k)`, alone or after `project_intra()` in a chain, hands to
      `inner` after the k-th microbatch, up to rounding. NaN or infinity in a leaf's scores shows
      in its gradient.

    Raises:
      ValueError: as `sequence_scores`; `batch` or `coefficients` lack the axes (k, b); or a mask
        does not fit, or nothing can be projected.
    """
    if accumulator_dtype is None or not jnp.issubdtype(accumulator_dtype, jnp.floating):
        raise ValueError(f"{accumulator_dtype=} must be a floating point type, like 'float32'.")
    for name, settings, kind in [
        ("accumulation", accumulation, Accumulation),
        ("intra", intra, Intra),
    ]:
        if not isinstance(settings, kind | None):
            raise ValueError(f"{name}={settings!r} must be a proma_jax.{kind.__name__}, or None.")
    check_function(logprob_fn)

    @jax.jit
    def gradient(
        params: Any, batch: Any, coefficients: Array, step: Array
    ) -> tuple[Any, GradientMetrics]:
        params = varying_like(params, (batch, coefficients))
        specs = specs_of_leaves(param_specs, params, batch)
        batch_axes_of(spmd_axis_name, (params, batch))
        program = _trace_one(logprob_fn, params, batch, has_aux)
        plan = _Plan(program, params, accumulation, intra, spmd_axis_name, specs)
        k = coefficients.shape[0]
        leaves, treedef = jax.tree.flatten(params)

        def add_microbatch(
            carry: tuple[list[Array], Array], inputs: tuple[Array, Any, Array]
        ) -> tuple[tuple[list[Array], Array], GradientMetrics]:
            (totals, length), (m, microbatch, weights) = carry, inputs
            numbers = plan.numbers(m, k, step, weights.size)
            parts, outputs, norms = plan.microbatch(leaves, totals, microbatch, weights, numbers)
            removed, removed_intra, own = norms
            logprobs, aux = outputs if has_aux else (outputs, None)
            metrics = GradientMetrics(
                logprobs, divide(removed, length), divide(removed_intra, own), aux
            )
            totals = plan.spread([t + part for t, part in zip(totals, parts, strict=True)])
            return (totals, core.norm_of_all(totals)), metrics

        def finish(totals: list[Array]) -> list[Array]:
            return [
                spec.view.invert(total).astype(leaf.dtype)
                for spec, total, leaf in zip(plan.leaves, totals, leaves, strict=True)
            ]

        zeros = plan.zeros(leaves, accumulator_dtype)
        start = zeros, core.norm_of_all(zeros)
        (totals, _), metrics = jax.lax.scan(
            add_microbatch, start, (jnp.arange(k), batch, coefficients)
        )
        grads = automatic(finish, [spec_of(leaf) for leaf in leaves], totals)
        grads = [spread(gradient, spec) for gradient, spec in zip(grads, specs, strict=True)]
        return jax.tree.unflatten(treedef, grads), metrics

    def gradient_fn(
        params: Any, batch: Any, coefficients: Array, step: ArrayLike
    ) -> tuple[Any, GradientMetrics]:
        coefficients, step = jnp.asarray(coefficients), jnp.asarray(step, jnp.int32)
        if step.ndim:
            raise ValueError(f"step has shape {step.shape}, but must be one number.")
        check_parameters(params)
        _check_batch(batch, coefficients)
        params = jax.tree.map(jnp.asarray, params)
        microbatch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), batch
        )
        with for_one_sequence(logprob_fn, params, microbatch):
            return gradient(params, batch, coefficients, step)

    return gradient_fn


@contextlib.contextmanager
def _mapping() -> Iterator[None]:
    """Says what there is for functions that `jax.vmap` cannot map."""
    try:
        yield
    except NotImplementedError as error:
        error.add_note(
            "accumulated_gradient needs jax.vmap to map logprob_fn over the sequences. Where that "
            "is not possible, sequence_scores takes them one after the other: use it with "
            "accumulate and project_intra."
        )
        raise


def _check_batch(batch: Any, coefficients: Array) -> None:
    if coefficients.ndim != 2 or not coefficients.size or jnp.iscomplexobj(coefficients):
        raise ValueError(
            f"coefficients has shape {coefficients.shape} and type {coefficients.dtype}: it must "
            "be (k, b), one real weight for each of the b sequences of each of the k microbatches."
        )
    if not jax.tree.leaves(batch):
        raise ValueError("batch has no arrays: every leaf must have two leading axes (k, b).")
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if jnp.shape(leaf)[:2] != coefficients.shape:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but coefficients "
                f"has shape {coefficients.shape}: every leaf needs these two leading axes (k, b)."
            )


def _trace_one(logprob_fn: Callable[..., Any], params: Any, batch: Any, has_aux: bool) -> Program:
    """The program for one sequence of the batch."""
    programs = []

    def trace_it(params: Any, sequence: Any) -> Array:
        programs.append(trace(logprob_fn, params, sequence, has_aux))
        return jnp.zeros(())

    def first(params: Any, batch: Any) -> Array:
        microbatch = jax.tree.map(lambda x: x[0], batch)
        return jax.vmap(trace_it, (None, 0))(without_batch_axes(params, microbatch), microbatch)

    jax.eval_shape(first, params, batch)
    return programs[0]


@dataclasses.dataclass(frozen=True)
class _Leaf:
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
class _Slot:
    """What a node adds to one leaf's total.

    Attributes:
      leaf: its number.
      layers: (scans around the node..., layers), which layers of the total the node sees in which
        iteration; None if the total goes whole to several nodes, whose parts are summed.
      assembly: of the factors of these layers.
      view: how the layers that the node sees are read in the layout of the scores.
    """

    leaf: int
    layers: np.ndarray | None
    assembly: Assembly
    view: View

    def of_total(self, total: Array) -> Array:
        """The layers of a total, (scans..., *layers, d_in, d_out), one for each iteration."""
        if self.layers is None:
            return total
        shape = (*self.layers.shape[:-1], *self.assembly.layer_shape, *self.assembly.matrix_shape)
        layers = total.reshape(-1, *self.assembly.matrix_shape)
        is_whole = np.array_equal(self.layers.ravel(), np.arange(layers.shape[0]))
        return (layers if is_whole else layers[self.layers.ravel()]).reshape(shape)


class _Plan:
    """How each leaf's gradient is made: which is static, and holds no arrays.

    A leaf is made by nodes, in the backward pass, if each of its layers is used at one node only,
    or if it is not projected and may be summed up; else late, from its scores after the backward
    pass.

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
        param_specs: Sequence[PartitionSpec | None],
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
            _Leaf(a, i, program.view(leaf))
            for leaf, (a, i) in enumerate(zip(accumulates, in_intra, strict=True))
        ]
        self.specs = [
            None if spec is None else spec_within(leaf, of_leaf.view.apply, spec)
            for leaf, of_leaf, spec in zip(arrays, self.leaves, param_specs, strict=True)
        ]
        slots = {leaf: self._slots(leaf) for leaf in program.parts}
        self.late = self._late({leaf for leaf in slots if slots[leaf] is None})
        self.nodes: dict[Path, list[_Slot]] = {}
        for leaf, of_leaf in slots.items():
            if leaf not in self.late:
                for group, slot in of_leaf or ():
                    self.nodes.setdefault(group, []).append(slot)

    def _late(self, leaves: set[int]) -> set[int]:
        """Some leaves, and those that share an input with one of them, and so on."""
        program = self.program
        together = [
            {
                piece.leaf
                for path in members
                for piece in program.uses[path].pieces
                if piece.leaf in program.parts
            }
            for members in program.members.values()
        ]
        while True:
            more = leaves.union(*(group for group in together if group & leaves))
            if more == leaves:
                return leaves
            leaves = more

    def _slots(self, leaf: int) -> list[tuple[Path, _Slot]] | None:
        """The nodes that make a leaf and what each adds; None if it is late."""
        program, parts = self.program, self.program.parts[leaf]
        by_group: list[tuple[Path, Any, list[Placement]]] = []
        for layout, assembly in parts:
            groups: dict[Path, list[Placement]] = {}
            for placement in assembly.placements:
                group = program.first[placement.access.use.path]
                groups.setdefault(group, []).append(placement)
            by_group += [(group, layout, placements) for group, placements in groups.items()]
        if len(parts) == 1:
            slots = [
                (group, _slot(leaf, placements, layout)) for group, layout, placements in by_group
            ]
            seen = [slot.layers.ravel() for _, slot in slots if slot and slot.layers is not None]
            each_once = len(np.unique(np.concatenate([*seen, []]))) == sum(map(len, seen))
            if len(seen) == len(slots) and each_once:
                return [(group, slot) for group, slot in slots if slot]
        is_projected = self.leaves[leaf].accumulates or self.leaves[leaf].intra
        in_scans = any(p.access.use.scans for _, _, placements in by_group for p in placements)
        if is_projected or in_scans:
            return None
        shape = program.shapes[leaf]
        return [
            (
                group,
                _Slot(
                    leaf,
                    None,
                    Assembly(placements, layout.layer_shape, layout.matrix_shape),
                    layout.view(shape),
                ),
            )
            for group, layout, placements in by_group
        ]

    def spread(self, totals: Sequence[Array]) -> list[Array]:
        """The totals, spread over Auto axes like the parameters."""
        return [spread(total, spec) for total, spec in zip(totals, self.specs, strict=True)]

    def zeros(self, leaves: Sequence[Array], dtype: DTypeLike) -> list[Array]:
        """The totals at the start, spread like the parameters."""

        def in_layout(leaf: Array, view: View) -> Array:
            zeros = functools.partial(jnp.zeros_like, dtype=dtype)
            spec = spec_within(leaf, view.apply) or PartitionSpec()
            return automatic(lambda leaf: view.apply(zeros(leaf)), spec, leaf)

        return self.spread(
            [in_layout(leaf, spec.view) for spec, leaf in zip(self.leaves, leaves, strict=True)]
        )

    def numbers(self, m: Array, k: int, step: Array, batch_size: int) -> core.Microbatch:
        """Those of microbatch m of k, of `batch_size` sequences, in an optimizer step."""
        numbers = core.Microbatch()
        if self.accumulation:
            removes = self.accumulation.removes(m, k, step)
            numbers = numbers._replace(
                removes=removes, accumulation=self.accumulation.at_step(step)
            )
        if self.intra:
            chosen = [
                (self.paths[leaf], batch_size * part.num_tokens, *part.matrix_shape)
                for leaf, parts in self.program.parts.items()
                for _, part in parts
                if self.leaves[leaf].intra
            ]
            self.intra.warn_of_whole_gradients(chosen)
            taken = step * k + m
            numbers = numbers._replace(
                intra=jnp.asarray(at_step(self.intra.shrinkage, taken)),
                starts=self._starts(taken, batch_size),
            )
        return numbers

    def _starts(self, taken: Array, batch_size: int) -> Starts:
        """Those of a microbatch's bases."""
        assert self.intra is not None
        slots = [slot for of_node in self.nodes.values() for slot in of_node]
        found = [(slot.leaf, slot.assembly) for slot in slots]
        found += [(leaf, part) for leaf in self.late for _, part in self.program.parts[leaf]]
        shapes = [
            (self.intra.rank_in(batch_size * part.num_tokens, *part.matrix_shape), dimension)
            for leaf, part in found
            if self.leaves[leaf].intra
            for dimension in part.matrix_shape
        ]
        key = jax.random.fold_in(prng_key(self.intra.key), taken)
        return random_starts(key, shapes)

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
        for_each_sequence = functools.partial(_for_each, coefficients)
        dense = {i: for_each_sequence(whole[i]) for i in program.dense}
        late_groups = [group for group in program.members if group not in self.nodes]
        late = jax.tree.map(for_each_sequence, program.probes(late_groups))
        nodes: dict[Path, list[tuple[Array, Array | None]]] = {}
        specs: dict[Path, list[PartitionSpec | None]] = {}
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

        with differentiating(), _mapping():
            (dense, late, nodes), outputs = jax.grad(value, has_aux=True)((dense, late, nodes))
        parts, norms = automatic(
            self._collect,
            ([spec_of(total) for total in totals], PartitionSpec()),
            dense,
            late,
            nodes,
            totals,
            coefficients,
            numbers,
        )
        return parts, outputs, norms

    def _seen_by_node(
        self, slot: _Slot, total: Array
    ) -> tuple[Array, Array | None, PartitionSpec | None]:
        """What a node gets of a total, the place of its norms, and how it is spread over Auto axes.

        The first two have an axis for each scan around the node.
        """
        if slot.layers is None:
            return total, None, None
        scans = slot.layers.shape[:-1]
        layers = automatic(
            slot.of_total, spec_within(total, slot.of_total) or PartitionSpec(), total
        )
        known = self.specs[slot.leaf]
        spec = None if known is None else spec_within(total, slot.of_total, known)
        in_node = None if spec is None else PartitionSpec(*spec[len(scans) :])
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
        made: dict[int, list[tuple[_Slot, Array]]] = {}
        for group, slots in self.nodes.items():
            for slot, (part, of_part) in zip(slots, nodes[group], strict=True):
                made.setdefault(slot.leaf, []).append((slot, part))
                if of_part is not None:
                    norms.append(of_part.reshape(-1, 3))
        parts = {leaf: _together(of_leaf, totals[leaf]) for leaf, of_leaf in made.items()}
        norms += [
            jnp.stack([core.norm(None), core.norm(None), core.norm(parts[leaf])])[None]
            for leaf in made
            if made[leaf][0][0].layers is None
        ]
        waiting: dict[int, ScoreLeaf] = {
            i: jax.vmap(functools.partial(program.dense_leaf, i))(gradient)
            for i, gradient in dense.items()
        }
        late_leaves = sorted(self.late)
        if late_leaves:
            dtypes = [self.dtypes[i] for i in late_leaves]
            factored = jax.vmap(
                lambda found: program.factored(late_leaves, program.reports(found), dtypes)
            )(late)
            waiting |= zip(late_leaves, factored, strict=True)
        kinds = [self.leaves[i].accumulates for i in waiting]
        stacked = stacked_vectors(list(waiting.values()), kinds)
        groups = [[list(waiting)[position] for position in positions] for positions, _ in stacked]
        found = self._parts(
            [alike[0] for alike in groups],
            [
                jnp.stack([totals[i] for i in alike]) if len(alike) > 1 else totals[alike[0]]
                for alike in groups
            ],
            [scores for _, scores in stacked],
            coefficients,
            numbers,
        )
        for alike, (added, of_alike) in zip(groups, found, strict=True):
            norms.append(of_alike[None])
            parts |= zip(alike, added if len(alike) > 1 else [added], strict=True)
        in_order = [parts[i].astype(total.dtype) for i, total in enumerate(totals)]
        return in_order, layer_norms(jnp.concatenate(norms).T, 1)

    def _visit(
        self,
        specs: dict[Path, list[PartitionSpec | None]],
        coefficient: Array,
        numbers: core.Microbatch,
        group: Path,
        data: Array,
        extra: dict[Path, Any],
    ) -> tuple[Array, dict[Path, Any]]:
        """Puts a node where a group of uses is met, unless their leaves are late."""
        program = self.program
        data = _own(jnp.asarray(data), coefficient)
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
            spread_like = jax.tree.map(spec_of, totals)
            parts = automatic(of_all, spread_like, data, coefficients, totals, *rest)
            return varying_like(parts, coefficients)

        fixed = jax.lax.stop_gradient(data)
        probes = _node(fold, like)(fixed, coefficient, extra[group], numbers)
        return data, {path: (None, probe) for path, probe in zip(members, probes, strict=True)}

    def _fold(
        self,
        slots: Sequence[_Slot],
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
        groups: dict[Any, int] = {}
        scores: list[ScoreLeaf] = []
        for assembly, layout, (read, grads, in_loss) in zip(
            assemblies, layouts, factors, strict=True
        ):
            num_layer_axes = len(assembly.layer_shape)
            if assembly.is_lookup:
                rows = assembly.matrix_shape[0]
                scores.append(LookupFactors(read, grads, rows, num_layer_axes))
            else:
                group = groups.setdefault(assembly.inputs_key, len(groups))
                made = LayerFactors(read, grads, num_layer_axes, in_loss=in_loss, input_group=group)
                scores.append(made if layout is None else SpreadScores(made, None, layout))
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


def _node(
    fold: Callable[..., Any], like: Sequence[tuple[Any, Sequence[int]]]
) -> Callable[[Array, Array, Any, core.Microbatch], list[Array]]:
    """A function of one sequence that makes probes, whose gradients it sees for all sequences.

    Args:
      fold: (data, coefficients, slots, numbers, gradients of the probes), with data, coefficients
        and gradients of all sequences, to the gradient of `slots`.
      like: for each probe the variable that it is shaped like for one sequence, and the lengths of
        scans, which are further axes in front.

    Returns:
      (data, coefficient, slots, numbers) to the probes, zeros.
    """

    def zeros(data: Array, coefficient: Array, slots: Any, numbers: core.Microbatch) -> list[Array]:
        del slots, numbers
        probes = [_jaxpr.zeros(variable, lengths) for variable, lengths in like]
        return varying_like(probes, (data, coefficient))

    @jax.custom_vjp
    def of_all(
        data: Array, coefficients: Array, slots: Any, numbers: core.Microbatch
    ) -> list[Array]:
        probes = zeros(data, coefficients, slots, numbers)
        return [_for_each(coefficients, probe) for probe in probes]

    def forward(*arguments: Any) -> Any:
        return of_all(*arguments), arguments

    def backward(arguments: Any, output_grads: list[Array]) -> tuple[None, None, Any, None]:
        return None, None, fold(*arguments, output_grads), None

    of_all.defvjp(forward, backward)
    of_one = jax.custom_batching.custom_vmap(zeros)

    @of_one.def_vmap
    def _(axis_size: int, in_batched: Any, *arguments: Any) -> tuple[list[Array], list[bool]]:
        del axis_size, in_batched
        return of_all(*arguments), [True] * len(like)

    return of_one


def _for_each(coefficients: Array, x: Array) -> Array:
    """(b, *x.shape): x for each sequence; `where` lends it the sharding of the coefficients."""

    def of_one(coefficient: Array, x: Array) -> Array:
        return jnp.where(coefficient == coefficient, x, x)

    return jax.vmap(of_one, (0, None))(coefficients, x)


@jax.custom_batching.custom_vmap
def _own(data: Array, coefficient: Array) -> Array:
    """A sequence's own data: each has a gradient of its own, even if the data are common to all."""
    del coefficient
    return data


@_own.def_vmap
def _(axis_size: int, in_batched: Any, data: Array, coefficients: Array) -> tuple[Array, bool]:
    del axis_size
    return data if in_batched[0] else _for_each(coefficients, data), True


def _slot(leaf: int, placements: Sequence[Placement], layout: LeafLayout) -> _Slot | None:
    """The layers of a leaf that a node sees, None if they differ from iteration to iteration."""
    depth = placements[0].access.use.num_source_scans
    of_each = []
    for placement in placements:
        if placement.entry_scans[:depth] != tuple(range(depth)):
            return None
        of_each.append(placement.layers.reshape(*placement.access.use.scans[:depth], -1))
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
    return _Slot(leaf, (first + moved).reshape(*seen.shape[:-1], -1), assembly, View())


def _in_node(placement: Placement, layout: LeafLayout, depth: int, layers: np.ndarray) -> Placement:
    """A placement as it is inside of the outermost scans, in an order of the layers there."""
    access = placement.access
    sources = tuple(s._replace(num_scans=s.num_scans - depth) for s in access.use.sources)
    use = dataclasses.replace(access.use, scans=access.use.scans[depth:], sources=sources)
    piece = dataclasses.replace(access.piece, offsets=access.piece.offsets[(0,) * depth])
    inside = place(dataclasses.replace(access, use=use, piece=piece), layout)
    numbers = np.where(inside.layers == ABSENT, ABSENT, np.searchsorted(layers, inside.layers))
    return dataclasses.replace(inside, layers=numbers)


def _together(of_nodes: Sequence[tuple[_Slot, Array]], total: Array) -> Array:
    """What all nodes add to one leaf's total."""
    slots, parts = zip(*of_nodes, strict=True)
    if slots[0].layers is None:
        return functools.reduce(jnp.add, parts)
    layers = [part.reshape(-1, *total.shape[-2:]) for part in parts]
    joined = layers[0] if len(layers) == 1 else jnp.concatenate(layers)
    num_layers = math.prod(total.shape[:-2])
    place_of = np.full(num_layers, len(joined))
    place_of[np.concatenate([slot.layers.ravel() for slot in slots])] = np.arange(len(joined))
    if len(joined) < num_layers:
        joined = jnp.concatenate([joined, jnp.zeros_like(joined[:1])])
    in_order = np.array_equal(place_of, np.arange(num_layers))
    return (joined if in_order else joined[place_of]).reshape(total.shape)
