"""The accumulation variant's projection: the part of G that lies in the span of a leaf's scores.

What it takes away from the accumulated gradient G of a leaf is shrinkage · P_S(G), with P_S the
projection on S = span{s_1, ..., s_b}, layer by layer. The scores are first scaled to unit norm
ŝ_i = s_i / ‖s_i‖ (a zero score stays zero), so the result is the same at every scale. Solvers of
P_S:

* "ridge": Σ w_i ŝ_i with w = (ŝŝᵀ + ridge · I)⁻¹ ŝ G. Needs only `gram`, `dots` and `weighted_sum`;
  a direction of singular value σ keeps the fraction ridge / (σ² + ridge) of G.
* "qr", "svd": the exact projection on the directions with σ > rtol · σ_max. What is left of G has
  inner products of at most 1e-5 ‖G‖ with every ŝ_i. They go through a leaf layer by layer.

Equal, dependent and zero scores are harmless to all of them. NaN or infinity in a layer's scores or
gradient makes that layer's result NaN: it is never hidden, and reaches no decomposition.

Example:
  >>> import jax.numpy as jnp
  >>> from proma_jax.scores.leaves import DenseScores
  >>> scores = DenseScores(jnp.array([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]]))   # b = 2 equal scores
  >>> total, own_length = jnp.array([3.0, 4.0, 5.0]), jnp.ones(())
  >>> removed, length = removed_exactly(scores, total, own_length, Numbers(), solver="qr")
  >>> removed.round(4).tolist(), round(float(length), 4)
  ([3.0, 0.0, 0.0], 3.0)
  >>> [combination] = combinations([scores], [total], [own_length], Numbers(ridge=0.0))
  >>> combination.removed(scores).round(4).tolist()
  [3.0, 0.0, 0.0]
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from proma_jax.arithmetic import AxisName, contract, divide, layer_norms, sqrt, wide, wide_dtype
from proma_jax.project.linalg import orthonormal_basis
from proma_jax.scores.leaf import ScoreLeaf, map_layers
from proma_jax.scores.leaves import DenseScores

Array = jax.Array
Solver = Literal["ridge", "qr", "svd"]


class Numbers(NamedTuple):
    """The numbers of the accumulation variant at one microbatch.

    Attributes:
      ridge: added to the Gram matrix of the unit scores by "ridge".
      shrinkage: fraction of the projection that is removed.
      relative_bound: where ‖P_S(G)‖ exceeds this many times ‖g_m‖, P_S(G) is scaled down to that
        length; None for no bound.
      rtol: directions with at most `rtol` times the largest singular value of the unit scores are
        not part of the span for "qr" and "svd". Default: eight float32 epsilons.
    """

    ridge: ArrayLike = 1e-2
    shrinkage: ArrayLike = 1.0
    relative_bound: ArrayLike | None = None
    rtol: ArrayLike = 1e-6


class Combination(NamedTuple):
    """What the solver "ridge" removes from a leaf: size · Σ_i weights_i s_i.

    Attributes:
      weights: (*layers, b).
      size: (*layers,), 1, or a size of G if the weights alone might overflow.
      lengths: (*layers,), ‖removed‖.
    """

    weights: Array
    size: Array
    lengths: Array

    def removed(self, scores: ScoreLeaf, axis_name: AxisName = None) -> Array:
        """What is removed, in the scores' layout: with `axis_name` the sum over all devices."""
        part = scores.weighted_sum(self.weights)
        if axis_name is not None:
            part = jax.lax.psum(part, axis_name)
        return _times(part, self.size)


