"""One parameter leaf: the part of a gradient that lies in the span of a microbatch's scores.

`removed_part` is what the accumulation variant takes away from the accumulated gradient G of a
leaf: shrinkage · P_S(G), with P_S the projection on S = span{s_1, ..., s_b}, layer by layer. The
scores are first scaled to unit norm ŝ_i = s_i / ‖s_i‖ (a zero score stays zero), so the result is
the same at every scale. Solvers of P_S:

* "ridge": Σ w_i ŝ_i with w = (ŝŝᵀ + ridge · I)⁻¹ ŝ G. Needs only `gram`, `dots` and `weighted_sum`;
  a direction of singular value σ keeps the fraction ridge / (σ² + ridge) of G.
* "qr", "svd": the exact projection on the directions with σ > rtol · σ_max. What is left of G has
  inner products of at most 1e-5 ‖G‖ with every ŝ_i. They go through a leaf layer by layer.

Equal, dependent and zero scores are harmless to all of them. NaN or infinity in a layer's scores or
gradient makes that layer's result NaN: it is never hidden, and reaches no decomposition.

Example:
  >>> import jax.numpy as jnp
  >>> from proma_jax.scores import DenseScores
  >>> scores = DenseScores(jnp.array([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]]))   # b = 2 equal scores
  >>> removed_part(jnp.array([3.0, 4.0, 5.0]), jnp.ones(3), scores, solver="qr").round(4).tolist()
  [3.0, 0.0, 0.0]
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from proma_jax.scores import (
    AxisName,
    DenseScores,
    ScoreLeaf,
    contract,
    divide,
    map_layers,
    wide,
    wide_dtype,
)
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
    axis_name: AxisName = None,
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
      axis_name: of mapped axes along which each device has scores of its own, which together make
        the span, and the same G and g_m. Default: None.

    Returns:
      shrinkage · P_S(G), bounded, of the leaf's shape, in float32 (float64 if an argument is).
    """
    layers, own = scores.view.apply(gradient), scores.view.apply(update)
    own_lengths = layer_norms(own, scores.num_layer_axes)
    if solver == "ridge" and axis_name is not None:
        dense = scores.dense()
        products, norms = _products_of_all(dense, layers, axis_name)
        of_all, _ = removal(products, own_lengths / products.size, ridge, shrinkage, relative_bound)
        start = jax.lax.axis_index(axis_name) * dense.batch_size
        weights = jax.lax.dynamic_slice_in_dim(of_all, start, dense.batch_size, axis=-1)
        part = jax.lax.psum(dense.weighted_sum(divide(weights, norms)), axis_name)
        return scores.view.invert(_times(part, products.size))
    if solver == "ridge":
        scores = scores.compact()
        products = unit_products(scores, layers)
        weights, _ = removal(
            products, own_lengths / products.size, ridge, shrinkage, relative_bound
        )
        return scores.view.invert(_times(scores.weighted_sum(weights), products.size))
    if axis_name is not None:
        dense = scores.dense()
        values = jax.lax.all_gather(dense.values, axis_name, tiled=True)
        scores = dataclasses.replace(dense, values=values)
    projected = _exact_projection(layers, scores, solver, rtol)
    if axis_name is not None:
        projected = jax.lax.pmean(projected, axis_name)  # the same on all, and known to be
    lengths = layer_norms(projected, scores.num_layer_axes)
    scale = _scaling(lengths, own_lengths, shrinkage, relative_bound)
    return scores.view.invert(_times(projected, scale))


def _times(layers: jax.Array, factors: jax.Array) -> jax.Array:
    """(*layers, ...) times (*layers,)."""
    return layers * jnp.expand_dims(factors, range(factors.ndim, layers.ndim))


