"""Taps: operations that give what they always give, and in the backward pass their factors as well.

A tap takes probes, zeros that change nothing. Their "gradients" are what is wanted: of a matrix
product's input the input itself (`report`), of its result the result's gradient (`tapped`). The
parameter's own gradient is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from proma_jax._mesh.arrays import varying_like, zeros_like
from proma_jax.capture import _jaxpr
from proma_jax.capture._operations import Lookup
from proma_jax.capture.search import Use

Array = jax.Array


@jax.custom_vjp
def report(data: Array, probe: Array) -> Array:
    """`data`, which the backward pass also returns as the probe's gradient."""
    del probe
    return data


report.defvjp(lambda data, probe: (data, data), lambda data, grad: (grad, data))


def data_probe(use: Use) -> Array:
    """Zeros for what a use multiplies, or for its indices, in each iteration of their scans."""
    dtype = jnp.float32 if use.is_lookup else None
    variable = use.eqn.invars[use.operation.data]
    return zeros_like(variable.aval, use.scans[: use.num_source_scans], dtype)


def result_probe(use: Use) -> Array:
    """Zeros for the result of a use in each iteration of the scans around it."""
    return zeros_like(use.eqn.outvars[0].aval, use.scans)


def tapped(use: Use, operands: Sequence[Any], probes: tuple[Array | None, Array]) -> Array:
    """The result of a use's equation, whose gradient becomes that of the second probe.

    A lookup's indices become the gradient of the first probe, if there is one; the input of a
    matrix product is reported by `report`, since several products may share it and any of them may
    have no gradient.
    """
    if isinstance(use.operation, Lookup):
        return _tapped_lookup(use, use.operation, operands, probes)
    kernel_first = use.operation.kernel == 0
    kernel, data = operands if kernel_first else operands[::-1]

    def product(kernel: Array, data: Array) -> Array:
        in_order = (kernel, data) if kernel_first else (data, kernel)
        return _jaxpr.evaluate(use.eqn, *in_order)[0]

    @jax.custom_vjp
    def tap(kernel: Array, data: Array, probe: Array) -> Array:
        del probe
        return product(kernel, data)

    def forward_pass(kernel: Array, data: Array, probe: Array) -> tuple[Array, Array]:
        del probe
        return product(kernel, data), kernel

    def backward_pass(kernel: Array, result_grad: Array) -> tuple[None, Array, Array]:
        zeros = zeros_like(use.eqn.invars[use.operation.data].aval, ())
        like = varying_like(zeros, (kernel, result_grad))
        (data_grad,) = jax.linear_transpose(lambda x: product(kernel, x), like)(result_grad)
        return None, data_grad, result_grad

    tap.defvjp(forward_pass, backward_pass)
    return tap(kernel, data, probes[1])


def _tapped_lookup(
    use: Use, lookup: Lookup, operands: Sequence[Any], probes: tuple[Array | None, Array]
) -> Array:
    """See `tapped`."""
    is_reported = probes[0] is not None

    @jax.custom_vjp
    def tap(operands: Sequence[Any], probes: Any) -> Array:
        del probes
        return _jaxpr.evaluate(use.eqn, *operands)[0]

    def forward_pass(operands: Sequence[Any], probes: Any) -> tuple[Array, Array]:
        return tap(operands, probes), operands[lookup.data]

    def backward_pass(indices: Array, result_grad: Array) -> tuple[None, Any]:
        return None, (_as_float(lookup, indices) if is_reported else None, result_grad)

    tap.defvjp(forward_pass, backward_pass)
    return tap(list(operands), probes)


def _as_float(lookup: Lookup, indices: Array) -> Array:
    """Indices as a probe's gradient, which is float32: exact in bounds, out of bounds outside."""
    return jnp.clip(indices.astype(jnp.float32), -1, lookup.num_embeddings)
