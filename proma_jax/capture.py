"""Scores from any JAX function, in one backward pass and without touching the model.

`sequence_scores(logprob_fn)` traces `logprob_fn` of one sequence, finds where each parameter is
used, and evaluates the same program with every parameter matmul and embedding lookup tapped: a tap
takes zero probes, and the backward pass returns the operation's inputs and output gradients as the
probes' gradients. These factors of each sequence's score cost no more than plain backpropagation,
and the parameter's own gradient is never formed.

A parameter is followed through jit, remat and scan (whose scanned axes become layer axes), and
through reshapes, transpositions and casts. Where the trail is lost, the leaf gets its ordinary
per-sequence gradient: a dense score, never a wrong one. `describe_scores` shows what each leaf got
and why; `check_scores` compares with `jax.grad`.

Example:
  >>> import jax, jax.numpy as jnp
  >>> def logprob_fn(params, tokens):
  ...     logits = jnp.tanh(params["table"][tokens[:-1]]) @ params["head"] + params["bias"]
  ...     picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=-1)
  ...     return jnp.sum(picked)
  >>> params = {"table": jnp.ones((7, 4)), "head": jnp.ones((4, 7)), "bias": jnp.zeros(7)}
  >>> microbatch = jnp.array([[1, 2, 3], [3, 4, 6]])
  >>> logprobs, scores = sequence_scores(logprob_fn)(params, microbatch)
  >>> print(describe_scores(logprob_fn, params, microbatch[0]))
  leaf       shape   scores         why
  ['bias']   (7,)    DenseScores    used by add
  ['head']   (4, 7)  LayerFactors   2 tokens, 4 -> 7
  ['table']  (7, 4)  LookupFactors  2 tokens, 7 rows of 4
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core
from jax.sharding import PartitionSpec

from proma_jax import _jaxpr
from proma_jax._mesh import axis_names, specs_of_leaves, varying_like, without_batch_axes
from proma_jax.scores import (
    DenseScores,
    LayerFactors,
    LookupFactors,
    ScoreLeaf,
    SumScores,
    View,
    exchanged,
    weighted_sum,
    with_layout,
)

Array = jax.Array
Path = tuple[int, ...]
"""Where an equation is: its number in the program, in the program inside that equation, ..."""
Visit = Callable[[Path, Array, dict[Path, Any]], tuple[Array, dict[Path, Any]]]
"""See `Program.run`."""


def sequence_scores(
    logprob_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    spmd_axis_name: str | tuple[str, ...] | None = None,
    param_specs: Any = None,
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Makes a function that returns each sequence's log-probability and its scores.

    Args:
      logprob_fn: `logprob_fn(params, sequence) -> scalar`, the log-probability of one sequence,
        summed over its response tokens; any differentiable JAX function. `params` is a pytree of
        floating point arrays; `sequence` is any pytree (random keys for dropout travel in it).
      has_aux: whether `logprob_fn` returns `(scalar, aux)`. Default False, as in `jax.grad`.
      spmd_axis_name: as in `jax.vmap`, which maps `logprob_fn` over the sequences. Default None.
      param_specs: PartitionSpecs of the parameters over a mesh with Auto axes, a prefix of their
        structure; P() means whole on every device, None that it is not known. With it and
        `spmd_axis_name` scores are spread to suit, G and the updates like the parameters, and a
        gradient from `weighted_sum` to suit the transformations: constrain it yourself if it goes
        elsewhere. Explicit axes need neither. Default None: XLA decides.

    Returns:
      `scores_fn(params, microbatch) -> (logprobs, scores)`, or `((logprobs, aux), scores)` with
      `has_aux`. `microbatch` is a pytree shaped like `sequence` with a leading axis b. `logprobs`
      is (b,); `scores` is shaped like `params` with a score leaf for each parameter, such that
      `weighted_sum(scores, c)` is the gradient of Σ_i c_i log π_i. Call it under `jax.jit`.

    Raises:
      ValueError: a parameter is not floating point, the microbatch's leaves disagree on b, or
        `logprob_fn` does not return a floating point scalar. What JAX raises where it cannot be
        differentiated comes with a note that says so.

    Example:
      >>> import jax.numpy as jnp
      >>> scores_fn = sequence_scores(lambda params, x: jnp.sum(jnp.sin(x @ params)))
      >>> logprobs, scores = scores_fn(jnp.ones((3, 2)), jnp.ones((4, 5, 3)))   # b=4, 5 tokens
      >>> logprobs.shape, scores.inputs.shape, scores.output_grads.shape
      ((4,), (4, 5, 3), (4, 5, 2))
    """
    check_function(logprob_fn)

    def per_sequence(params: Any, sequence: Any) -> tuple[Any, Any]:
        program = trace(logprob_fn, params, sequence, has_aux)
        return program.value_and_scores(params, sequence)

    def scores_fn(params: Any, microbatch: Any) -> tuple[Any, Any]:
        check_parameters(params)
        _check_microbatch(microbatch)
        specs = jax.tree.unflatten(jax.tree.structure(params), specs_of_leaves(param_specs, params))
        own = varying_like(without_batch_axes(params, microbatch), microbatch)
        outputs, scores = jax.vmap(per_sequence, (None, 0), spmd_axis_name=spmd_axis_name)(
            own, microbatch
        )
        batch_axes = axis_names(spmd_axis_name)

        def on_mesh(leaf: Any, scores: ScoreLeaf, spec: PartitionSpec | None) -> ScoreLeaf:
            return exchanged(with_layout(scores, jnp.asarray(leaf), batch_axes, spec))

        return outputs, jax.tree.map(on_mesh, params, scores, specs)

    return scores_fn


