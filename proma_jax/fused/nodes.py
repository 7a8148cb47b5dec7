"""Nodes: functions of one sequence whose backward pass sees all sequences of a microbatch.

A node is put into the program where the data of some matrix products are met, and hands each
product a probe of zeros, of its result's shape. A `custom_vmap` maps it over the sequences, so that
in the backward pass it has the gradients of all probes, of all sequences, together: what it makes
of them leaves as the "gradient" of one of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from proma_jax._mesh.arrays import varying_like, zeros_like
from proma_jax.project import core

Array = jax.Array


def node(
    fold: Callable[..., Any], like: Sequence[tuple[Any, Sequence[int]]]
) -> Callable[[Array, Array, Any, core.Microbatch], list[Array]]:
    """A function of one sequence that makes probes, whose gradients it sees for all sequences.

    Args:
      fold: (data, coefficients, slots, numbers, gradients of the probes), with data, coefficients
        and gradients of all sequences, to the gradient of `slots`.
      like: for each probe the variable that it is shaped like for one sequence, and the lengths of
        scans, which are further axes in front.

    Returns:
      (data, coefficient, slots, numbers) to the probes, zeros.
    """

    def zeros(data: Array, coefficient: Array, slots: Any, numbers: core.Microbatch) -> list[Array]:
        del slots, numbers
        probes = [zeros_like(variable.aval, lengths) for variable, lengths in like]
        return varying_like(probes, (data, coefficient))

    @jax.custom_vjp
    def of_all(
        data: Array, coefficients: Array, slots: Any, numbers: core.Microbatch
    ) -> list[Array]:
        probes = zeros(data, coefficients, slots, numbers)
        return [for_each(coefficients, probe) for probe in probes]

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


def for_each(coefficients: Array, x: Array) -> Array:
    """(b, *x.shape): x for each sequence; `where` lends it the sharding of the coefficients."""

    def of_one(coefficient: Array, x: Array) -> Array:
        return jnp.where(coefficient == coefficient, x, x)

    return jax.vmap(of_one, (0, None))(coefficients, x)


@jax.custom_batching.custom_vmap
def own_data(data: Array, coefficient: Array) -> Array:
    """A sequence's own data: each has a gradient of its own, even if the data are common to all."""
    del coefficient
    return data


@own_data.def_vmap
def _(axis_size: int, in_batched: Any, data: Array, coefficients: Array) -> tuple[Array, bool]:
    del axis_size
    return data if in_batched[0] else for_each(coefficients, data), True
