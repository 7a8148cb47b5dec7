"""A compact decoder of the Qwen3 architecture in Flax NNX, with an explicit key/value cache.

Pre-norm blocks of grouped-query attention (RMSNorm on every query and key head, rotary positions)
and a SwiGLU feed-forward, a final RMSNorm, and a head that may share the embedding table. No
biases anywhere, and every matmul is a plain `x @ kernel`.

Sequences are padded on the left, marked by `valid`. Padding changes nothing: positions count valid
tokens only, and no token attends to an invalid one.

Example:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> config = DecoderConfig(vocab_size=11, width=16, layers=1, heads=2, kv_heads=1, head_dim=8,
    ...                        hidden=32)
    >>> decoder = Decoder(config, rngs=nnx.Rngs(0))
    >>> decoder(jnp.array([3, 1, 4, 1, 5])).shape
    (5, 11)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic.dataclasses import dataclass

from experiments import checked

LayerCache = tuple[jax.Array, jax.Array]


@dataclass(frozen=True, config=checked.CONFIG)
class DecoderConfig:
    """The shape of a decoder."""

    vocab_size: checked.Count = 14
    """Rows of the embedding table."""
    width: checked.Count = 96
    """Features of the residual stream."""
    layers: checked.Count = 2
    """Number of blocks."""
    heads: checked.Count = 4
    """Query heads."""
    kv_heads: checked.Count = 2
    """Key and value heads; each serves heads / kv_heads query heads."""
    head_dim: checked.Count = 24
    """Features of one head; even, because rotary positions turn pairs of features."""
    hidden: checked.Count = 256
    """Features inside the SwiGLU feed-forward."""
    rope_theta: checked.Positive = 10_000.0
    """Base of the rotary wavelengths."""
    norm_epsilon: checked.Positive = 1e-6
    """Added to the mean square inside every RMSNorm."""
    tied_head: bool = True
    """Whether the output head is the embedding table."""

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even")

    @property
    def narrowest(self) -> int:
        """The least number of inputs or outputs of any matrix but the embedding table."""
        sizes = [self.width, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden]
        return min(sizes if self.tied_head else [*sizes, self.vocab_size])


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, in a fixed number of slots.

    Attributes:
        layers: per block, keys and values, each (..., slots, kv_heads, head_dim).
        valid: (..., slots) bool, which slots hold a token that may be attended to.
        length: () int32, how many slots are filled; the same for every sequence.
    """

    layers: tuple[LayerCache, ...]
    valid: jax.Array
    length: jax.Array


def empty_cache(config: DecoderConfig, batch: int, slots: int) -> KVCache:
    """A cache for `batch` sequences of at most `slots` tokens, padding included."""
    zeros = jnp.zeros((batch, slots, config.kv_heads, config.head_dim))
    return KVCache(
        layers=((zeros, zeros),) * config.layers,
        valid=jnp.zeros((batch, slots), bool),
        length=jnp.zeros((), jnp.int32),
    )


def _write(slots: jax.Array, new: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(slots, new, start, axis % slots.ndim)


def _rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns the pairs (x[i], x[i + head_dim / 2]) by `angles` (..., T, head_dim / 2)."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """Causal grouped-query self-attention with normalised queries and keys."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        def linear(features_in, features_out):
            return nnx.Linear(features_in, features_out, use_bias=False, rngs=rngs)

        def norm():
            return nnx.RMSNorm(config.head_dim, epsilon=config.norm_epsilon, rngs=rngs)

        self.head_dim = config.head_dim
        self.q_proj = linear(config.width, config.heads * config.head_dim)
        self.k_proj = linear(config.width, config.kv_heads * config.head_dim)
        self.v_proj = linear(config.width, config.kv_heads * config.head_dim)
        self.o_proj = linear(config.heads * config.head_dim, config.width)
        self.q_norm = norm()
        self.k_norm = norm()

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], -1, self.head_dim)

    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array,
        mask: jax.Array,
        past: LayerCache | None,
        start: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """Attends from `x` (..., T, width) to `x` or, given `past`, to that with `x` at `start`."""
        queries = _rotate(self.q_norm(self._heads(self.q_proj(x))), angles)
        keys = _rotate(self.k_norm(self._heads(self.k_proj(x))), angles)
        values = self._heads(self.v_proj(x))
        if past is not None:
            keys = _write(past[0], keys, start, axis=-3)
            values = _write(past[1], values, start, axis=-3)
        attended = jax.nn.dot_product_attention(queries, keys, values, mask=mask[..., None, :, :])
        return self.o_proj(attended.reshape(*x.shape[:-1], -1)), (keys, values)


class SwiGLU(nnx.Module):
    """The gated feed-forward layer."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.gate_proj = nnx.Linear(config.width, config.hidden, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(config.width, config.hidden, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(config.hidden, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(self, x, angles, mask, past, start):
        attended, present = self.attention(self.attention_norm(x), angles, mask, past, start)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), present


class Decoder(nnx.Module):
    """Token ids to next-token logits."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)
        if not config.tied_head:
            self.head = nnx.Linear(config.width, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """Logits of whole sequences.

        Args:
            tokens: (T,) or (b, T) int32.
            valid: bool, shaped like `tokens`; False marks padding. Default: no padding.

        Returns:
            (T, vocab_size) or (b, T, vocab_size) logits; row t predicts token t + 1.
        """
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        return self._forward(tokens, valid, (None,) * self.config.layers, jnp.int32(0))[0]

    def extend(
        self, tokens: jax.Array, valid: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Logits of the next tokens of sequences whose beginnings are in `cache`.

        Args:
            tokens: (b, T) int32: a prompt (T of its length) or one decoding step (T = 1). The cache
                must have T slots left, which is the caller's to see to.
            valid: (b, T) bool; False marks padding.
            cache: what came before.

        Returns:
            (b, T, vocab_size) logits, the same as the full forward's, and the extended cache.
        """
        seen = _write(cache.valid, valid, cache.length, axis=-1)
        logits, layers = self._forward(tokens, seen, cache.layers, cache.length)
        return logits, KVCache(layers, seen, cache.length + tokens.shape[-1])

    def _forward(self, tokens, valid, past, start):
        slot = start + jnp.arange(tokens.shape[-1])
        causal = jnp.arange(valid.shape[-1]) <= slot[:, None]
        mask = causal & valid[..., None, :]
        position = jnp.take(jnp.cumsum(valid, axis=-1) - 1, slot, axis=-1)
        exponents = jnp.arange(0, self.config.head_dim, 2) / self.config.head_dim
        angles = position[..., None] * self.config.rope_theta**-exponents

        x = self.embed(tokens)
        present = []
        for block, memory in zip(self.blocks, past, strict=True):
            x, seen = block(x, angles, mask, memory, start)
            present.append(seen)
        x = self.norm(x)
        logits = self.embed.attend(x) if self.config.tied_head else self.head(x)
        return logits, tuple(present)
