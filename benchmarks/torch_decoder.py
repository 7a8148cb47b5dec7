"""The decoder of `benchmarks.decoder` in PyTorch: the same architecture, arithmetic and shapes.

Its blocks are rematerialised in the backward pass. They and the head run eagerly or, `compiled`,
through `torch.compile`: one block is compiled, and serves for all.
"""

import functools
from typing import Any

import torch  # type: ignore[import-not-found]
from torch import nn
from torch.nn import functional as F  # type: ignore[import-not-found]
from torch.utils import checkpoint  # type: ignore[import-not-found]

from benchmarks.decoder import DecoderConfig, kernel_shapes

_ROPE_THETA = 1e6
_NORM_EPSILON = 1e-6


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _Block(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        for name, (d_in, d_out) in kernel_shapes(config).items():
            self.add_module(name, nn.Linear(d_in, d_out, bias=False))
        for name, size in (
            ("attention_norm", config.width),
            ("mlp_norm", config.width),
            ("query_norm", config.head_dim),
            ("key_norm", config.head_dim),
        ):
            self.add_module(name, nn.RMSNorm(size, eps=_NORM_EPSILON))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(b, T, heads · head_dim) as (b, heads, T, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        normed = self.attention_norm(x)
        queries = _rotate(self.query_norm(self._heads(self.query(normed))), cos, sin)
        keys = _rotate(self.key_norm(self._heads(self.key(normed))), cos, sin)
        values = self._heads(self.value(normed))
        attended = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=True
        )
        x = x + self.output(attended.transpose(1, 2).flatten(-2))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def _chosen_logprobs(x: torch.Tensor, table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    logits = (x[:, :-1] @ table.T).float()
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return -losses.unflatten(0, (len(tokens), -1))


class Decoder(nn.Module):
    """The decoder that a config describes, with random parameters.

    Args:
        config: its embedding table is the head too.
        device: where the parameters are.
        backend: of `torch.compile`.

    Attributes:
        linears: the linear layers by name, those of `kernel_shapes` for each block.
    """

    def __init__(self, config: DecoderConfig, device: str, backend: str = "inductor"):
        super().__init__()
        if not config.tied:
            raise ValueError(f"{config.tied=} must be True")
        self.config = config
        self.backend = backend
        with torch.device(device):
            self.embedding = nn.Embedding(config.vocab, config.width)
            self.layers = nn.ModuleList(_Block(config) for _ in range(config.layers))
            self.norm = nn.RMSNorm(config.width, eps=_NORM_EPSILON)
        self.linears = {
            f"{number}.{name}": getattr(block, name)
            for number, block in enumerate(self.layers)
            for name in kernel_shapes(config)
        }
        for matrix in (self.embedding, *self.linears.values()):
            nn.init.normal_(matrix.weight, std=matrix.weight.shape[1] ** -0.5)
        self.to(getattr(torch, config.dtype))

    @functools.cached_property
    def _compiled(self) -> tuple[list[Any], Any]:
        blocks = [torch.compile(block, backend=self.backend) for block in self.layers]
        return blocks, torch.compile(_chosen_logprobs, backend=self.backend)

    def forward(self, tokens: torch.Tensor, compiled: bool = False) -> torch.Tensor:
        """Log-probabilities (b, T - 1), float32, of all tokens (b, T) but the first."""
        half = self.config.head_dim // 2
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        frequencies = _ROPE_THETA ** -(torch.arange(half, device=tokens.device) / half)
        angles = positions[:, None] * frequencies
        x = self.embedding(tokens)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        blocks, head = self._compiled if compiled else (self.layers, _chosen_logprobs)
        for block in blocks:
            x = checkpoint.checkpoint(block, x, cos, sin, use_reentrant=False)
        return head(self.norm(x), self.embedding.weight, tokens)
