"""Arithmetic that the whole library shares: in float32 or wider, at full precision, at every scale.

Example:
  >>> import jax.numpy as jnp
  >>> ones = jnp.ones((2, 3), jnp.bfloat16)
  >>> contract("ij,kj->ik", ones, ones).dtype, float(layer_norms(ones * 1e30)) > 2e30
  (dtype('float32'), True)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

AxisName = str | tuple[str, ...] | None
"""Of one or several axes mapped by `jax.shard_map` or `jax.pmap`, None for none."""


def wide_dtype(dtype: Any) -> Any:
    """Float64 for float64, else float32."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def wide(x: Array) -> Array:
    """At least float32: everything inside the library is computed in this type."""
    return x.astype(wide_dtype(x.dtype))


def contract(subscripts: str, *operands: Array) -> Array:
    """An einsum summed in at least float32.

    The product of two bfloat16 or float16 numbers is exact in float32, so operands of one narrow
    type are multiplied as they are, at the speed of that type.
    """
    dtype = functools.reduce(jnp.promote_types, map(wide_dtype, (x.dtype for x in operands)))
    if len({x.dtype for x in operands}) > 1:
        operands = tuple(x.astype(dtype) for x in operands)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum(subscripts, *operands, precision=highest, preferred_element_type=dtype)


def divide(x: Array, by: Array) -> Array:
    """Quotient x / by, and x where by is zero."""
    return x / jnp.where(by == 0, 1, by)


def layer_norms(layers: Array, num_layer_axes: int = 0) -> Array:
    """Frobenius norms over all but the leading layer axes, free of overflow and underflow."""
    layers = wide(layers)
    axes = tuple(range(num_layer_axes, layers.ndim))
    size = jnp.max(jnp.abs(layers), axis=axes, keepdims=True, initial=0)
    moderate = divide(layers, size)
    return jnp.squeeze(size, axes) * sqrt(jnp.sum(moderate**2, axis=axes))


def sqrt(x: Array) -> Array:
    """The square root, with gradient 0 at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0 * x)
