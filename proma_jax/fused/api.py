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

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from proma_jax._mesh.arrays import automatic, spread, varying_like, without_batch_axes
from proma_jax._mesh.given import batch_axes_of, specs_of_leaves
from proma_jax.arithmetic import divide
from proma_jax.capture.checks import check_function, check_parameters, for_one_sequence
from proma_jax.capture.program import Program, trace
from proma_jax.fused.numbers import numbers_of
from proma_jax.fused.plan import Plan
from proma_jax.project import core
from proma_jax.settings import Accumulation, Intra, check_settings

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
    check_settings(accumulation, intra)
    check_function(logprob_fn)

    @jax.jit
    def gradient(
        params: Any, batch: Any, coefficients: Array, step: Array
    ) -> tuple[Any, GradientMetrics]:
        params = varying_like(params, (batch, coefficients))
        specs = specs_of_leaves(param_specs, params, batch)
        batch_axes_of(spmd_axis_name, (params, batch))
        program = _trace_one(logprob_fn, params, batch, has_aux)
        plan = Plan(program, params, accumulation, intra, spmd_axis_name, specs)
        k = coefficients.shape[0]
        leaves, treedef = jax.tree.flatten(params)

        def add_microbatch(
            carry: tuple[list[Array], Array], inputs: tuple[Array, Any, Array]
        ) -> tuple[tuple[list[Array], Array], GradientMetrics]:
            (totals, length), (m, microbatch, weights) = carry, inputs
            numbers = numbers_of(plan, m, k, step, weights.size)
            totals, outputs, norms = plan.microbatch(leaves, totals, microbatch, weights, numbers)
            removed, removed_intra, own = norms
            logprobs, aux = outputs if has_aux else (outputs, None)
            metrics = GradientMetrics(
                logprobs, divide(removed, length), divide(removed_intra, own), aux
            )
            totals = plan.spread(totals)
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
        grads = automatic(finish, leaves, totals)
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