def combinations(
    scores: Sequence[ScoreLeaf],
    totals: Sequence[Array],
    own_lengths: Sequence[Array | None],
    numbers: Numbers,
    *,
    coefficients: Array | None = None,
    axis_name: AxisName = None,
) -> list[Combination]:
    """What the solver "ridge" removes from some leaves, by one factorisation for all of them.

    Args:
      scores: of each leaf.
      totals: G of each, in the scores' layout.
      own_lengths: (*layers,) of each, ‖g_m‖, to which the bound refers; None if g_m is Σ c_i s_i.
      numbers: of the microbatch.
      coefficients: (b,), c_i, if any length is None.
      axis_name: of mapped axes along which each device has scores of its own, which together make
        the span, and the same G and g_m. The weights are those of the device's own scores.
    """

    def of_leaf(leaf: ScoreLeaf, total: Array) -> UnitProducts:
        """With the layers as one axis."""
        found, num_layers = unit_products(leaf, total, axis_name), math.prod(leaf.layer_shape)
        return jax.tree.map(lambda x: x.reshape(num_layers, *x.shape[leaf.num_layer_axes :]), found)

    products = [of_leaf(*pair) for pair in zip(scores, totals, strict=True)]

    def own_length(length: Array | None, found: UnitProducts) -> Array:
        """‖g_m‖ over the size of G."""
        if length is not None:
            return length.reshape(-1) / found.size
        assert coefficients is not None
        of_unit_scores = jnp.where(found.norms == 0, 0, coefficients[None] * found.norms)
        return found.lengths(of_unit_scores) / found.size

    own = [own_length(*pair) for pair in zip(own_lengths, products, strict=True)]
    of_all = jax.tree.map(lambda *xs: jnp.concatenate(xs), *products)
    weights = _solve_damped(of_all.gram, of_all.dots, numbers.ridge)
    lengths = of_all.lengths(weights)
    scale = _scaling(lengths, jnp.concatenate(own), numbers)
    weights = divide(scale[..., None] * weights, of_all.norms)
    lengths = scale * lengths * of_all.size
    if axis_name is not None:
        b = scores[0].batch_size
        first = jax.lax.axis_index(axis_name) * b
        weights = jax.lax.dynamic_slice_in_dim(weights, first, b, axis=-1)
    found, start = [], 0
    for leaf in scores:
        here = slice(start, start := start + math.prod(leaf.layer_shape))
        parts = (x[here] for x in (weights, of_all.size, lengths))
        found.append(Combination(*(x.reshape(*leaf.layer_shape, *x.shape[1:]) for x in parts)))
    return found


def removed_exactly(
    scores: ScoreLeaf,
    total: Array,
    own_length: Array,
    numbers: Numbers,
    *,
    solver: Literal["qr", "svd"],
    axis_name: AxisName = None,
) -> tuple[Array, Array]:
    """What the solvers "qr" and "svd" remove from a leaf, in the scores' layout, and its lengths.

    Args:
      scores: of the leaf.
      total: G, in the scores' layout.
      own_length: (*layers,), ‖g_m‖.
      numbers: of the microbatch.
      solver: "qr" or "svd".
      axis_name: as in `combinations`.
    """
    if axis_name is not None:
        dense = scores.dense()
        values = jax.lax.all_gather(dense.values, axis_name, tiled=True)
        scores = dataclasses.replace(dense, values=values)
    projected = _exact_projection(total, scores, solver, numbers.rtol)
    if axis_name is not None:
        projected = jax.lax.pmean(projected, axis_name)  # the same on all, and known to be
    lengths = layer_norms(projected, scores.num_layer_axes)
    scale = _scaling(lengths, own_length, numbers)
    return _times(projected, scale), scale * lengths


def _times(layers: Array, factors: Array) -> Array:
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

    gram: Array
    dots: Array
    norms: Array
    size: Array

    def lengths(self, weights: Array) -> Array:
        """(*layers,) norms of Σ_i weights_i ŝ_i."""
        size = jnp.max(jnp.abs(weights), axis=-1, keepdims=True, initial=0)
        moderate = divide(weights, size)
        squares = contract("...i,...ij,...j->...", moderate, self.gram, moderate)
        return size[..., 0] * sqrt(jnp.where(squares < 0, 0, squares))


def unit_products(scores: ScoreLeaf, layers: Array, axis_name: AxisName = None) -> UnitProducts:
    """The products that the ridge projection needs, right at every scale.

    Args:
      scores: of a leaf.
      layers: G, in the scores' layout.
      axis_name: as in `combinations`; the products are those of all devices' scores.
    """
    if axis_name is not None:
        return _products_of_all(scores.dense(), layers, axis_name)
    gram, dots = scores.gram(), scores.dots(layers)
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
    are_moderate = (squares > 1e-16) & (squares < 1e16)
    dots_are = (jnp.abs(dots) > 1e-18) & (jnp.abs(dots) < 1e18)
    ones = jnp.ones_like(squares)
    one = jnp.ones_like(squares, wide_dtype(layers.dtype), shape=squares.shape[:-1])

    def as_they_are() -> tuple[Array, ...]:
        return gram, dots, ones, one

    def rescaled() -> tuple[Array, ...]:
        moderate, sizes = scores.rescaled()
        size = _size(layers, scores.num_layer_axes)
        of_moderate = moderate.dots(_times(wide(layers), 1 / size))
        return moderate.gram_by_rows(), of_moderate, jnp.moveaxis(sizes, 0, -1), size

    def looked_at() -> tuple[Array, ...]:
        """Products of zero scores, or with a G of zero, are right as they are."""
        largest = sqrt(squares) * _size(layers, scores.num_layer_axes)[..., None]
        are_right = are_moderate & (largest > 1e-18) & (largest < 1e18)
        are_right |= jnp.moveaxis(scores.are_zero(), 0, -1)
        return jax.lax.cond(jnp.all(are_right), as_they_are, rescaled)

    gram, dots, sizes, size = jax.lax.cond(jnp.all(are_moderate & dots_are), as_they_are, looked_at)
    norms = sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))
    to_unit = _to_unit(norms)
    unit_gram = gram * to_unit[..., :, None] * to_unit[..., None, :]
    return UnitProducts(unit_gram, dots * to_unit, norms * sizes, size)


