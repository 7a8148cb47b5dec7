"""PROMA inside the backward pass: `accumulated_gradient`, for large, scanned or remat models.

`accumulate` and `project_intra` take scores, which exist for all layers at once. Here the backward
pass of each layer, where the scores of that layer are at hand, projects and accumulates, so that no
score outlives its layer. The result is that of the two transformations up to rounding. It is the
gradient of one optimizer step, from all its microbatches, and any optax chain may follow.

The taps of `capture` make it possible: where the first matmul with some input is met, a node is put
into the program that hands each matmul with this input a probe of zeros. In the backward pass the
node gets the output gradients of these matmuls as the probes' gradients, together, and returns what
the microbatch adds to each kernel's accumulated gradient G as the "gradient" of G. A node is mapped
over the microbatch's sequences by a `custom_vmap`, so that it sees them all.

Example:
  >>> import jax, jax.numpy as jnp, optax
  >>> import proma_jax as proma
  >>> def logprob_fn(params, x):
  ...     return jnp.sum(jax.nn.log_softmax(jnp.tanh(x @ params["w1"]) @ params["w2"])[:, 0])
  >>> params = {"w1": jnp.ones((8, 16)) / 8, "w2": jnp.ones((16, 4)) / 16}
  >>> batch = jax.random.normal(jax.random.key(0), (3, 4, 5, 8))     # k=3 microbatches of b=4
  >>> coefficients = jax.random.normal(jax.random.key(1), (3, 4))    # −advantage / tokens
  >>> gradient_fn = proma.accumulated_gradient(logprob_fn, accumulation=proma.Accumulation())
  >>> grads, metrics = jax.jit(gradient_fn)(params, batch, coefficients)
  >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  >>> updates, state = tx.update(grads, tx.init(params), params)
  >>> metrics.logprobs.shape, metrics.accumulation_fraction.shape
  ((3, 4), (3,))
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from proma_jax import _jaxpr, _options, capture
from proma_jax._mesh import (
    Layout,
    automatic,
    axis_names,
    layout_of,
    spec_of,
    spec_within,
    specs_of_leaves,
    spread,
    varying_like,
    without_batch_axes,
)
from proma_jax.accumulation import Accumulation
from proma_jax.capture import Path, Program, Use
from proma_jax.intra import Intra, Start
from proma_jax.projection import (
    UnitProducts,
    layer_norms,
    removal,
    removed_part,
    unit_products,
)
from proma_jax.scores import (
    LayerFactors,
    LookupFactors,
    ScoreLeaf,
    SumScores,
    View,
    divide,
    stack_vectors,
    wide,
    wide_dtype,
)

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
      `gradient_fn(params, batch, coefficients, step=0) -> (grads, GradientMetrics)`. `batch` is a
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
    capture.check_function(logprob_fn)

    def gradient_fn(
        params: Any, batch: Any, coefficients: Array, step: ArrayLike = 0
    ) -> tuple[Any, GradientMetrics]:
        coefficients, step = jnp.asarray(coefficients), jnp.asarray(step, jnp.int32)
        if step.ndim:
            raise ValueError(f"step has shape {step.shape}, but must be one number.")
        capture.check_parameters(params)
        _check_batch(batch, coefficients)
        params = varying_like(jax.tree.map(jnp.asarray, params), (batch, coefficients))
        specs = specs_of_leaves(param_specs, params)
        program = _trace_one(logprob_fn, params, batch, has_aux)
        plan = _Plan(program, params, accumulation, intra, spmd_axis_name, specs)
        k = coefficients.shape[0]

        def add_microbatch(
            carry: tuple[list[Array], Array], inputs: tuple[Array, Any, Array]
        ) -> tuple[tuple[list[Array], Array], GradientMetrics]:
            (totals, length), (m, microbatch, weights) = carry, inputs
            numbers = plan.numbers(m, k, step, weights.size)
            parts, outputs, norms = plan.microbatch(totals, microbatch, weights, numbers)
            removed, removed_intra, own = norms
            logprobs, aux = outputs if has_aux else (outputs, None)
            metrics = GradientMetrics(
                logprobs, divide(removed, length), divide(removed_intra, own), aux
            )
            totals = plan.spread([t + part for t, part in zip(totals, parts, strict=True)])
            return (totals, _options.norm(totals)), metrics

        leaves, treedef = jax.tree.flatten(params)

        def finish(totals: list[Array]) -> list[Array]:
            return [
                spec.view.invert(total).astype(leaf.dtype)
                for spec, total, leaf in zip(plan.leaves, totals, leaves, strict=True)
            ]

        zeros = plan.zeros(accumulator_dtype)
        start = zeros, _options.norm(zeros)
        (totals, _), metrics = jax.lax.scan(
            add_microbatch, start, (jnp.arange(k), batch, coefficients)
        )
        grads = automatic(finish, [spec_of(leaf) for leaf in leaves], totals)
        grads = [spread(gradient, spec) for gradient, spec in zip(grads, specs, strict=True)]
        return jax.tree.unflatten(treedef, grads), metrics

    return gradient_fn


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

    def trace(params: Any, sequence: Any) -> Array:
        programs.append(capture.trace(logprob_fn, params, sequence, has_aux))
        return jnp.zeros(())

    def first(params: Any, batch: Any) -> Array:
        microbatch = jax.tree.map(lambda x: x[0], batch)
        return jax.vmap(trace, (None, 0))(without_batch_axes(params, microbatch), microbatch)

    jax.eval_shape(first, params, batch)
    return programs[0]


class _Numbers(NamedTuple):
    """The numbers of one microbatch.

    Attributes:
      removes: () bool, whether the accumulation variant removes anything.
      accumulation: arguments of `removed_part`.
      shrinkage: of the intra variant.
      starts: of the bases, by rank and dimension.
    """

    removes: Array
    accumulation: dict[str, Any]
    shrinkage: ArrayLike
    starts: dict[str, Array]


class _Place(NamedTuple):
    """What a node returns for a leaf beside its part.

    Attributes:
      norms: (*scans, 3), as in `_parts`.
      of_inputs: directions (*layers, r, d_in), of the first leaf with these inputs that waits.
      of_grads: directions (*layers, r, d_out), of a leaf that waits.
    """

    norms: Array
    of_inputs: Array | None = None
    of_grads: Array | None = None


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """What is done with one parameter leaf.

    Attributes:
      accumulates: whether the accumulation variant projects it.
      intra: whether the intra variant does.
      where: "node", in the backward pass of its only use; "sum", at each of several uses, whose
        parts are summed (if it is not projected); "late", from its scores after the backward pass.
      view: how the leaf is read in the layout of its total, which is that of its scores.
    """

    accumulates: bool
    intra: bool
    where: str
    view: View

    @property
    def waits(self) -> bool:
        """Whether its node only finds the directions for intra, which then waits for all layers.

        So all bases are made at once. Accumulation, inside the node, needs intra's result.
        """
        return self.intra and not self.accumulates and self.where == "node"


class _Plan:
    """How each leaf's gradient is made.

    Attributes:
      leaves: for each parameter leaf.
      specs: for each, how its total is spread over Auto axes, None if that is not known.
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
        self.params, self.spmd_axis_name = params, spmd_axis_name
        self.dtypes = [leaf.dtype for leaf in jax.tree.leaves(params)]
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
        kinds = [(path, program.kind(i)) for i, path in enumerate(paths)]
        accumulates, in_intra = (
            settings.projects(kinds, params) if settings else [False] * len(kinds)
            for settings in (accumulation, intra)
        )
        where = self._where([a or i for a, i in zip(accumulates, in_intra, strict=True)])
        self.leaves = [
            _Leaf(a, i, where[leaf], program.view(leaf))
            for leaf, (a, i) in enumerate(zip(accumulates, in_intra, strict=True))
        ]
        self.specs = [
            None if spec is None else spec_within(leaf, of_leaf.view.apply, spec)
            for leaf, of_leaf, spec in zip(
                jax.tree.leaves(params), self.leaves, param_specs, strict=True
            )
        ]

    def spread(self, totals: Sequence[Array]) -> list[Array]:
        """The totals, spread over Auto axes like the parameters."""
        return [spread(total, spec) for total, spec in zip(totals, self.specs, strict=True)]

    def zeros(self, dtype: DTypeLike) -> list[Array]:
        """The totals at the start, spread like the parameters."""

        def in_layout(leaf: Array, view: View) -> Array:
            zeros = functools.partial(jnp.zeros_like, dtype=dtype)
            spec = spec_within(leaf, view.apply) or PartitionSpec()
            return automatic(lambda leaf: view.apply(zeros(leaf)), spec, leaf)

        leaves = jax.tree.leaves(self.params)
        return self.spread(
            [in_layout(leaf, spec.view) for spec, leaf in zip(self.leaves, leaves, strict=True)]
        )

    def _where(self, is_projected: list[bool]) -> list[str]:
        program = self.program

        def alone(leaf: int) -> str:
            uses = [program.taps[path] for path in program.paths(leaf)]
            scans = [is_layer for use in uses for _, is_layer in use.scans]
            if len(uses) == 1 and all(scans):
                return "node"
            return "sum" if uses and not is_projected[leaf] and not any(scans) else "late"

        where = [alone(leaf) for leaf in range(len(is_projected))]
        while True:
            late = [
                program.taps[path].leaf
                for members in program.members.values()
                if any(where[program.taps[path].leaf] == "late" for path in members)
                for path in members
            ]
            if all(where[leaf] == "late" for leaf in late):
                return where
            for leaf in late:
                where[leaf] = "late"

    def numbers(self, m: Array, k: int, step: Array, batch_size: int) -> _Numbers:
        """Those of microbatch m of k, of `batch_size` sequences, in an optimizer step."""
        removes, accumulation = jnp.asarray(False), {}
        if self.accumulation:
            removes = self.accumulation.removes(m, k, step)
            accumulation = self.accumulation.at_step(step)
        shrinkage: ArrayLike = 0.0
        starts = {}
        if self.intra:
            taken = step * k + m
            shrinkage = _options.at_step(self.intra.shrinkage, taken)
            start = self.intra.start(jax.random.key(self.intra.seed), taken)
            for leaf, spec in enumerate(self.leaves):
                if spec.intra:
                    rank, d_in, d_out = self._sizes(leaf, batch_size)
                    _, inputs, _ = self.program.factor_shapes[leaf]
                    for d in d_in, d_out:
                        starts[_name(rank, d)] = start(rank, d, inputs.dtype)
        return _Numbers(removes, accumulation, shrinkage, starts)

    def _sizes(self, leaf: int, batch_size: int) -> tuple[int, int, int]:
        """Rank of the intra variant, d_in and d_out of a leaf."""
        assert self.intra is not None
        tokens, inputs, output_grads = self.program.factor_shapes[leaf]
        d_in, d_out = inputs.shape[-1], output_grads.shape[-1]
        return self.intra.rank_in(batch_size * tokens, d_in, d_out), d_in, d_out

    def _place(self, path: Path, batch_size: int) -> _Place:
        """Zeros in whose place a node returns more than its leaf's part."""
        use = self.program.taps[path]
        places = _Place(jnp.zeros((*(length for length, _ in use.scans), 3), jnp.float32))
        if not self.leaves[use.leaf].waits:
            return places
        rank, d_in, d_out = self._sizes(use.leaf, batch_size)
        _, _, grads = self.program.factor_shapes[use.leaf]
        dtype, layers = wide_dtype(grads.dtype), grads.shape[:-2]
        if self._owner(path, batch_size) == path:
            places = places._replace(of_inputs=jnp.zeros((*layers, rank, d_in), dtype))
        return places._replace(of_grads=jnp.zeros((*layers, rank, d_out), dtype))

    def _owner(self, path: Path, batch_size: int) -> Path:
        """The first of the waiting taps that share the directions of their inputs."""
        program = self.program
        use, rank = program.taps[path], self._sizes(program.taps[path].leaf, batch_size)[0]
        return next(
            other
            for other in program.members[program.reporter[path]]
            if self.leaves[program.taps[other].leaf].waits
            and program.taps[other].reads_like(use)
            and self._sizes(program.taps[other].leaf, batch_size)[0] == rank
        )

    def microbatch(
        self,
        totals: list[Array],
        microbatch: Any,
        coefficients: Array,
        numbers: _Numbers,
    ) -> tuple[list[Array], Any, Array]:
        """What a microbatch adds to each total, the outputs, and the norms of `_parts`."""
        program, b = self.program, coefficients.shape[0]
        leaves, whole_totals = without_batch_axes(
            (jax.tree.leaves(self.params), totals), coefficients
        )

        for_each_sequence = functools.partial(_for_each, coefficients)
        dense = {i: for_each_sequence(leaves[i]) for i in program.dense}
        late, nodes = {}, {}
        for path, use in program.taps.items():
            match self.leaves[use.leaf].where:
                case "late":
                    probes = use.probes(program.reporter[path] == path)
                    late[path] = jax.tree.map(for_each_sequence, probes)
                case "node":
                    place = varying_like(self._place(path, b), coefficients)
                    nodes[path] = whole_totals[use.leaf], place
        sums = {i: whole_totals[i] for i, spec in enumerate(self.leaves) if spec.where == "sum"}

        def per_sequence(
            differentiated: tuple[Any, ...], numbers: _Numbers, coefficient: Array, sequence: Any
        ) -> tuple[Array, Any]:
            dense, late, nodes, sums = differentiated
            values = [dense.get(i, leaf) for i, leaf in enumerate(leaves)]
            visit = functools.partial(self._visit, sums, coefficient, numbers)
            return program.run([*values, *jax.tree.leaves(sequence)], late | nodes, visit)

        def value(differentiated: tuple[Any, ...]) -> tuple[Array, Any]:
            axes = ((0, 0, None, None), None, 0, 0)
            logprobs, outputs = jax.vmap(per_sequence, axes, spmd_axis_name=self.spmd_axis_name)(
                differentiated, numbers, coefficients, microbatch
            )
            return jnp.sum(logprobs), outputs

        with capture.differentiating():
            (dense, late, nodes, sums), outputs = jax.grad(value, has_aux=True)(
                (dense, late, nodes, sums)
            )
        parts, norms = automatic(
            self._collect,
            ([spec_of(total) for total in totals], PartitionSpec()),
            dense,
            late,
            nodes,
            sums,
            totals,
            coefficients,
            numbers,
        )
        return parts, outputs, norms

    def _collect(
        self,
        dense: dict[int, Array],
        late: dict[Path, Any],
        nodes: dict[Path, tuple[Array, _Place]],
        sums: dict[int, Array],
        totals: list[Array],
        coefficients: Array,
        numbers: _Numbers,
    ) -> tuple[list[Array], Array]:
        """The parts of all leaves and the norms of `_parts`, from what the backward pass made."""
        program, b = self.program, coefficients.shape[0]
        parts: list[Any] = [None] * len(totals)
        norms = [jnp.zeros((1, 3), jnp.float32)]
        waiting: dict[int, ScoreLeaf] = {}
        for i, spec in enumerate(self.leaves):
            if spec.where == "node":
                parts[i], place = nodes[program.paths(i)[0]]
                norms.append(place.norms.reshape(-1, 3))
            elif spec.where == "sum":
                parts[i] = sums[i]
                norms.append(_three(own=sums[i])[None])
            elif i in dense:
                waiting[i] = jax.vmap(functools.partial(program.dense_leaf, i))(dense[i])
            else:
                of_leaf = functools.partial(program.leaf, i, dtype=self.dtypes[i])
                waiting[i] = jax.vmap(of_leaf)(late)
        for accumulates in (True, False):
            numbered = [i for i in waiting if self.leaves[i].accumulates == accumulates]
            groups = stack_vectors(
                [_in_layout(waiting[i]) for i in numbered], [totals[i] for i in numbered]
            )
            found = self._parts(
                [self.leaves[numbered[group[0]]] for group, _, _ in groups],
                [total for _, _, total in groups],
                [scores for _, scores, _ in groups],
                coefficients,
                numbers,
            )
            for (group, _, _), (part, of_part) in zip(groups, found, strict=True):
                norms.append(of_part[None])
                for i, one in zip(group, part if len(group) > 1 else [part], strict=True):
                    parts[numbered[i]] = one
        directions: dict[int, Any] = {
            i: (nodes[self._owner(path, b)][1].of_inputs, nodes[path][1].of_grads)
            for i, spec in enumerate(self.leaves)
            if spec.waits
            for path in program.paths(i)
        }
        if self.intra and directions:
            in_common = self.intra.common_parts(
                [parts[i] for i in directions], list(directions.values())
            )
            for i, part in zip(directions, in_common, strict=True):
                common = jnp.asarray(numbers.shrinkage * part)
                norms.append(_three(intra=common, own=parts[i])[None])
                parts[i] = parts[i] - common
        parts = [part.astype(total.dtype) for part, total in zip(parts, totals, strict=True)]
        return parts, layer_norms(jnp.concatenate(norms).T, 1)

    def _visit(
        self,
        sums: dict[int, Array],
        coefficient: Array,
        numbers: _Numbers,
        first: Path,
        data: Array,
        extra: dict[Path, Any],
    ) -> tuple[Array, dict[Path, Any]]:
        """Puts a node where a group of taps is met, unless their leaves are late."""
        data = _own(jnp.asarray(data), coefficient)
        members = self.program.members[first]
        leaves = [self.program.taps[path].leaf for path in members]
        if self.leaves[leaves[0]].where == "late":
            return self.program.reported(first, data, extra)
        slots = [
            extra[path] if self.leaves[leaf].where == "node" else (sums[leaf], None)
            for path, leaf in zip(members, leaves, strict=True)
        ]
        uses = [self.program.taps[path] for path in members]

        def fold(data: Array, coefficients: Array, slots: Any, *rest: Any) -> Any:
            layouts = [
                self._layout(use, total, coefficients) if place else None
                for use, (total, place) in zip(uses, slots, strict=True)
            ]
            specs = jax.tree.map(spec_of, slots)
            of_all = functools.partial(self._fold, uses, layouts)
            parts = automatic(of_all, specs, data, coefficients, slots, *rest)
            return varying_like(parts, coefficients)

        like = [use.eqn.outvars[0] for use in uses]
        fixed = jax.lax.stop_gradient(data)
        probes = _node(fold, like)(fixed, coefficient, slots, numbers)
        return data, {path: (None, probe) for path, probe in zip(members, probes, strict=True)}

    def _layout(self, use: Use, total: Array, coefficients: Array) -> Layout | None:
        """How the scores of a node's leaf are best spread over a mesh."""
        num_layer_axes = use.num_layer_axes - use.num_stacks
        axes, of_all = axis_names(self.spmd_axis_name), self.specs[use.leaf]
        spec = None if of_all is None else PartitionSpec(*of_all[use.num_stacks :])
        return layout_of(total, coefficients, lambda total: total, num_layer_axes, axes, spec)

    def _fold(
        self,
        uses: Sequence[Use],
        layouts: Sequence[Layout | None],
        data: Array,
        coefficients: Array,
        slots: Sequence[tuple[Array, _Place | None]],
        numbers: _Numbers,
        output_grads: Sequence[Array],
    ) -> list[tuple[Array, _Place | None]]:
        """What a microbatch adds to the totals of matmuls or of a lookup with the same operand.

        Args:
          uses: the matmuls, or the lookup.
          layouts: of the scores of each.
          data: (b, ...), their common operand.
          coefficients: (b,).
          slots: of each, its total and the norms' place, or a total's shape and None.
          numbers: of the microbatch.
          output_grads: of each, (b, ...).

        Returns:
          Of each, the part to add and what is in its place, in the types of `slots`.
        """
        arranged = [
            jax.vmap(dataclasses.replace(use, scans=()).factors)(data, grads)
            for use, grads in zip(uses, output_grads, strict=True)
        ]
        scores: list[ScoreLeaf] = []
        read: dict[int, tuple[Array, Array]] = {}
        for use, layout, (operand, grads) in zip(uses, layouts, arranged, strict=True):
            num_layer_axes = use.num_layer_axes - use.num_stacks
            if isinstance(use.operation, _jaxpr.Lookup):
                rows = use.operation.num_embeddings
                scores.append(LookupFactors(operand, grads, rows, num_layer_axes))
            else:
                alike = [i for i, other in enumerate(uses) if other.reads_like(use)]
                if alike[0] not in read:
                    in_loss = capture.any_nonzero([arranged[i][1] for i in alike])
                    read[alike[0]] = operand, in_loss
                inputs, in_loss = read[alike[0]]
                factors = LayerFactors(
                    inputs, grads, num_layer_axes, in_loss=in_loss, layout=layout
                )
                scores.append(factors)
        specs = [self.leaves[use.leaf] for use in uses]
        totals = [total for total, _ in slots]
        parts = self._parts(specs, totals, scores, coefficients, numbers)
        waiting = {
            i: leaf
            for i, leaf in enumerate(scores)
            if specs[i].waits and isinstance(leaf, LayerFactors)
        }
        directions: dict[int, tuple[Array, Array]] = {}
        if self.intra and waiting:
            found = self.intra.directions(list(waiting.values()), _start(numbers))
            directions = dict(zip(waiting, found, strict=True))
        results: list[tuple[Array, _Place | None]] = []
        for i, (use, spec, (total, place), (part, norms)) in enumerate(
            zip(uses, specs, slots, parts, strict=True)
        ):
            if place is None:
                part = spec.view.apply(use.view.invert(part))
                results.append((part.astype(total.dtype), None))
                continue
            of_inputs, of_grads = directions.get(i, (None, None))
            of_inputs = None if place.of_inputs is None else of_inputs
            results.append((part.astype(total.dtype), _Place(norms, of_inputs, of_grads)))
        return results

    def _parts(
        self,
        specs: Sequence[_Leaf],
        totals: Sequence[Array],
        scores: Sequence[ScoreLeaf],
        coefficients: Array,
        numbers: _Numbers,
    ) -> list[tuple[Array, Array]]:
        """What a microbatch adds to the totals of some leaves, all in the layout of the scores.

        Args:
          specs: what is done with each leaf.
          totals: the accumulated gradients G.
          scores: of the microbatch.
          coefficients: (b,).
          numbers: of the microbatch.

        Returns:
          For each leaf the part, and the norms (3,) of what was removed by accumulation and by
          intra, and of the microbatch's own gradient (only where intra is used).
        """
        totals = [wide(total) for total in totals]
        by_ridge = self.accumulation is not None and self.accumulation.solver == "ridge"
        ridged = [i for i, spec in enumerate(specs) if spec.accumulates and by_ridge]
        forms = [scores[i].compact() if i in ridged else scores[i] for i in range(len(specs))]
        own = {
            i: form.weighted_sum(coefficients)
            for i, form in enumerate(forms)
            if self.intra or i not in ridged
        }
        common: dict[int, Array] = {}
        if self.intra:
            factors = {
                i: leaf
                for i, leaf in enumerate(scores)
                if specs[i].intra and not specs[i].waits and isinstance(leaf, LayerFactors)
            }
            directions = self.intra.directions(list(factors.values()), _start(numbers))
            parts = self.intra.common_parts([own[i] for i in factors], directions)
            common = {
                i: jnp.asarray(numbers.shrinkage * part)
                for i, part in zip(factors, parts, strict=True)
            }
        gradients = {i: g - common[i] if i in common else g for i, g in own.items()}
        removed = self._removed(specs, totals, forms, gradients, coefficients, numbers)
        results = []
        for i, form in enumerate(forms):
            taken, length = removed.get(i, (jnp.zeros(()), None))
            if i in ridged:
                part = form.weighted_sum(coefficients - taken)
                part = part - common[i] if i in common else part
            else:
                part = gradients[i] - taken
            own_gradient = own.get(i) if self.intra and not specs[i].waits else None
            norms = _three(common.get(i), own_gradient)
            results.append((part, norms if length is None else norms.at[0].set(length)))
        return results

    def _removed(
        self,
        specs: Sequence[_Leaf],
        totals: Sequence[Array],
        scores: Sequence[ScoreLeaf],
        gradients: dict[int, Array],
        coefficients: Array,
        numbers: _Numbers,
    ) -> dict[int, tuple[Array, Array]]:
        """What accumulation removes from each leaf that it projects, and its norm.

        With the solver "ridge" as weights (*layers, b) of the scores, from one solve for all
        leaves; with the others as arrays. `gradients` are needed by these, and where they are not
        the weighted sums of the scores.
        """
        settings = self.accumulation
        chosen = [i for i, spec in enumerate(specs) if spec.accumulates]
        if settings is None or not chosen:
            return {}

        def one_by_one() -> dict[int, tuple[Array, Array]]:
            removed = {}
            for i in chosen:
                part = removed_part(
                    totals[i],
                    gradients[i],
                    scores[i],
                    solver=settings.solver,
                    rtol=settings.rtol,
                    **numbers.accumulation,
                )
                removed[i] = part.astype(totals[i].dtype), _norm_of(part)
            return removed

        def together() -> dict[int, tuple[Array, Array]]:
            products, own_lengths = [], []
            for i in chosen:
                found = unit_products(scores[i], totals[i])
                flat = UnitProducts(
                    *(x.reshape(-1, *x.shape[scores[i].num_layer_axes :]) for x in found)
                )
                products.append(flat)
                own_lengths.append(
                    layer_norms(gradients[i], scores[i].num_layer_axes).reshape(-1)
                    if i in gradients
                    else flat.lengths(coefficients * flat.norms)
                )
            of_all = jax.tree.map(lambda *xs: jnp.concatenate(xs), *products)
            weights, lengths = removal(
                of_all, jnp.concatenate(own_lengths) / of_all.size, **numbers.accumulation
            )
            weights, lengths = weights * of_all.size[:, None], lengths * of_all.size
            removed, start = {}, 0
            for i, product in zip(chosen, products, strict=True):
                here = slice(start, start := start + len(product.norms))
                weights_here = weights[here].reshape(weight_shapes[i]).astype(totals[i].dtype)
                removed[i] = weights_here, _norm_of(lengths[here])
            return removed

        weight_shapes = {i: (*scores[i].layer_shape, scores[i].batch_size) for i in chosen}
        remove = together if settings.solver == "ridge" else one_by_one

        def nothing() -> dict[int, tuple[Array, Array]]:
            return jax.tree.map(jnp.zeros_like, jax.eval_shape(remove))

        return jax.lax.cond(numbers.removes, remove, nothing)