def describe_scores(
    logprob_fn: Callable[..., Any], params: Any, sequence: Any, *, has_aux: bool = False
) -> str:
    """A table of each parameter leaf, the representation of its scores, and why it has that one.

    Args:
      logprob_fn: as in `sequence_scores`.
      params: parameters, or their `jax.ShapeDtypeStruct`s: nothing is computed.
      sequence: ONE sequence, or its `jax.ShapeDtypeStruct`s.
      has_aux: as in `sequence_scores`.

    Returns:
      The table as text, a line per leaf; see the example at the top of this module.

    Raises:
      ValueError: as `sequence_scores`.
    """
    check_parameters(params)
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    program = trace(logprob_fn, whole, sequence, has_aux)
    rows = [("leaf", "shape", "scores", "why")]
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        name = jax.tree_util.keystr(path) or "(root)"
        rows.append((name, str(jnp.shape(leaf)), *program.describe(index)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def check_scores(
    logprob_fn: Callable[..., Any],
    params: Any,
    microbatch: Any,
    *,
    has_aux: bool = False,
    rtol: float | None = None,
) -> dict[str, float]:
    """Compares scores with `jax.grad`: the first thing to run on a new model.

    Args:
      logprob_fn: as in `sequence_scores`.
      params: the parameters.
      microbatch: pytree of sequences, with a leading axis b.
      has_aux: as in `sequence_scores`.
      rtol: largest admissible error of a leaf. Default: 5e-2 where the model computes anything in
        fewer than 32 bits (`jax.grad` rounds that differently), else 1e-4.

    Returns:
      The error of each leaf, by its path, for coefficients 1, −2, 3, −4, ...: the norm of the
      difference over that of the leaf's gradient, or over 1 % of the whole gradient's norm where
      that is more (a gradient may be zero but for rounding, as of an attention layer's key bias).

    Raises:
      ValueError: as `sequence_scores`; or leaves exceed `rtol`, which the message names. That is a
        bug of proma_jax or a `logprob_fn` that is not a function of its arguments alone.

    Example:
      >>> import jax.numpy as jnp
      >>> params, microbatch = {"w": jnp.ones((3, 2))}, jnp.ones((4, 5, 3))
      >>> check_scores(lambda params, x: jnp.sum(x @ params["w"]), params, microbatch)
      {"['w']": 0.0}
    """
    fn = (lambda *args: logprob_fn(*args)[0]) if has_aux else logprob_fn
    scores_fn = sequence_scores(logprob_fn, has_aux=has_aux)

    @jax.jit
    def both(params: Any, microbatch: Any) -> tuple[Any, Any]:
        value, scores = scores_fn(params, microbatch)
        dtype = (value[0] if has_aux else value).dtype
        b = jax.tree.leaves(microbatch)[0].shape[0]
        coefficients = jnp.array([i if i % 2 else -i for i in range(1, b + 1)], dtype)

        def loss(params: Any) -> Array:
            own = without_batch_axes(params, microbatch)
            return jnp.sum(coefficients * jax.vmap(fn, (None, 0))(own, microbatch))

        return weighted_sum(scores, coefficients), jax.grad(loss)(params)

    with jax.default_matmul_precision("highest"):
        traced = both.trace(params, microbatch)
        ours, expected = both(params, microbatch)
    if rtol is None:
        rtol = 5e-2 if _jaxpr.is_narrow(traced.jaxpr) else 1e-4
    ours, expected = jax.tree.map(lambda x: x.astype(jnp.float32), (ours, expected))
    floor = 0.01 * optax.tree.norm(expected)
    errors = {}
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), got in zip(leaves, jax.tree.leaves(ours), strict=True):
        size = jnp.maximum(jnp.linalg.norm(want), floor)
        difference = jnp.linalg.norm(got - want)
        errors[jax.tree_util.keystr(path)] = float(difference / jnp.where(size, size, 1))
    off = [
        f"{name or '(root)'} by {error:.1e}" for name, error in errors.items() if not error <= rtol
    ]
    if off:
        raise ValueError(f"scores differ from jax.grad by more than {rtol=}: {', '.join(off)}.")
    return errors


def check_function(logprob_fn: Any) -> None:
    """Raises a ValueError unless `logprob_fn` is a function."""
    if not callable(logprob_fn):
        raise ValueError(
            f"logprob_fn={logprob_fn!r} must be a function (params, sequence) -> log-probability."
        )


def check_parameters(params: Any) -> None:
    """Raises a ValueError unless every parameter is floating point."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        is_array = hasattr(leaf, "dtype") or isinstance(leaf, (float, int, complex))
        kind = jnp.result_type(leaf) if is_array else type(leaf).__name__
        if not is_array or not jnp.issubdtype(kind, jnp.floating):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is {kind}, but parameters must be floating "
                "point: pass it in the sequence or close over it."
            )


@contextlib.contextmanager
def differentiating() -> Iterator[None]:
    """Says where what JAX raises comes from, as where a program has no gradient."""
    try:
        yield
    except Exception as error:
        error.add_note("Raised while differentiating logprob_fn in reverse mode, as jax.grad does.")
        raise


def _check_microbatch(microbatch: Any) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(microbatch)
    if not leaves:
        raise ValueError(
            "microbatch has no arrays: every leaf must have a leading axis of b sequences."
        )
    shapes = [(jax.tree_util.keystr(path), jnp.shape(leaf)) for path, leaf in leaves]
    for name, shape in shapes:
        if not shape or shape[0] != (shapes[0][1] or (None,))[0]:
            raise ValueError(
                f"microbatch{name} has shape {shape}, but microbatch{shapes[0][0]} has shape "
                f"{shapes[0][1]}: every leaf must have the same leading axis of b sequences."
            )


@jax.custom_vjp
def report(data: Array, probe: Array) -> Array:
    """`data`, which the backward pass also returns as the probe's gradient."""
    del probe
    return data


report.defvjp(lambda data, probe: (data, data), lambda data, grad: (grad, data))


@dataclasses.dataclass(frozen=True)
class _Stack:
    """An axis of a parameter that an enclosing scan runs over.

    Attributes:
      depth: which of the enclosing scans, from the outside.
      length: its iterations.
      view: the leaf read as (*layers, ...), this axis the last of the layers.
    """

    depth: int
    length: int
    view: View


@dataclasses.dataclass(frozen=True)
class _Origin:
    """What a variable holds: parameter `leaf` read through `view`, at one index of each stack."""

    leaf: int
    view: View
    stacks: tuple[_Stack, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(stack.length for stack in self.stacks)


@dataclasses.dataclass(frozen=True)
class Use:
    """A matmul with, or lookup in, a parameter.

    Attributes:
      eqn: the equation.
      operation: its axes.
      leaf: number of the parameter.
      view: the leaf read as (*layers, d_in, d_out) or (*layers, num_embeddings, d).
      num_layer_axes: how many layers axes the view has.
      scans: lengths of the enclosing scans, and whether the parameter is scanned over there.
      data: position of the operand that is not the parameter.
    """

    eqn: core.JaxprEqn
    operation: _jaxpr.Matmul | _jaxpr.Lookup
    leaf: int
    view: View
    num_layer_axes: int
    scans: tuple[tuple[int, bool], ...]
    data: int

    @property
    def is_lookup(self) -> bool:
        return isinstance(self.operation, _jaxpr.Lookup)

    def probes(self, with_data: bool = True) -> tuple[Array | None, Array]:
        """Zeros for the operand that is not the parameter and for the result, per iteration."""
        lengths = [length for length, _ in self.scans]
        data = self.eqn.invars[self.data]
        dtype = jnp.float32 if self.is_lookup else None
        data_probe = _jaxpr.zeros(data, lengths, dtype) if with_data else None
        return data_probe, _jaxpr.zeros(self.eqn.outvars[0], lengths)

    @property
    def num_stacks(self) -> int:
        """How many of the enclosing scans run over the parameter."""
        return sum(is_layer for _, is_layer in self.scans)

    def reads_like(self, other: Use) -> bool:
        """Whether two matmuls with the same input also read it alike."""
        a, b = self.operation, other.operation
        return (
            isinstance(a, _jaxpr.Matmul)
            and isinstance(b, _jaxpr.Matmul)
            and a.input_axes == b.input_axes
            and self.scans == other.scans
        )

    def zero_factors(self) -> tuple[Array, Array]:
        data, output_grads = self.probes()
        assert data is not None
        return self.factors(data, output_grads)

    def tapped(self, kernel: Array, data: Array, probes: tuple[Array | None, Array]) -> Array:
        """The equation's result, whose gradient becomes that of the second probe.

        A lookup's indices become the gradient of the first probe, if there is one; a matmul's
        inputs are reported by `report`, since several matmuls may share them and any of them may
        have no gradient.
        """
        data_probe, _ = probes

        def forward(kernel: Array, data: Array) -> Array:
            operands = (data, kernel) if self.data == 0 else (kernel, data)
            return _jaxpr.evaluate(self.eqn, *operands)[0]

        @jax.custom_vjp
        def tap(kernel: Array, data: Array, probes: Any) -> Array:
            del probes
            return forward(kernel, data)

        def forward_pass(kernel: Array, data: Array, probes: Any) -> tuple[Array, Any]:
            del probes
            return forward(kernel, data), data if self.is_lookup else kernel

        def backward_pass(residual: Array, output_grad: Array) -> tuple[None, Array | None, Any]:
            if isinstance(self.operation, _jaxpr.Lookup):
                indices = residual.astype(jnp.float32)  # exact where they are in bounds
                indices = jnp.clip(indices, -1, self.operation.num_embeddings)
                return None, None, (None if data_probe is None else indices, output_grad)
            zeros = _jaxpr.zeros(self.eqn.invars[self.data], ())
            like = varying_like(zeros, (residual, output_grad))
            data_grad = jax.linear_transpose(lambda data: forward(residual, data), like)(
                output_grad
            )
            return None, *data_grad, (None, output_grad)

        tap.defvjp(forward_pass, backward_pass)
        return tap(kernel, data, probes)

    def arrange(self, raw: Array, axes: Sequence[tuple[int, ...]]) -> Array:
        """A probe's gradient as (*layers, tokens, d), from its (batch, token, feature) axes."""
        offset = len(self.scans)
        batch, tokens, features = ([offset + i for i in group] for group in axes)
        layers = [i for i, (_, is_layer) in enumerate(self.scans) if is_layer] + batch
        tokens = [i for i, (_, is_layer) in enumerate(self.scans) if not is_layer] + tokens
        shape = [raw.shape[i] for i in layers]
        num_features = math.prod(raw.shape[i] for i in features)
        num_tokens = math.prod(raw.shape[i] for i in tokens)
        return raw.transpose(*layers, *tokens, *features).reshape(*shape, num_tokens, num_features)

    def factors(self, data: Array, output_grads: Array) -> tuple[Array, Array]:
        """(inputs or indices, output gradients) in the layout of the score leaves."""
        operation = self.operation
        if isinstance(operation, _jaxpr.Matmul):
            return self.arrange(data, operation.input_axes), self.arrange(
                output_grads, operation.output_axes
            )
        grads = self.arrange(output_grads, ((), *operation.output_axes))
        index_axes = tuple(range(data.ndim - len(self.scans)))
        indices = self.arrange(data, ((), index_axes, ()))[..., 0].astype(jnp.int32)
        last = operation.num_embeddings - 1
        if operation.out_of_bounds == "drop":
            inside = (indices >= 0) & (indices <= last)
            grads = jnp.where(inside[..., None], grads, 0)
        if operation.out_of_bounds != "never":
            indices = jnp.clip(indices, 0, last)
        return indices, grads


class _Search:
    """Finds every use of every parameter in a traced program."""

    def __init__(self) -> None:
        self.uses: dict[Path, Use] = {}
        self.lost: dict[int, str] = {}
        self.stacks: dict[int, set[tuple[View, int]]] = defaultdict(set)

    def lose(self, origin: _Origin | None, why: str) -> None:
        """Gives up on a parameter: its scores will be dense."""
        if origin is not None:
            self.lost.setdefault(origin.leaf, why)
            self._note_stacks(origin)

    def _note_stacks(self, origin: _Origin) -> None:
        view = origin.stacks[-1].view if origin.stacks else View()
        self.stacks[origin.leaf].add((view, len(origin.stacks)))

    def walk(
        self,
        jaxpr: core.Jaxpr,
        origins: Sequence[_Origin | None],
        path: Path = (),
        scans: tuple[int, ...] = (),
    ) -> list[_Origin | None]:
        """Follows parameters from a program's inputs to its outputs, noting uses on the way."""
        known = {v: o for v, o in zip(jaxpr.invars, origins, strict=True) if o is not None}

        def look_up(atoms: Sequence[Any]) -> list[_Origin | None]:
            return [known.get(a) if isinstance(a, core.Var) else None for a in atoms]

        for number, eqn in enumerate(jaxpr.eqns):
            operands = look_up(eqn.invars)
            if any(operands):
                results = self._follow(eqn, operands, (*path, number), scans)
                known |= {v: o for v, o in zip(eqn.outvars, results, strict=True) if o is not None}
        return look_up(jaxpr.outvars)

    def _follow(
        self, eqn: core.JaxprEqn, origins: list[_Origin | None], path: Path, scans: tuple[int, ...]
    ) -> list[_Origin | None]:
        nothing: list[_Origin | None] = [None] * len(eqn.outvars)
        inner = _jaxpr.body(eqn)
        if inner is not None and inner.kind == "scan":
            return self._follow_scan(inner, origins, path, scans)
        if inner is not None:
            return self.walk(inner.jaxpr, origins, path, scans)
        first = origins[0]
        if first is not None and len(eqn.outvars) == 1:
            view = _jaxpr.reinterpret(eqn, first.view, first.layers)
            if view is not None:
                return [dataclasses.replace(first, view=view)]
        if self._is_use(eqn, origins, path, scans):
            return nothing
        for origin in origins:
            self.lose(origin, f"used by {eqn.primitive.name}")
        return nothing

    def _is_use(
        self, eqn: core.JaxprEqn, origins: list[_Origin | None], path: Path, scans: tuple[int, ...]
    ) -> bool:
        """Notes a matmul with, or a lookup in, exactly one parameter."""
        position = next(i for i, origin in enumerate(origins) if origin is not None)
        origin = origins[position]
        assert origin is not None
        if sum(o is not None for o in origins) > 1:
            return False
        name, layers = eqn.primitive.name, origin.layers
        operation: _jaxpr.Matmul | _jaxpr.Lookup | None = None
        view, num_batch = origin.view, 0
        if name == "dot_general" and jnp.issubdtype(
            eqn.invars[1 - position].aval.dtype, jnp.floating
        ):
            operation = _jaxpr.matmul(eqn, position)
        elif name == "gather" and position == 0:
            operation = _jaxpr.lookup(eqn)
        if isinstance(operation, _jaxpr.Matmul):
            batch, contracted, free = operation.kernel_axes
            shape = eqn.invars[position].aval.shape
            offset, num_batch = len(layers), len(batch)
            view = view.transpose(
                [*range(offset), *(offset + i for i in (*batch, *contracted, *free))]
            )
            full = [*layers, *(shape[i] for i in (*batch, *contracted, *free))]
            matrix = [math.prod(shape[i] for i in group) for group in (contracted, free)]
            view = view.reshape(full, (*full[: offset + num_batch], *matrix))
        elif isinstance(operation, _jaxpr.Lookup):
            shape = eqn.invars[0].aval.shape
            view = view.reshape((*layers, *shape), (*layers, shape[0], math.prod(shape[1:])))
        else:
            return False
        depths = {stack.depth for stack in origin.stacks}
        self._note_stacks(origin)
        self.uses[path] = Use(
            eqn=eqn,
            operation=operation,
            leaf=origin.leaf,
            view=view,
            num_layer_axes=len(layers) + num_batch,
            scans=tuple((length, depth in depths) for depth, length in enumerate(scans)),
            data=1 - position,
        )
        return True

    def _follow_scan(
        self, inner: _jaxpr.Body, origins: list[_Origin | None], path: Path, scans: tuple[int, ...]
    ) -> list[_Origin | None]:
        num_consts, num_carry, depth = inner.num_consts, inner.num_carry, len(scans)
        unscanned = num_consts + num_carry

        def slice_of(origin: _Origin | None) -> _Origin | None:
            if origin is None:
                return None
            stack = _Stack(depth, inner.length, origin.view)
            return dataclasses.replace(origin, stacks=(*origin.stacks, stack))

        def stack_of(origin: _Origin | None) -> _Origin | None:
            if origin is not None and origin.stacks and origin.stacks[-1].depth == depth:
                return dataclasses.replace(origin, stacks=origin.stacks[:-1])
            self.lose(origin, "stacked by a scan")
            return None

        consts, carry = origins[:num_consts], origins[num_consts:unscanned]
        slices = [slice_of(origin) for origin in origins[unscanned:]]
        while True:
            results = self.walk(
                inner.jaxpr, [*consts, *carry, *slices], path, (*scans, inner.length)
            )
            changed = [
                o is not None and o != r for o, r in zip(carry, results[:num_carry], strict=True)
            ]
            if not any(changed):
                break
            for i in range(num_carry):
                if changed[i]:
                    self.lose(carry[i], "changed in a scan's carry")
                    carry[i] = None
        for origin, result in zip(carry, results[:num_carry], strict=True):
            if origin is None:
                self.lose(result, "put into a scan's carry")
        return [*carry, *map(stack_of, results[num_carry:])]


class Program:
    """A traced `logprob_fn` and what is known of each parameter's uses in it."""

    def __init__(self, closed: Any, out_tree: Any, num_params: int) -> None:
        self.jaxpr, self.consts, self.out_tree = closed.jaxpr, closed.consts, out_tree
        search = _Search()
        origins = [_Origin(i, View()) for i in range(num_params)]
        data = [None] * (len(self.jaxpr.invars) - num_params)
        search.lose(
            search.walk(self.jaxpr, [*origins, *data])[0], "returned as the log-probability"
        )
        self.why_dense = dict(search.lost)
        self.stacks = search.stacks
        self.groups: dict[int, list[list[Path]]] = {}
        by_leaf: dict[int, list[Path]] = defaultdict(list)
        for path, use in search.uses.items():
            if use.leaf not in self.why_dense:
                by_leaf[use.leaf].append(path)
        for leaf, paths in by_leaf.items():
            alike: dict[Any, list[Path]] = defaultdict(list)
            for path in paths:
                use = search.uses[path]
                alike[use.is_lookup, use.view, use.num_layer_axes].append(path)
            if len(alike) > 1 and any(search.uses[path].num_layer_axes for path in paths):
                self.why_dense[leaf] = "used in several ways by stacked layers"
            else:
                self.groups[leaf] = list(alike.values())
        self.taps = {
            p: search.uses[p] for groups in self.groups.values() for g in groups for p in g
        }
        self.scopes = {path[:i] for path in self.taps for i in range(len(path))}
        self.dense = [i for i in range(num_params) if i not in self.groups]
        self.reporter = self._reporters()
        self.members: dict[Path, list[Path]] = defaultdict(list)
        for path, first in sorted(self.reporter.items()):
            self.members[first].append(path)

    def _reporters(self) -> dict[Path, Path]:
        """For each tap, the tap that reports its input: a matmul's first with the same operand."""
        first: dict[Any, Path] = {}
        reporters = {}
        for path, use in sorted(self.taps.items(), key=lambda item: item[0]):
            data = use.eqn.invars[use.data]
            is_shared = isinstance(data, core.Var) and not use.is_lookup
            reporters[path] = first.setdefault((path[:-1], data), path) if is_shared else path
        return reporters

    def value_and_scores(self, params: Any, sequence: Any) -> tuple[Any, Any]:
        """One sequence's outputs and scores (without the leading axis b)."""
        leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, params))
        data = jax.tree.leaves(sequence)
        probes = {path: use.probes(self.reporter[path] == path) for path, use in self.taps.items()}
        probes = varying_like(probes, sequence)

        def run(dense: list[Array], probes: Any) -> tuple[Array, Any]:
            values = list(leaves)
            for i, value in zip(self.dense, dense, strict=True):
                values[i] = value
            return self.run([*values, *data], probes, self.reported)

        differentiate = jax.grad(run, argnums=(0, 1), has_aux=True)
        with differentiating():
            (gradients, taps), outputs = differentiate([leaves[i] for i in self.dense], probes)
        scores: list[ScoreLeaf] = [
            self.dense_leaf(i, gradients.pop(0))
            if i in self.dense
            else self.leaf(i, taps, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        return outputs, jax.tree.unflatten(treedef, scores)

    def reported(
        self, first: Path, data: Array, probes: dict[Path, Any]
    ) -> tuple[Array, dict[Path, tuple[Array | None, Array]]]:
        """Reports what a group of taps reads; the probes of each are its own."""
        if self.taps[first].is_lookup:
            return data, {first: probes[first]}
        reporting = report(jnp.asarray(data), probes[first][0])
        return reporting, {path: (None, probes[path][1]) for path in self.members[first]}

    def run(self, arguments: Sequence[Any], extra: dict[Path, Any], visit: Visit) -> Any:
        """The outputs for one sequence, from a program with its taps: (log-probability, all).

        Args:
          arguments: leaves of the parameters and of the sequence.
          extra: a pytree for each of some taps, with the lengths of the enclosing scans in front.
          visit: called where the first of the taps that share an operand is met, with its path,
            that operand, and the slices of `extra` in this place; returns the operand and the
            probes of each of these taps.
        """
        outputs = self._run(self.jaxpr, self.consts, (), extra, arguments, visit)
        return outputs[0], jax.tree.unflatten(self.out_tree, outputs)

    def _run(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[Any],
        path: Path,
        extra: dict[Path, Any],
        args: Sequence[Any],
        visit: Visit,
    ) -> list[Any]:
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        visited: dict[Path, Any] = {}

        def read(atom: Any) -> Any:
            return values[atom] if isinstance(atom, core.Var) else atom.val

        for number, eqn in enumerate(jaxpr.eqns):
            here, operands = (*path, number), [read(atom) for atom in eqn.invars]
            if here in self.taps:
                use, first = self.taps[here], self.reporter[here]
                if here == first:
                    visited[here] = visit(here, operands[use.data], extra)
                data, probes = visited[first]
                results = [use.tapped(operands[1 - use.data], data, probes[here])]
            elif here in self.scopes:
                results = self._run_inside(eqn, here, extra, operands, visit)
            else:
                results = _jaxpr.evaluate(eqn, *operands)
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _run_inside(
        self,
        eqn: core.JaxprEqn,
        path: Path,
        extra: dict[Path, Any],
        operands: list[Any],
        visit: Visit,
    ) -> list[Any]:
        inner = _jaxpr.body(eqn)
        assert inner is not None
        within = {p: x for p, x in extra.items() if p[: len(path)] == path}

        def fn(within: Any, *args: Any) -> list[Any]:
            return self._run(inner.jaxpr, inner.consts, path, within, args, visit)

        return _jaxpr.rebuild(inner, fn)(within, *operands)

    def paths(self, leaf: int) -> list[Path]:
        """Where the taps of a parameter leaf are."""
        return [path for group in self.groups.get(leaf, []) for path in group]

    def kind(self, leaf: int) -> type[ScoreLeaf]:
        """The type of a leaf's scores."""
        if leaf in self.dense:
            return DenseScores
        kinds = [
            LookupFactors if self.taps[g[0]].is_lookup else LayerFactors for g in self.groups[leaf]
        ]
        return kinds[0] if len(kinds) == 1 else SumScores

    def view(self, leaf: int) -> View:
        """How a leaf is read in the layout of its scores."""
        if leaf in self.dense:
            return self._layers_of(leaf)[0]
        groups = self.groups[leaf]
        return self.taps[groups[0][0]].view if len(groups) == 1 else View()

    @functools.cached_property
    def factor_shapes(self) -> dict[int, tuple[int, Any, Any]]:
        """For each leaf with LayerFactors a sequence's tokens, and its first use's factors."""
        shapes = {}
        for leaf in self.groups:
            if self.kind(leaf) is LayerFactors:
                of_uses = [jax.eval_shape(self.taps[p].zero_factors) for p in self.paths(leaf)]
                tokens = sum(grads.shape[-2] for _, grads in of_uses)
                shapes[leaf] = tokens, *of_uses[0]
        return shapes

    def leaf(self, leaf: int, taps: dict[Path, tuple[Array, Array]], dtype: Any) -> ScoreLeaf:
        """A leaf's scores for one sequence, from the gradients of its probes."""
        parts: list[DenseScores | LayerFactors | LookupFactors] = []
        for paths in self.groups[leaf]:
            first = self.taps[paths[0]]
            factors = [self.taps[p].factors(taps[self.reporter[p]][0], taps[p][1]) for p in paths]
            data, grads = zip(*factors, strict=True)
            common = {"num_layer_axes": first.num_layer_axes, "view": first.view, "dtype": dtype}
            output_grads = _join(grads, axis=-2)
            if isinstance(first.operation, _jaxpr.Lookup):
                rows = first.operation.num_embeddings
                parts.append(LookupFactors(_join(data, axis=-1), output_grads, rows, **common))
            else:
                in_loss = _join([self._in_loss(p, taps) for p in paths], axis=-1)
                inputs = _join(data, axis=-2)
                parts.append(LayerFactors(inputs, output_grads, in_loss=in_loss, **common))
        return parts[0] if len(parts) == 1 else SumScores(tuple(parts))

    def _in_loss(self, path: Path, taps: dict[Path, tuple[Array, Array]]) -> Array:
        """(*layers, tokens) bool: where any kernel that shares the input has a gradient."""
        members = self.members[self.reporter[path]]
        alike = [p for p in members if self.taps[p].reads_like(self.taps[path])]
        return any_nonzero(
            [self.taps[p].arrange(taps[p][1], self.taps[p].operation.output_axes) for p in alike]
        )

    def dense_leaf(self, leaf: int, gradient: Array) -> DenseScores:
        """A dense leaf's scores for one sequence."""
        view, num_layer_axes = self._layers_of(leaf)
        return DenseScores(view.apply(gradient), num_layer_axes, view, gradient.dtype)

    def _layers_of(self, leaf: int) -> tuple[View, int]:
        """How a dense leaf splits into layers, where all its uses agree on that."""
        stacks = self.stacks[leaf]
        return next(iter(stacks)) if len(stacks) == 1 else (View(), 0)

    def describe(self, leaf: int) -> tuple[str, str]:
        """The representation of a leaf's scores, and why it has that one."""
        if leaf in self.dense:
            view, num_layer_axes = self._layers_of(leaf)
            layered = jax.eval_shape(view.apply, self.jaxpr.invars[leaf].aval)
            count = _count(math.prod(layered.shape[:num_layer_axes]), "layer")
            layers = f", {count}" if num_layer_axes else ""
            return "DenseScores", self.why_dense.get(leaf, "not used") + layers
        kinds, whys = [], []
        for paths in self.groups[leaf]:
            use = self.taps[paths[0]]
            shapes = [jax.eval_shape(self.taps[path].zero_factors) for path in paths]
            tokens = sum(grads.shape[-2] for _, grads in shapes)
            data, grads = shapes[0]
            count = _count(math.prod(grads.shape[:-2]), "layer")
            layers = f"{count}, " if use.num_layer_axes else ""
            rows = f"{data.shape[-1]} ->"
            if isinstance(use.operation, _jaxpr.Lookup):
                rows = f"{use.operation.num_embeddings} rows of"
            kinds.append("LookupFactors" if use.is_lookup else "LayerFactors")
            whys.append(f"{layers}{_count(tokens, 'token')}, {rows} {grads.shape[-1]}")
        return " + ".join(kinds), "; ".join(whys)


def any_nonzero(arrays: Sequence[Array]) -> Array:
    """Whether any of several (..., d) arrays of one shape but for d has a nonzero row, (...)."""
    return functools.reduce(jnp.logical_or, [jnp.any(x != 0, axis=-1) for x in arrays])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _join(arrays: Sequence[Array], axis: int) -> Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)


def trace(logprob_fn: Callable[..., Any], params: Any, sequence: Any, has_aux: bool) -> Program:
    """Traces `logprob_fn` and finds the uses of each parameter.

    Raises:
      ValueError: it does not return what `sequence_scores` needs.
    """
    closed, shapes = jax.make_jaxpr(logprob_fn, return_shape=True)(params, sequence)
    if has_aux and not (isinstance(shapes, tuple) and len(shapes) == 2):
        raise ValueError(
            f"has_aux=True, but logprob_fn returned {shapes}: it must return (scalar, aux)."
        )
    value = shapes[0] if has_aux else shapes
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"logprob_fn must return a floating point scalar for one sequence, got {value}. Sum "
            "the log-probabilities of the response tokens; other outputs need has_aux=True."
        )
    return Program(closed, jax.tree.structure(shapes), len(jax.tree.leaves(params)))