class UnitProducts(NamedTuple):
    """Inner products of unit scores ŝ_i = s_i / ‖s_i‖, and 0 for a zero score.

    Attributes:
      gram: (*layers, b, b), <ŝ_i, ŝ_j>.
      dots: (*layers, b), <ŝ_i, G> / size.
      norms: (*layers, b), ‖s_i‖.
      size: (*layers,), 1, or a size of G if that would not be safe.
    """

    gram: jax.Array
    dots: jax.Array
    norms: jax.Array
    size: jax.Array

    def lengths(self, weights: jax.Array) -> jax.Array:
        """(*layers,) norms of Σ_i weights_i ŝ_i."""
        size = jnp.max(jnp.abs(weights), axis=-1, keepdims=True, initial=0)
        moderate = divide(weights, size)
        squares = contract("...i,...ij,...j->...", moderate, self.gram, moderate)
        return size[..., 0] * _sqrt(jnp.where(squares < 0, 0, squares))


def unit_products(scores: ScoreLeaf, layers: jax.Array) -> UnitProducts:
    """The products that the ridge projection needs, right at every scale.

    Args:
      scores: of a leaf.
      layers: G, in the scores' layout.
    """
    gram, dots = scores.gram(), scores.dots(layers)
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
    are_moderate = (squares > 1e-16) & (squares < 1e16)
    dots_are = (jnp.abs(dots) > 1e-18) & (jnp.abs(dots) < 1e18)
    ones = jnp.ones_like(squares)
    one = jnp.ones_like(squares, wide_dtype(layers.dtype), shape=squares.shape[:-1])

    def as_they_are() -> tuple[jax.Array, ...]:
        return gram, dots, ones, one

    def rescaled() -> tuple[jax.Array, ...]:
        moderate, sizes = scores.rescaled()
        size = _size(layers, scores.num_layer_axes)
        of_moderate = moderate.dots(_times(wide(layers), 1 / size))
        return moderate.gram(), of_moderate, jnp.moveaxis(sizes, 0, -1), size

    def looked_at() -> tuple[jax.Array, ...]:
        """Products of zero scores, or with a G of zero, are right as they are."""
        largest = _sqrt(squares) * _size(layers, scores.num_layer_axes)[..., None]
        are_right = are_moderate & (largest > 1e-18) & (largest < 1e18)
        are_right |= jnp.moveaxis(scores.are_zero(), 0, -1)
        return jax.lax.cond(jnp.all(are_right), as_they_are, rescaled)

    gram, dots, sizes, size = jax.lax.cond(jnp.all(are_moderate & dots_are), as_they_are, looked_at)
    norms = _sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))
    to_unit = _to_unit(norms)
    unit_gram = gram * to_unit[..., :, None] * to_unit[..., None, :]
    return UnitProducts(unit_gram, dots * to_unit, norms * sizes, size)


def _to_unit(norms: jax.Array) -> jax.Array:
    """What brings vectors of these norms to unit length, 0 for a zero vector."""
    return jnp.where(norms == 0, 0, 1 / jnp.where(norms == 0, 1, norms))


def _size(layers: jax.Array, num_layer_axes: int) -> jax.Array:
    """(*layers,), the largest magnitude in each layer, 1 where that is zero."""
    axes = tuple(range(num_layer_axes, layers.ndim))
    size = jnp.max(jnp.abs(wide(layers)), axis=axes, initial=0)
    return jnp.where(size > 0, size, 1)