def _to_unit(norms: Array) -> Array:
    """What brings vectors of these norms to unit length, 0 for a zero vector."""
    return jnp.where(norms == 0, 0, 1 / jnp.where(norms == 0, 1, norms))


def _size(layers: Array, num_layer_axes: int) -> Array:
    """(*layers,), the largest magnitude in each layer, 1 where that is zero."""
    axes = tuple(range(num_layer_axes, layers.ndim))
    size = jnp.max(jnp.abs(wide(layers)), axis=axes, initial=0)
    return jnp.where(size > 0, size, 1)


def _products_of_all(scores: DenseScores, layers: Array, axis_name: AxisName) -> UnitProducts:
    """The products of all devices' unit scores along mapped axes.

    The scores are exchanged so that each device holds the same share of every sequence's score.

    Args:
      scores: the device's own.
      layers: G, in the scores' layout, the same on all devices.
      axis_name: of the mapped axes.
    """
    num_devices, num_layer_axes = jax.lax.psum(1, axis_name), scores.num_layer_axes
    norms = layer_norms(scores.values, 1 + num_layer_axes)
    unit = scores.times(_to_unit(norms)).values

    def flat(x: Array, num_leading: int) -> Array:
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
    of_all = jax.lax.all_gather(jnp.moveaxis(norms, 0, -1), axis_name, axis=-1, tiled=True)
    return UnitProducts(gram, dots, of_all, size)


def _scaling(lengths: Array, own_lengths: Array, numbers: Numbers) -> Array:
    """`shrinkage` times what brings lengths down to `relative_bound` times `own_lengths`."""
    bounding = jnp.ones_like(lengths)
    if numbers.relative_bound is not None:
        limits = jnp.asarray(numbers.relative_bound, own_lengths.dtype) * own_lengths
        too_long = lengths > limits
        bounding = jnp.where(too_long, limits / jnp.where(too_long, lengths, 1), 1)
    return jnp.asarray(numbers.shrinkage, bounding.dtype) * bounding


def _solve_damped(gram: Array, dots: Array, ridge: ArrayLike) -> Array:
    """(gram + ridge · I)⁻¹ dots, without the directions that float32 cannot tell from none."""
    finite = jnp.all(jnp.isfinite(gram), axis=(-2, -1), keepdims=True)
    dtype = jnp.result_type(gram, dots)
    dots, ridge = dots.astype(dtype), jnp.asarray(ridge, dtype)
    safe = jnp.where(finite, gram, 0).astype(dtype)
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(safe))
    noise = gram.shape[-1] * jnp.finfo(gram.dtype).eps * values[..., -1:]
    inverse = jnp.where(values > noise, 1 / jnp.where(values > noise, values + ridge, 1), 0)

    def matvec(weights: Array) -> Array:
        return contract("...ij,...j->...i", safe, weights) + ridge * weights

    def solve(_: object, dots: Array) -> Array:
        moved = contract("...ji,...j->...i", vectors, dots)
        return contract("...ij,...j->...i", vectors, inverse * moved)

    weights = jax.lax.custom_linear_solve(matvec, dots, solve, symmetric=True)
    return jnp.where(finite[..., 0], weights, jnp.nan)


def _exact_projection(
    layers: Array, scores: ScoreLeaf, solver: Literal["qr", "svd"], rtol: ArrayLike
) -> Array:
    """(*layers, ...), the orthogonal projection in the scores' layout."""
    if scores.batch_size == 0 or layers.size == 0:
        return jnp.zeros_like(wide(layers))

    def one_layer(scores: ScoreLeaf, layer: Array) -> Array:
        rows = scores.dense().values.reshape(scores.batch_size, layer.size)
        basis, flat = orthonormal_basis(rows, solver, rtol), wide(layer).ravel()

        def project(vector: Array) -> Array:
            return contract("bn,b->n", basis, contract("bn,n->b", basis, vector))

        projected = project(flat)
        return (projected + project(flat - projected)).reshape(layer.shape)

    return map_layers(one_layer, scores, layers)
