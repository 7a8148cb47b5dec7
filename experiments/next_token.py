"""Which token comes next: drawn from logits, all of them or the likeliest.

A row of V logits takes two random numbers, where `jax.random.categorical` takes V: the first
chooses one of some √V blocks of tokens, the second a token of that block. A token of probability
zero, or one that is left out, is never drawn, however sums are rounded.
"""

import math

import jax
import jax.numpy as jnp


def drawn(
    key: jax.Array, logits: jax.Array, *, top_p: float = 1.0, top_k: int | None = None
) -> jax.Array:
    """A token for each row.

    Args:
        key: PRNG key.
        logits: (n, V) float32.
        top_p: only the likeliest tokens that make up this probability are drawn.
        top_k: only so many of the likeliest tokens are drawn; None: all.

    Returns:
        (n,) int32.

    Example:
        >>> logits = jnp.log(jnp.array([[0.0, 0.3, 0.7]])).repeat(4000, axis=0)
        >>> tokens = drawn(jax.random.key(0), logits)
        >>> [round(float((tokens == token).mean()), 1) for token in range(3)]
        [0.0, 0.3, 0.7]
    """
    probabilities = jax.nn.softmax(_allowed(logits, top_p, top_k))
    count, size = len(logits), math.isqrt(logits.shape[-1])
    padding = (0, 0), (0, -logits.shape[-1] % size)
    blocks = jnp.pad(probabilities, padding).reshape(count, -1, size)
    of_block, in_block = jax.random.split(key)
    block = _place(of_block, blocks.sum(axis=-1))
    chosen = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * size + _place(in_block, chosen)


def _allowed(logits: jax.Array, top_p: float, top_k: int | None) -> jax.Array:
    """The logits, with -inf for the tokens that are left out."""
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _place(key: jax.Array, weights: jax.Array) -> jax.Array:
    """A place (n,) in each row of weights (n, m), drawn in proportion to them."""
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    part = 1 - jax.random.uniform(key, (len(weights), 1))  # more than 0, and at most 1
    return jnp.argmax(sums >= part * jnp.max(sums, axis=-1, keepdims=True), axis=-1)
