"""Decoders of the Llama, Qwen2 and Qwen3 architectures in Flax NNX, with a key/value cache.

Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU feed-forward, a final
RMSNorm, and a head that may share the embedding table. A configuration says what the families
differ in: RMSNorm on every query and key head (Qwen3), biases on queries, keys and values (Qwen2),
rotary wavelengths stretched for long contexts (Llama 3). Every matmul is a plain `x @ kernel`.

Sequences are padded on the left, marked by `valid`. Padding changes nothing: positions count valid
tokens only, and no token attends to an invalid one. Blocks unrolled or scanned, rematerialised or
not, give the same numbers.

In bfloat16, RMSNorm's statistics, rotary angles and the attention's softmax are float32; their
results, the logits among them, are rounded to bfloat16.

Example:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> config = DecoderConfig(vocab_size=11, width=16, layers=1, heads=2, kv_heads=1, head_dim=8,
    ...                        hidden=32)
    >>> decoder = Decoder(config, rngs=nnx.Rngs(0))
    >>> decoder(jnp.array([3, 1, 4, 1, 5])).shape
    (5, 11)

Log-probabilities over a large vocabulary, without the logits of all tokens at once:
    >>> from proma_jax import policy_gradient as pg
    >>> tokens = jnp.array([3, 1, 4, 1, 5])
    >>> hidden, mask = decoder.hidden(tokens)[:-1], jnp.ones(4, bool)
    >>> pg.chunked_token_logprobs(hidden, decoder.head_kernel, tokens[1:], mask).shape
    (4,)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.config import DecoderConfig
from experiments.models.lora import Linear

LayerCache = tuple[jax.Array, jax.Array]


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, in a fixed number of slots.

    Attributes:
        layers: per block, keys and values, each (..., slots, kv_heads, head_dim); with
            `scan_layers` one pair alone, with a leading axis of blocks.
        valid: (..., slots) bool, which slots hold a token that may be attended to.
        length: () int32, how many slots are filled; the same for every sequence.
    """

    layers: tuple[LayerCache, ...]
    valid: jax.Array
    length: jax.Array


def empty_cache(config: DecoderConfig, batch: int, slots: int) -> KVCache:
    """A cache for `batch` sequences of at most `slots` tokens, padding included."""
    shape = (batch, slots, config.kv_heads, config.head_dim)
    zeros = jnp.zeros((config.layers, *shape) if config.scan_layers else shape, config.dtype)
    return KVCache(
        layers=((zeros, zeros),) * (1 if config.scan_layers else config.layers),
        valid=jnp.zeros((batch, slots), bool),
        length=jnp.zeros((), jnp.int32),
    )


def repeated(cache: KVCache, copies: int) -> KVCache:
    """A cache with every sequence `copies` times, side by side."""
    layers = jax.tree.map(lambda slots: jnp.repeat(slots, copies, axis=-4), cache.layers)
    return KVCache(layers, jnp.repeat(cache.valid, copies, axis=-2), cache.length)