def _products_of_all(
    scores: DenseScores, layers: jax.Array, axis_name: AxisName
) -> tuple[UnitProducts, jax.Array]:
    """The products of all devices' unit scores along mapped axes, and the norms of one's own.

    The scores are exchanged so that each device holds the same share of every sequence's score.

    Args:
      scores: the device's own.
      layers: G, in the scores' layout, the same on all devices.
      axis_name: of the mapped axes.
    """
    num_devices, num_layer_axes = jax.lax.psum(1, axis_name), scores.num_layer_axes
    norms = layer_norms(scores.values, 1 + num_layer_axes)
    unit = scores.times(_to_unit(norms)).values

    def flat(x: jax.Array, num_leading: int) -> jax.Array:
        """The features as one axis that all devices can share."""
        x = x.reshape(*x.shape[:num_leading], math.prod(x.shape[num_leading:]))
        return jnp.pad(x, [(0, 0)] * num_leading + [(0, -x.shape[-1] % num_devices)])

    shares = jax.lax.all_to_all(
        flat(unit, 1 + num_layer_axes), axis_name, 1 + num_layer_axes, 0, tiled=True
    )
    share = shares.shape[-1]
    start, size = jax.lax.axis_index(axis_name) * share, _size(layers, num_layer_axes)
    of_gradient = jax.lax.dynamic_slice_in_dim(
        flat(_times(wide(layers), 1 / size), num_layer_axes), start, share, axis=-1
    )
    own = DenseScores(shares, num_layer_axes)
    gram, dots = jax.lax.psum((own.gram(), own.dots(of_gradient)), axis_name)
    products = UnitProducts(gram, dots, jnp.ones_like(dots), size)
    return products, jnp.moveaxis(norms, 0, -1)


def removal(
    products: UnitProducts,
    own_lengths: jax.Array,
    ridge: ArrayLike,
    shrinkage: ArrayLike,
    relative_bound: ArrayLike | None,
) -> tuple[jax.Array, jax.Array]:
    """`removed_part` of the solver "ridge" as a combination of the scores.

    Args:
      products: of layers (*layers,).
      own_lengths: (*layers,), ‖g_m‖ / size.
      ridge: as in `removed_part`.
      shrinkage: as in `removed_part`.
      relative_bound: as in `removed_part`.

    Returns:
      (*layers, b) weights of the scores s_i, and the (*layers,) norms of what they sum to, both
      divided by `size`.
    """
    weights = _solve_damped(products.gram, products.dots, ridge)
    lengths = products.lengths(weights)
    scale = _scaling(lengths, own_lengths, shrinkage, relative_bound)
    return divide(scale[..., None] * weights, products.norms), scale * lengths


def _scaling(
    lengths: jax.Array,
    own_lengths: jax.Array,
    shrinkage: ArrayLike,
    relative_bound: ArrayLike | None,
) -> jax.Array:
    """`shrinkage` times what brings lengths down to `relative_bound` times `own_lengths`."""
    bounding = jnp.ones_like(lengths)
    if relative_bound is not None:
        limits = jnp.asarray(relative_bound, own_lengths.dtype) * own_lengths
        too_long = lengths > limits
        bounding = jnp.where(too_long, limits / jnp.where(too_long, lengths, 1), 1)
    return jnp.asarray(shrinkage, bounding.dtype) * bounding


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


def _solve_damped(gram: jax.Array, dots: jax.Array, ridge: ArrayLike) -> jax.Array:
    """(gram + ridge · I)⁻¹ dots, without the directions that float32 cannot tell from none."""
    finite = jnp.all(jnp.isfinite(gram), axis=(-2, -1), keepdims=True)
    dtype = jnp.result_type(gram, dots)
    dots, ridge = dots.astype(dtype), jnp.asarray(ridge, dtype)
    safe = jnp.where(finite, gram, 0).astype(dtype)
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
    layers: jax.Array, scores: ScoreLeaf, solver: Literal["qr", "svd"], rtol: float
) -> jax.Array:
    """(*layers, ...), the orthogonal projection in the scores' layout."""
    if scores.batch_size == 0 or layers.size == 0:
        return jnp.zeros_like(wide(layers))

    def one_layer(scores: ScoreLeaf, layer: jax.Array) -> jax.Array:
        rows = scores.dense().values.reshape(scores.batch_size, layer.size)
        basis, flat = orthonormal_basis(rows, solver, rtol), wide(layer).ravel()

        def project(vector: jax.Array) -> jax.Array:
            return contract("bn,b->n", basis, contract("bn,n->b", basis, vector))

        projected = project(flat)
        return (projected + project(flat - projected)).reshape(layer.shape)

    return map_layers(one_layer, scores, layers)
