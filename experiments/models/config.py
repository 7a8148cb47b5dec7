"""The shape of a decoder of the Llama, Qwen2 or Qwen3 architecture, and how it is run."""

from typing import Annotated, Literal

import tyro
from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments import checked


@dataclass(frozen=True, config=checked.CONFIG)
class Llama3Rope:
    """How Llama 3 stretches rotary wavelengths that its first training saw less than once."""

    factor: checked.Positive
    """By how much the longest wavelengths grow."""
    low_freq_factor: checked.Positive
    """Wavelengths that fit less often into the original context grow by the whole factor."""
    high_freq_factor: checked.Positive
    """Wavelengths that fit more often into it stay; those between grow by a part of the factor."""
    original_max_position_embeddings: checked.Count
    """The original context, in tokens."""

    def __post_init__(self):
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be greater than "
                f"low_freq_factor={self.low_freq_factor}"
            )


@dataclass(frozen=True, config=checked.CONFIG)
class DecoderConfig:
    """The shape of a decoder."""

    vocab_size: Annotated[int, Field(ge=0)] = 0
    """Rows of the embedding table. With 0 a warm start takes as many as its task has tokens."""
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
    qk_norm: bool = True
    """Whether each query and key head passes an RMSNorm, as in Qwen3."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases, as in Qwen2."""
    rope_scaling: Annotated[Llama3Rope | None, tyro.conf.Suppress] = None
    """Changes rotary wavelengths as Llama 3 does."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters, activations and the key/value cache."""
    scan_layers: bool = False
    """Whether blocks are stacked and run by `jax.lax.scan`, which compiles one block for all."""
    remat: bool = False
    """Whether the backward pass computes each block's activations anew (`jax.checkpoint`)."""

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even")

    @property
    def narrowest_in_blocks(self) -> int:
        """The least number of inputs or outputs of any matrix in a block."""
        return min(self.width, self.kv_heads * self.head_dim, self.hidden)

    @property
    def narrowest(self) -> int:
        """The least number of inputs or outputs of any matrix but the embedding table."""
        blocks = self.narrowest_in_blocks
        return blocks if self.tied_head else min(blocks, self.vocab_size)