def _write(slots: jax.Array, new: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(slots, new, start, axis % slots.ndim)


def rotary_frequencies(config: DecoderConfig) -> jax.Array:
    """Radians per position (head_dim / 2,) by which each pair of features turns."""
    exponents = jnp.arange(0, config.head_dim, 2) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    fits = scaling.original_max_position_embeddings * frequencies / (2 * jnp.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = jnp.clip((fits - scaling.low_freq_factor) / span, 0, 1)
    return frequencies * ((1 - kept) / scaling.factor + kept)


def _rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns the pairs (x[i], x[i + head_dim / 2]) by `angles` (..., T, head_dim / 2)."""
    cos, sin = (f(angles)[..., None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _linear(
    config: DecoderConfig, inputs: int, outputs: int, rngs: nnx.Rngs, use_bias: bool = False
) -> Linear:
    dtype = jnp.dtype(config.dtype)
    return Linear(inputs, outputs, use_bias=use_bias, param_dtype=dtype, rngs=rngs)


def _norm(config: DecoderConfig, features: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    dtype = jnp.dtype(config.dtype)
    return nnx.RMSNorm(features, epsilon=config.norm_epsilon, param_dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Causal grouped-query self-attention."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = _linear(config, config.width, queries, rngs, config.qkv_bias)
        self.k_proj = _linear(config, config.width, keys, rngs, config.qkv_bias)
        self.v_proj = _linear(config, config.width, keys, rngs, config.qkv_bias)
        self.o_proj = _linear(config, queries, config.width, rngs)
        self.q_norm = _norm(config, config.head_dim, rngs) if config.qk_norm else None
        self.k_norm = _norm(config, config.head_dim, rngs) if config.qk_norm else None

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
        queries, keys = self._heads(self.q_proj(x)), self._heads(self.k_proj(x))
        values = self._heads(self.v_proj(x))
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = _rotate(queries, angles), _rotate(keys, angles)
        if past is not None:
            keys = _write(past[0], keys, start, axis=-3)
            values = _write(past[1], values, start, axis=-3)
        attended = jax.nn.dot_product_attention(queries, keys, values, mask=mask[..., None, :, :])
        return self.o_proj(attended.reshape(*x.shape[:-1], -1)), (keys, values)


class SwiGLU(nnx.Module):
    """The gated feed-forward layer."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.gate_proj = _linear(config, config.width, config.hidden, rngs)
        self.up_proj = _linear(config, config.width, config.hidden, rngs)
        self.down_proj = _linear(config, config.hidden, config.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, config.width, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, config.width, rngs)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(self, x, angles, mask, past, start):
        attended, present = self.attention(self.attention_norm(x), angles, mask, past, start)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), present


class Decoder(nnx.Module):
    """Token ids to next-token logits."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.width, param_dtype=dtype, rngs=rngs)
        blocks = [Block(config, rngs=rngs) for _ in range(config.layers)]
        self.blocks = _stack(blocks) if config.scan_layers else nnx.List(blocks)
        self.norm = _norm(config, config.width, rngs)
        if not config.tied_head:
            self.head = _linear(config, config.width, config.vocab_size, rngs)

    def __call__(self, tokens: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """Logits of whole sequences.

        Args:
            tokens: (T,) or (b, T) int32.
            valid: bool, shaped like `tokens`; False marks padding. Default: no padding.

        Returns:
            (T, vocab_size) or (b, T, vocab_size) logits; row t predicts token t + 1.
        """
        return self.logits(self.hidden(tokens, valid))

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
        hidden, cache = self.extend_hidden(tokens, valid, cache)
        return self.logits(hidden), cache

    def hidden(self, tokens: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """What the head is applied to: (..., T, width), normalised. Arguments as of a call."""
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        run = self._block_runner(tokens, valid, jnp.int32(0))

        def step(x, block):
            return run(block, x, None)[0], None

        if self.config.remat:  # in a scan, nothing can merge the two computations
            step = jax.checkpoint(step, prevent_cse=not self.config.scan_layers)
        x = self.embed(tokens)
        if isinstance(self.blocks, Block):
            x, _ = jax.lax.scan(step, x, self.blocks)
        else:
            for block in self.blocks:
                x, _ = step(x, block)
        return self.norm(x)

    def extend_hidden(
        self, tokens: jax.Array, valid: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """As `extend`, with `hidden` states (b, T, width) instead of logits."""
        seen = _write(cache.valid, valid, cache.length, axis=-1)
        run = self._block_runner(tokens, seen, cache.length)
        put = jax.lax.dynamic_update_index_in_dim

        def step(carry, layer):
            x, slots = carry
            block, index = layer
            x, present = run(block, x, jax.tree.map(lambda s: s[index], slots))
            return (x, jax.tree.map(lambda s, p: put(s, p, index, 0), slots, present)), None

        x, layers = self.embed(tokens), cache.layers
        if isinstance(self.blocks, Block):  # what a scan carries is written in place
            blocks = self.blocks, jnp.arange(self.config.layers)
            (x, slots), _ = jax.lax.scan(step, (x, layers[0]), blocks)
            layers = (slots,)
        else:
            for i, block in enumerate(self.blocks):
                x, present = run(block, x, layers[i])
                layers = *layers[:i], present, *layers[i + 1 :]
        return self.norm(x), KVCache(layers, seen, cache.length + tokens.shape[-1])

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits (..., vocab_size) of hidden states (..., width)."""
        return self.embed.attend(hidden) if self.config.tied_head else self.head(hidden)

    @property
    def head_kernel(self) -> jax.Array:
        """(width, vocab_size): the head's kernel, or the transposed embedding table."""
        return self.embed.embedding[...].T if self.config.tied_head else self.head.kernel[...]

    def _block_runner(
        self, tokens: jax.Array, valid: jax.Array, start: jax.Array
    ) -> Callable[[Block, jax.Array, LayerCache | None], tuple[jax.Array, LayerCache]]:
        """Runs a block on tokens that stand in slots from `start` of those that `valid` marks."""
        slot = start + jnp.arange(tokens.shape[-1])
        causal = jnp.arange(valid.shape[-1]) <= slot[:, None]
        mask = causal & valid[..., None, :]
        position = jnp.take(jnp.cumsum(valid, axis=-1) - 1, slot, axis=-1)
        angles = position[..., None] * rotary_frequencies(self.config)
        return lambda block, x, past: block(x, angles, mask, past, start)


def _stack(blocks: list[Block]) -> Block:
    """One block, its parameters with a leading axis of `blocks`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
