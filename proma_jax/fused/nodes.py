"""Nodes: functions of one sequence whose backward pass sees all sequences of a microbatch.

A node is put into the program where the data of some matrix products are met, and hands each
product a probe of zeros, of its result's shape. A `custom_vmap` maps it over the sequences, so that
in the backward pass it has the gradients of all probes, of all sequences, together: what it makes
of them leaves as the "gradient" of its arguments.

What is accumulated over the layers, G, goes through the nodes as a gradient itself: a node returns
an argument `carried` as it is, and its backward pass, given G as the gradient of what it returned,
adds to it and gives it on as the gradient of what it was given. So XLA can add in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from proma_jax._mesh.arrays import varying_like, zeros_like

Array = jax.Array


def node(
    fold: Callable[..., Any], like: Sequence[tuple[Any, Sequence[int]]]
) -> Callable[..., tuple[list[Array], Any]]:
    """A function of one sequence that makes probes, whose gradients it sees for all sequences.

    Args:
      fold: (data, coefficients, layers, numbers, gradient of carried, gradients of the probes), the
        data, coefficients and gradients of the probes of all sequences, to the gradients of
        `places` and `carried`.
      like: for each probe the variable that it is shaped like for one sequence, and the lengths of
        scans, which are further axes in front.

    Returns:
      (data, coefficient, layers, numbers, places, carried) to (the probes, which are zeros, and
      carried).
    """

    def of_sequence(
        data: Array, coefficient: Array, layers: Any, numbers: Any, places: Any, carried: Any
    ) -> tuple[list[Array], Any]:
        del layers, numbers, places
        probes = [zeros_like(variable.aval, lengths) for variable, lengths in like]
        return varying_like(probes, (data, coefficient)), carried

    @jax.custom_vjp
    def of_all(data: Array, coefficients: Array, *rest: Any) -> tuple[list[Array], Any]:
        probes, carried = of_sequence(data, coefficients, *rest)
        return [for_each(coefficients, probe) for probe in probes], carried

    def forward(*arguments: Any) -> Any:
        return of_all(*arguments), arguments[:4]

    def backward(seen: Any, gradients: tuple[list[Array], Any]) -> tuple[Any, ...]:
        of_probes, of_carried = gradients
        return None, None, None, None, *fold(*seen, of_carried, of_probes)

    of_all.defvjp(forward, backward)
    of_one = jax.custom_batching.custom_vmap(of_sequence)

    @of_one.def_vmap
    def _(axis_size: int, in_batched: Any, *arguments: Any) -> tuple[Any, Any]:
        del axis_size
        return of_all(*arguments), ([True] * len(like), in_batched[-1])

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
