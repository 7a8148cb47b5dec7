"""A decoder of the Qwen3 architecture as pure functions, to be timed in every layout.

Pre-norm blocks of grouped-query attention (RMSNorm on every query and key head, rotary positions)
and a SwiGLU feed-forward, a final RMSNorm, and the embedding table as the head. Its blocks are
unrolled or scanned over stacked parameters, rematerialised or not: the same numbers each time.

Example:
    >>> import jax
    >>> config = DecoderConfig(vocab=11, width=16, layers=2, heads=2, kv_heads=1, head_dim=8,
    ...                        hidden=32)
    >>> params = init(config, jax.random.key(0))
    >>> token_logprobs(config, params, jax.numpy.array([[3, 1, 4], [1, 5, 9]])).shape
    (2, 2)
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from proma_jax import policy_gradient as pg

Params = dict[str, Any]
DtypeName = Literal["float32", "bfloat16"]

_ROPE_THETA = 1e6
_NORM_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder, and how it is run."""

    vocab: int
    """Rows of the embedding table."""
    width: int
    """Features of the residual stream."""
    layers: int
    """Number of blocks."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads; each serves heads / kv_heads query heads."""
    head_dim: int
    """Features of one head, an even number."""
    hidden: int
    """Features inside the SwiGLU feed-forward."""
    scanned: bool = False
    """Whether the blocks' parameters are stacked and `jax.lax.scan` runs over them."""
    remat: bool = False
    """Whether the backward pass computes each block's activations anew (`jax.checkpoint`)."""
    dtype: DtypeName = "float32"
    """Of parameters and activations; the softmaxes are float32."""
    tied: bool = True
    """Whether the embedding table is the head too; else it has a kernel of its own."""
    logits_at_a_time: int | None = None
    """Tokens of a sequence whose logits are formed together. Default: all of them. If set, the
    log-probabilities of a bfloat16 decoder are rounded to bfloat16."""

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even")


def kernel_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of each kernel of a block."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "query": (config.width, queries),
        "key": (config.width, keys),
        "value": (config.width, keys),
        "output": (queries, config.width),
        "gate": (config.width, config.hidden),
        "up": (config.width, config.hidden),
        "down": (config.hidden, config.width),
    }


def init(config: DecoderConfig, key: jax.Array) -> Params:
    """Random parameters: kernels of variance 1 / d_in, norms of 1.

    Returns:
        "embedding" (vocab, width), "norm" (width,) and "layers": a list of one dict per block, or,
        `scanned`, one dict of arrays with a leading layer axis. Not `tied`: "head" (width, vocab).
    """

    def matrix(key, shape, fan_in):
        return (jax.random.normal(key, shape) * fan_in**-0.5).astype(config.dtype)

    def block(key):
        shapes = kernel_shapes(config)
        keys = jax.random.split(key, len(shapes))
        norms = {"attention_norm": config.width, "mlp_norm": config.width}
        norms |= {"query_norm": config.head_dim, "key_norm": config.head_dim}
        kernels = zip(shapes.items(), keys, strict=True)
        return {name: jnp.ones(size, config.dtype) for name, size in norms.items()} | {
            name: matrix(key, shape, shape[0]) for (name, shape), key in kernels
        }

    keys = jax.random.split(key, 1 + config.layers)
    embedding_key, block_keys = keys[0], keys[1:]
    blocks = jax.vmap(block)(block_keys) if config.scanned else [block(key) for key in block_keys]
    params = {
        "embedding": matrix(embedding_key, (config.vocab, config.width), config.width),
        "layers": blocks,
        "norm": jnp.ones(config.width, config.dtype),
    }
    if not config.tied:
        head_key = jax.random.fold_in(embedding_key, 1)
        params["head"] = matrix(head_key, (config.width, config.vocab), config.width)
    return params


def stack(blocks: list[Params]) -> Params:
    """The parameters of blocks with a leading layer axis, as a scanned decoder takes them."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


def _rms_norm(x, scale):
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide**2, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + _NORM_EPSILON)).astype(x.dtype) * scale


def _rotate(x):
    """Turns the pairs (x[i], x[i + head_dim / 2]) of (..., T, heads, head_dim) by position."""
    *_, length, _, size = x.shape
    frequencies = _ROPE_THETA ** -(jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attention(config, params, x):
    def heads(name):
        return (x @ params[name]).reshape(*x.shape[:-1], -1, config.head_dim)

    queries = _rotate(_rms_norm(heads("query"), params["query_norm"]))
    keys = _rotate(_rms_norm(heads("key"), params["key_norm"]))
    grouped = queries.reshape(*x.shape[:-1], config.kv_heads, -1, config.head_dim)
    weights = jnp.einsum(
        "...tkgd,...skd->...kgts", grouped, keys, preferred_element_type=jnp.float32
    )
    causal = jnp.tril(jnp.ones((x.shape[-2], x.shape[-2]), bool))
    weights = jnp.where(causal, weights * config.head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(weights, axis=-1).astype(x.dtype)
    attended = jnp.einsum("...kgts,...skd->...tkgd", weights, heads("value"))
    return attended.reshape(*x.shape[:-1], -1) @ params["output"]


def _block(config, params, x):
    x = x + _attention(config, params, _rms_norm(x, params["attention_norm"]))
    normed = _rms_norm(x, params["mlp_norm"])
    gated = jax.nn.silu(normed @ params["gate"]) * (normed @ params["up"])
    return x + gated @ params["down"]


def token_logprobs(config: DecoderConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Log-probabilities (..., T - 1), float32, of all tokens (..., T) but the first."""

    def block(params, x):
        return _block(config, params, x)

    if config.remat:  # inside a scan, nothing can merge the two computations
        block = jax.checkpoint(block, prevent_cse=not config.scanned)
    x = params["embedding"][tokens]
    if config.scanned:
        x, _ = jax.lax.scan(lambda x, layer: (block(layer, x), None), x, params["layers"])
    else:
        for layer in params["layers"]:
            x = block(layer, x)
    x = _rms_norm(x, params["norm"])[..., :-1, :]
    head = params["embedding"].T if config.tied else params["head"]
    if config.logits_at_a_time:
        mask = jnp.ones(x.shape[:-1], bool)
        return pg.chunked_token_logprobs(
            x, head, tokens[..., 1:], mask, chunk_size=config.logits_at_a_time
        ).astype(jnp.float32)
    logits = (x @ head).astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[..., 1:, None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def logprob(config: DecoderConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Log-probability of ONE sequence of tokens (T,), given the first of them."""
    return jnp.sum(token_logprobs(config, params, tokens))


def gradient_flops(config: DecoderConfig, tokens: int) -> int:
    """Floating point operations of the matmuls in the gradient of one sequence's `logprob`.

    The forward pass counts once, the backward pass twice; attention counts all T² pairs, as it is
    computed here. Rematerialisation adds another forward pass of the blocks.
    """
    kernels = sum(d_in * d_out for d_in, d_out in kernel_shapes(config).values())
    pairs = 2 * tokens * tokens * config.heads * config.head_dim
    blocks = 2 * config.layers * (tokens * kernels + pairs)
    head = 2 * (tokens - 1) * config.vocab * config.width
    return (4 if config.remat else 3) * blocks + 3 * head
