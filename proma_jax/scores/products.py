"""Inner products and weighted sums of scores, as the device at hand makes them best.

All forms give the same but for rounding. On a CPU only matrix products are fast. On other devices a
sum over few sequences is faster than a matrix product that is nearly all padding, and compiles in a
twentieth of the time. There, too, factors of a narrow type are multiplied several times as fast
before weights have turned them into float32. A weight that is not finite makes the sum not finite
wherever its score is not zero.

Arguments have axes of layers in front: values (*layers, b, ...), inputs and output gradients
(*layers, b, tokens, d), weights (*layers, b) in float32 or wider.
"""

import string

import jax
import jax.numpy as jnp

from proma_jax._mesh.axes import has_several_devices
from proma_jax.arithmetic import contract, wide, wide_dtype
from proma_jax.scores.leaf import per_sequence, weighted

Array = jax.Array

_BLOCK = 2**17
"""A TPU multiplies blocks of so many entries of each score as fast as all, and compiles sooner."""

_FEW_TOKENS = 64
"""Products with fewer tokens are small, whatever their type."""
_MANY_ENTRIES = 2**29
"""2 GiB of products. A device that forms them before it adds them up should not hold more."""


def gram(values: Array, num_layer_axes: int) -> Array:
    """(*layers, b, b) inner products of scores that are at hand."""
    features = string.ascii_uppercase[: values.ndim - num_layer_axes - 1]

    def of_all(values: Array) -> Array:
        return contract(f"...i{features},...j{features}->...ij", values, values)

    # Several devices may each have some of the rows, which blocks would bring together.
    if len(features) != 2 or not values.size or has_several_devices():
        return of_all(values)
    return jax.lax.platform_dependent(values, tpu=_gram_by_blocks, default=of_all)


def _gram_by_blocks(values: Array) -> Array:
    *layers, b, d_in, d_out = values.shape
    fitting = (n for n in range(1, d_in) if d_in % n == 0 and _BLOCK / 8 <= n * d_out <= _BLOCK)
    rows = max(fitting, default=d_in)

    def add(i: Array, total: Array) -> Array:
        block = jax.lax.dynamic_slice_in_dim(values, i * rows, rows, axis=-2)
        return total + contract("...iAB,...jAB->...ij", block, block)

    zeros = jnp.zeros_like(values, wide_dtype(values.dtype), shape=(*layers, b, b))
    return jax.lax.fori_loop(0, d_in // rows, add, zeros)


def sum_of_scores(values: Array, weights: Array) -> Array:
    """Of scores that are at hand, s_i = values_i."""
    return jax.lax.platform_dependent(values, weights, cpu=_by_matrix_product, default=_added_up)


def _by_matrix_product(values: Array, weights: Array) -> Array:
    """A second column of weights tells where the sum is not finite.

    It adds up the scores with weights that are not finite, by weights of its own that differ, so
    that opposite scores do not cancel in it.
    """
    features = string.ascii_uppercase[: values.ndim - weights.ndim]
    finite = jnp.isfinite(weights)
    marks = 1 + jax.lax.broadcasted_iota(weights.dtype, weights.shape, weights.ndim - 1)
    both = jnp.stack([jnp.where(finite, weights, 0), jnp.where(finite, 0, marks)])
    total, marked = contract(f"...b{features},k...b->k...{features}", values, both)
    return jnp.where(jnp.abs(marked) > 0, jnp.nan, total)


def _added_up(values: Array, weights: Array) -> Array:
    sequences, weights = weights.ndim - 1, per_sequence(weights, values)
    counted = jnp.where(jnp.isfinite(weights), weights, jnp.where(values == 0, 0, jnp.nan))
    return jnp.sum(wide(values) * counted, axis=sequences)


def sum_of_products(inputs: Array, output_grads: Array, weights: Array) -> Array:
    """Of scores that need not be made, s_i = inputs_iᵀ output_grads_i."""
    num_tokens, d_in = inputs.shape[-2:]
    is_narrow = wide_dtype(inputs.dtype) != inputs.dtype == output_grads.dtype
    size = weights.size * d_in * output_grads.shape[-1]
    if not is_narrow or num_tokens < _FEW_TOKENS or size > _MANY_ENTRIES:
        return _product_of_all(inputs, output_grads, weights)
    return jax.lax.platform_dependent(
        inputs, output_grads, weights, cpu=_product_of_all, default=_products_added_up
    )


def _product_of_all(inputs: Array, output_grads: Array, weights: Array) -> Array:
    grads = weighted(weights, output_grads, weights.ndim - 1)
    return contract("...bti,...bto->...io", inputs, grads)


def _products_added_up(inputs: Array, output_grads: Array, weights: Array) -> Array:
    """A TPU joins the sum to the products, if it is all that they are used for: it holds none."""
    finite = jnp.isfinite(weights)
    marks = per_sequence(jnp.where(finite, 1, jnp.nan), output_grads).astype(output_grads.dtype)
    grads = jnp.where(output_grads == 0, 0, output_grads * marks)
    products = contract("...bti,...bto->...bio", inputs, grads)
    safe = per_sequence(jnp.where(finite, weights, 1), products)
    return jnp.sum(products * safe, axis=weights.ndim - 1)
