"""PROMA written down as it reads, layer by layer and sequence by sequence, to compare with.

This is how hooks on the linear layers of an eager framework would go about it: one score after the
other in a Python loop, Gaussian noise of as many rows as there are tokens, a QR decomposition for
every basis. It projects plain `x @ kernel` layers only, in float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import proma_jax as proma
from proma_jax.scores.leaf import is_score_leaf

_EPSILON = 1e-8
_RIDGE = 1e-2
_RELATIVE_BOUND = 0.5


def accumulated(total, gradient, inputs, output_grads):
    """The running gradient of a layer without its part in the span of the scores, plus `gradient`.

    Args:
        total: (d_in, d_out), the running gradient.
        gradient: (d_in, d_out), the microbatch's.
        inputs: (b, T, d_in).
        output_grads: (b, T, d_out).
    """
    scores = []
    for x, d in zip(inputs, output_grads, strict=True):
        score = (x.T @ d).ravel()
        scores.append(score / (jnp.linalg.norm(score) + _EPSILON))
    rows = jnp.stack(scores)
    gram = rows @ rows.T + _RIDGE * jnp.eye(len(rows))
    weights = jnp.linalg.solve(gram, rows @ total.ravel())
    span_part = (weights @ rows).reshape(total.shape)
    limit = _RELATIVE_BOUND * jnp.linalg.norm(gradient)
    length = jnp.linalg.norm(span_part)
    scale = jnp.where(length > limit, limit / (length + _EPSILON), 1.0)
    return total - scale * span_part + gradient


def projected(gradient, inputs, output_grads, rank, key):
    """The gradient (d_in, d_out) of a layer without its part in the dominant subspaces."""
    rows = [x.reshape(-1, x.shape[-1]) for x in (inputs, output_grads)]
    rank = min(rank, *rows[0].shape, rows[1].shape[1])

    def basis(x, key):
        y = x.T @ jax.random.normal(key, (len(x), rank))
        return jnp.linalg.qr(x.T @ (x @ y))[0]

    q_x, q_d = (basis(x, key) for x, key in zip(rows, jax.random.split(key), strict=True))
    return gradient - q_x @ (q_x.T @ gradient @ q_d) @ q_d.T


def map_kernels(
    kernel_fn: Callable[..., jax.Array],
    other_fn: Callable[..., jax.Array],
    scores: Any,
    *trees: Any,
) -> Any:
    """Calls `kernel_fn(*leaves, inputs, output_grads)` on one layer's kernel after the other.

    Args:
        kernel_fn: takes the leaves of `trees` for one kernel and its factors, in float32.
        other_fn: takes the leaves of `trees` for what is no kernel.
        scores: from `proma.sequence_scores`.
        *trees: shaped like the parameters.
    """

    def one_leaf(leaf, *values):
        if not isinstance(leaf, proma.LayerFactors):
            return other_fn(*values)
        factors = [leaf.tokens(name).astype(jnp.float32) for name in ("inputs", "output_grads")]
        values = tuple(value.astype(jnp.float32) for value in values)
        if not leaf.num_layer_axes:
            return kernel_fn(*values, *factors)
        layers = zip(*values, *factors, strict=True)
        return jnp.stack([kernel_fn(*layer) for layer in layers])

    return jax.tree.map(one_leaf, scores, *trees, is_leaf=is_score_leaf)
