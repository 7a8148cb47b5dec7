"""Scores from any JAX function, in one backward pass and without touching the model.

`sequence_scores(logprob_fn)` traces `logprob_fn` of one sequence, finds where each parameter is
used, and evaluates the same program with every parameter matmul and embedding lookup tapped: a tap
takes zero probes, and the backward pass returns the operation's inputs and output gradients as the
probes' gradients. These factors of each sequence's score cost no more than plain backpropagation,
and the parameter's own gradient is never formed.

A parameter is followed through jit, remat and scan, and through whatever only moves or scales its
entries: slices by any index that is known while tracing, reshapes, transpositions, casts, stacks
and concatenations, a constant factor. What is a slice of a stack is a layer of its own. Where the
trail is lost, the leaf gets its ordinary per-sequence gradient: a dense score, never a wrong one.
`describe_scores` shows what each leaf got and why; `check_scores` compares with `jax.grad`.

Example:
  >>> import jax, jax.numpy as jnp
  >>> def logprob_fn(params, tokens):
  ...     logits = jnp.tanh(params["table"][tokens[:-1]]) @ params["head"] + params["bias"]
  ...     picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=-1)
  ...     return jnp.sum(picked)
  >>> params = {"table": jnp.ones((7, 4)), "head": jnp.ones((4, 7)), "bias": jnp.zeros(7)}
  >>> microbatch = jnp.array([[1, 2, 3], [3, 4, 6]])
  >>> logprobs, scores = sequence_scores(logprob_fn)(params, microbatch)
  >>> *table, note = describe_scores(logprob_fn, params, microbatch).splitlines()
  >>> for line in table:
  ...     print(line)
  leaf       shape   scores         projected by         why
  ['bias']   (7,)    DenseScores    accumulation         used by add
  ['head']   (4, 7)  LayerFactors   accumulation, intra  2 tokens, 4 -> 7
  ['table']  (7, 4)  LookupFactors  neither              2 tokens, 7 rows of 4
  >>> print(note[:73])
  Not projected unless accumulate(..., mask=...) is True for it: ['table'].
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from proma_jax._mesh.arrays import varying_like, without_batch_axes
from proma_jax._mesh.axes import Spec
from proma_jax._mesh.given import batch_axes_of, specs_of_leaves
from proma_jax._mesh.scores import exchanged, spread_scores
from proma_jax.capture import _jaxpr
from proma_jax.capture.checks import (
    DIFFERENTIATED,
    abstract,
    check_function,
    check_microbatch,
    check_parameters,
    for_one_sequence,
    noted,
    one_of,
)
from proma_jax.capture.program import trace
from proma_jax.scores.leaf import ScoreLeaf
from proma_jax.scores.leaves import DenseScores, LayerFactors
from proma_jax.scores.match import weighted_sum

Array = jax.Array


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
      ValueError: a parameter is not floating point, the microbatch's leaves disagree on b,
        `logprob_fn` does not return a floating point scalar, or `spmd_axis_name` or `param_specs`
        name an axis that no mesh has, as where they are used without `jax.set_mesh`. What JAX
        raises where it cannot be differentiated comes with a note that says so.

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
        with noted(DIFFERENTIATED):
            return program.value_and_scores(params, sequence)

    @jax.jit
    def of_all(params: Any, microbatch: Any) -> tuple[Any, Any]:
        of_leaves = specs_of_leaves(param_specs, params, microbatch)
        specs = jax.tree.unflatten(jax.tree.structure(params), of_leaves)
        batch_axes = batch_axes_of(spmd_axis_name, (params, microbatch))
        own = varying_like(without_batch_axes(params, microbatch), microbatch)
        of_one = functools.partial(per_sequence, own)
        try:
            outputs, scores = jax.vmap(of_one, spmd_axis_name=spmd_axis_name)(microbatch)
        except NotImplementedError as error:
            warnings.warn(_ONE_BY_ONE.format(error), stacklevel=2)
            outputs, scores = jax.lax.map(of_one, microbatch)

        def on_mesh(leaf: Any, scores: ScoreLeaf, spec: Spec) -> ScoreLeaf:
            return exchanged(spread_scores(scores, leaf, batch_axes, spec))

        return outputs, jax.tree.map(on_mesh, params, scores, specs)

    def scores_fn(params: Any, microbatch: Any) -> tuple[Any, Any]:
        check_parameters(params)
        check_microbatch(microbatch)
        with for_one_sequence(logprob_fn, params, microbatch):
            return of_all(jax.tree.map(jnp.asarray, params), microbatch)

    return scores_fn


_ONE_BY_ONE = (
    "jax.vmap cannot map logprob_fn ({}), so its sequences are taken one after the other: the "
    "scores are the same, but take longer."
)


def describe_scores(
    logprob_fn: Callable[..., Any],
    params: Any,
    microbatch: Any,
    *,
    has_aux: bool = False,
) -> str:
    """A table of each parameter leaf, what its scores are held as and why, and who projects it.

    Args:
      logprob_fn: as in `sequence_scores`.
      params: parameters, or their `jax.ShapeDtypeStruct`s: nothing is computed.
      microbatch: pytree of sequences with a leading axis b, or its `jax.ShapeDtypeStruct`s.
      has_aux: as in `sequence_scores`.

    Returns:
      The table as text, a line per leaf; the page `Your model` explains one. "projected by"
      says which variants project the leaf unless a mask says otherwise. Dense scores that take more
      than 64 MiB have their size beside the reason. Below the table stands what else there is to
      know: leaves that only a mask has projected, and a function that `jax.vmap` cannot map.

    Raises:
      ValueError: as `sequence_scores`.
    """
    check_parameters(params)
    check_microbatch(microbatch)
    params, microbatch = jax.tree.map(abstract, (params, microbatch))
    with for_one_sequence(logprob_fn, params, microbatch):
        program = trace(logprob_fn, params, one_of(microbatch), has_aux)
    b = jax.tree.leaves(microbatch)[0].shape[0]
    rows = [("leaf", "shape", "scores", "projected by", "why")]
    unprojected = []
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        name, kind = jax.tree_util.keystr(path) or "(root)", program.kind(index)
        scores, why = program.describe(index)
        size = b * leaf.size * leaf.dtype.itemsize
        if kind is DenseScores and size > _LARGE:
            why += f"; {size / 1e6:,.1f} MB for {b} sequences"
        by = {LayerFactors: "accumulation, intra", DenseScores: "accumulation"}.get(kind, "neither")
        if by == "neither":
            unprojected.append(name)
        rows.append((name, str(leaf.shape), scores, by, why))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if unprojected:
        lines.append(_UNPROJECTED.format(", ".join(unprojected)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(sequence_scores(logprob_fn, has_aux=has_aux), params, microbatch)
    lines += [str(w.message) for w in caught if str(w.message).startswith(_ONE_BY_ONE[:20])]
    return "\n".join(lines)


_LARGE = 2**26
_UNPROJECTED = (
    "Not projected unless accumulate(..., mask=...) is True for it: {}. Tables that are looked up "
    "are not by default, be they embeddings, tied embeddings, or heads that are read by their "
    "targets."
)


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

    Warns:
      UserWarning: `logprob_fn` draws random numbers, as for dropout, that are the same for all
        sequences.

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

        def loss(params: Any, mapped: Callable[..., Any]) -> Array:
            of_one = functools.partial(fn, without_batch_axes(params, microbatch))
            return jnp.sum(coefficients * mapped(of_one)(microbatch))

        try:
            _warn_of_shared_random_numbers(fn, without_batch_axes(params, microbatch), microbatch)
            expected = jax.grad(loss)(params, jax.vmap)
        except NotImplementedError:
            one_by_one = functools.partial(functools.partial, jax.lax.map)
            expected = jax.grad(loss)(params, one_by_one)
        return weighted_sum(scores, coefficients), expected

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


def _warn_of_shared_random_numbers(fn: Callable[..., Any], params: Any, microbatch: Any) -> None:
    """Warns if the sequences of a microbatch, mapped over, get the same random numbers."""
    mapped = jax.make_jaxpr(jax.vmap(fn, (None, 0)))(params, microbatch)
    if _jaxpr.shares_random_numbers(mapped.jaxpr, jax.tree.leaves(microbatch)[0].shape[0]):
        warnings.warn(
            "logprob_fn draws random numbers that do not depend on the sequence: all sequences "
            "get the same ones, for example one dropout mask. Let each sequence bring a random key "
            "of its own, and nnx.reseed the streams by the names that the model's Rngs gave them.",
            stacklevel=2,
        )