def _node(
    fold: Callable[..., Any], like: Sequence[Any]
) -> Callable[[Array, Array, Any, _Numbers], list[Array]]:
    """A function of one sequence that makes probes, whose gradients it sees for all sequences.

    Args:
      fold: (data, coefficients, slots, numbers, gradients of the probes), with data, coefficients
        and gradients of all sequences, to the gradient of `slots`.
      like: variables that the probes for one sequence are shaped like.

    Returns:
      (data, coefficient, slots, numbers) to the probes, zeros.
    """

    def zeros(data: Array, coefficient: Array, slots: Any, numbers: _Numbers) -> list[Array]:
        del slots, numbers
        probes = [_jaxpr.zeros(variable, ()) for variable in like]
        return varying_like(probes, (data, coefficient))

    @jax.custom_vjp
    def of_all(data: Array, coefficients: Array, slots: Any, numbers: _Numbers) -> list[Array]:
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


def _in_layout(scores: ScoreLeaf) -> ScoreLeaf:
    """The scores of a leaf that is already in their layout."""
    whole: Any = scores
    return scores if isinstance(scores, SumScores) else dataclasses.replace(whole, view=View())


def _start(numbers: _Numbers) -> Start:
    return lambda rank, dimension, dtype: numbers.starts[_name(rank, dimension)]


def _name(rank: int, dimension: int) -> str:
    return f"{rank} of {dimension}"


def _norm_of(x: Array) -> Array:
    return layer_norms(x).astype(jnp.float32)


def _three(intra: Array | None = None, own: Array | None = None) -> Array:
    """The norms of `_parts`, of which the first is zero."""
    zero = jnp.zeros((), jnp.float32)
    return jnp.stack([zero, *(zero if x is None else _norm_of(x) for x in (intra, own))])
