"""One parameter leaf: the part of a gradient that lies in the span of a microbatch's scores.

`removed_part` is what the accumulation variant takes away from the accumulated gradient G of a
leaf: shrinkage · P_S(G), with P_S the projection on S = span{s_1, ..., s_b}, layer by layer. The
scores are first scaled to unit norm ŝ_i = s_i / ‖s_i‖ (a zero score stays zero), so the result is
the same at every scale. Solvers of P_S:

* "ridge": Σ w_i ŝ_i with w = (ŝŝᵀ + ridge · I)⁻¹ ŝ G. Needs only `gram`, `dots` and `weighted_sum`;
  a direction of singular value σ keeps the fraction ridge / (σ² + ridge) of G.
* "qr", "svd": the exact projection on the directions with σ > rtol · σ_max. What is left of G has
  inner products of at most 1e-5 ‖G‖ with every ŝ_i. They hold one layer's b scores at a time.

Equal, dependent and zero scores are harmless to all of them. NaN or infinity in a layer's scores or
gradient makes that layer's result NaN: it is never hidden, and reaches no decomposition.

Example:
  >>> import jax.numpy as jnp
  >>> from proma_jax.scores import DenseScores
  >>> scores = DenseScores(jnp.array([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]]))   # b = 2 equal scores
  >>> removed_part(jnp.array([3.0, 4.0, 5.0]), jnp.ones(3), scores, solver="qr").round(4).tolist()
  [3.0, 0.0, 0.0]
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from proma_jax.scores import ScoreLeaf, contract, divide, map_layers, wide
from proma_jax.subspace import orthonormal_basis

Solver = Literal["ridge", "qr", "svd"]


def removed_part(
    gradient: jax.Array,
    update: jax.Array,
    scores: ScoreLeaf,
    *,
    solver: Solver = "ridge",
    ridge: ArrayLike = 1e-2,
    shrinkage: ArrayLike = 1.0,
    relative_bound: ArrayLike | None = None,
    rtol: float = 1e-6,
) -> jax.Array:
    """What accumulation removes from a leaf's accumulated gradient.

    Args:
      gradient: G, of the leaf's shape.
      update: g_m, the microbatch's own gradient, of the same shape; only its length matters, and
        only to `relative_bound`.
      scores: the scores of the microbatch's b sequences.
      solver: "ridge", "qr" or "svd".
      ridge: added to the Gram matrix of the unit scores by "ridge". Default: the author's 1e-2.
      shrinkage: fraction of the projection to remove. Default: 1.
      relative_bound: where ‖P_S(G)‖ exceeds this many times ‖g_m‖, P_S(G) is scaled down to that
        length. Default: None, no bound (the paper's Algorithm 1; the published runs used 0.5).
      rtol: directions with at most `rtol` times the largest singular value of the unit scores are
        not part of the span for "qr" and "svd". Default: 1e-6, eight float32 epsilons.

    Returns:
      shrinkage · P_S(G), bounded, of the leaf's shape, in float32 (float64 if an argument is).
    """
    if solver == "ridge":
        projected = _ridge_projection(gradient, scores, ridge)
    else:
        projected = _exact_projection(gradient, scores, solver, rtol)
    if relative_bound is not None:
        lengths = layer_norms(projected, scores.num_layer_axes)
        limits = relative_bound * layer_norms(scores.view.apply(update), scores.num_layer_axes)
        too_long = lengths > limits
        scale = jnp.where(too_long, limits / jnp.where(too_long, lengths, 1), 1)
        projected = projected * jnp.expand_dims(scale, range(scale.ndim, projected.ndim))
    return scores.view.invert(jnp.asarray(shrinkage) * projected)


def layer_norms(layers: jax.Array, num_layer_axes: int = 0) -> jax.Array:
    """Frobenius norms over all but the leading layer axes, free of overflow and underflow."""
    layers = wide(layers)
    axes = tuple(range(num_layer_axes, layers.ndim))
    size = jnp.max(jnp.abs(layers), axis=axes, keepdims=True, initial=0)
    moderate = divide(layers, size)
    return jnp.squeeze(size, axes) * _sqrt(jnp.sum(moderate**2, axis=axes))


def _sqrt(x: jax.Array) -> jax.Array:
    """The square root, with gradient 0 at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0 * x)


def _ridge_projection(gradient: jax.Array, scores: ScoreLeaf, ridge: ArrayLike) -> jax.Array:
    """(*layers, ...), the ridge-regularised projection in the scores' layout."""
    scores, _ = scores.compact().rescaled()
    gram, dots = scores.gram(), scores.dots(scores.view.apply(gradient))
    norms = _sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))
    to_unit = jnp.where(norms == 0, 0, 1 / jnp.where(norms == 0, 1, norms))
    gram = gram * to_unit[..., :, None] * to_unit[..., None, :]
    return scores.weighted_sum(_solve_damped(gram, dots * to_unit, ridge) * to_unit)


def _solve_damped(gram: jax.Array, dots: jax.Array, ridge: ArrayLike) -> jax.Array:
    """(gram + ridge · I)⁻¹ dots, without the directions that float32 cannot tell from none."""
    finite = jnp.all(jnp.isfinite(gram), axis=(-2, -1), keepdims=True)
    safe = jnp.where(finite, gram, 0)
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(safe))
    noise = gram.shape[-1] * jnp.finfo(gram.dtype).eps * values[..., -1:]
    inverse = jnp.where(values > noise, 1 / jnp.where(values > noise, values + ridge, 1), 0)

    def matvec(weights: jax.Array) -> jax.Array:
        return contract("...ij,...j->...i", safe, weights) + ridge * weights

    def solve(_: object, dots: jax.Array) -> jax.Array:
        moved = contract("...ji,...j->...i", vectors, dots)
        return contract("...ij,...j->...i", vectors, inverse * moved)

    weights = jax.lax.custom_linear_solve(matvec, dots, solve, symmetric=True)
    return jnp.where(finite[..., 0], weights, jnp.nan)


def _exact_projection(
    gradient: jax.Array, scores: ScoreLeaf, solver: Literal["qr", "svd"], rtol: float
) -> jax.Array:
    """(*layers, ...), the orthogonal projection in the scores' layout."""

    def one_layer(scores: ScoreLeaf, layer: jax.Array) -> jax.Array:
        rows = scores.dense().values.reshape(scores.batch_size, -1)
        basis, flat = orthonormal_basis(rows, solver, rtol), wide(layer).ravel()

        def project(vector: jax.Array) -> jax.Array:
            return contract("bn,b->n", basis, contract("bn,n->b", basis, vector))

        projected = project(flat)
        return (projected + project(flat - projected)).reshape(layer.shape)

    return map_layers(one_layer, scores, scores.view.apply(gradient))
