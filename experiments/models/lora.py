"""Low-rank adapters (LoRA): all that is trained of a large decoder, whose own weights stay.

A linear layer with an adapter computes x W + (alpha / rank) x A B, with A (inputs, rank) drawn at
random and B (rank, outputs) zero at first, so that the start is the decoder as it was. This is the
method of Hu et al. (2021), https://arxiv.org/abs/2106.09685, with the start of its authors' code
and of PEFT. The adapters are float32 whatever the decoder is: small steps are lost in bfloat16.

`nnx.LoRA` has neither the factor nor the leading axis of layers that are scanned.

Example:
    >>> from experiments.models.decoder import Decoder, DecoderConfig
    >>> config = DecoderConfig(vocab_size=11, width=16, layers=1, heads=2, kv_heads=1, head_dim=8,
    ...                        hidden=32)
    >>> graphdef, params = add(*nnx.split(Decoder(config, rngs=nnx.Rngs(0))), rank=2, alpha=16.0)
    >>> adapters, frozen = split(params)
    >>> adapters["blocks"][0]["mlp"]["up_proj"]["adapter"]["a"].shape
    (16, 2)
    >>> graphdef, params = merge(graphdef, nnx.merge_state(adapters, frozen))
    >>> list(params["blocks"][0]["mlp"]["up_proj"])
    ['kernel']
"""

import jax
import jax.numpy as jnp
from flax import nnx


class Adapter(nnx.Module):
    """A low-rank matrix beside a kernel of a shape (*layers, inputs, outputs)."""

    def __init__(self, shape: tuple[int, ...], rank: int, alpha: float, *, rngs: nnx.Rngs):
        *layers, inputs, outputs = shape
        uniform = nnx.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", batch_axis=range(len(layers))
        )
        self.a = nnx.LoRAParam(uniform(rngs.params(), (*layers, inputs, rank), jnp.float32))
        self.b = nnx.LoRAParam(jnp.zeros((*layers, rank, outputs), jnp.float32))
        self.factor = alpha / rank

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.factor * ((x @ self.a[...]) @ self.b[...])

    @property
    def kernel(self) -> jax.Array:
        """The matrix."""
        product = jnp.matmul(self.a[...], self.b[...], precision=jax.lax.Precision.HIGHEST)
        return self.factor * product


class Linear(nnx.Linear):
    """A linear layer that may have an adapter."""

    adapter: Adapter | None = None

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        y = super().__call__(x)
        return y if self.adapter is None else y + self.adapter(x).astype(y.dtype)


def add(
    graphdef: nnx.GraphDef, params: nnx.State, rank: int, alpha: float
) -> tuple[nnx.GraphDef, nnx.State]:
    """A decoder with an adapter on every linear layer of its blocks, drawn from one seed always.

    These are the queries, keys, values and outputs of the attention, and the feed-forward's three.
    """
    decoder, rngs = nnx.merge(graphdef, params), nnx.Rngs(0)
    for linear in _linears(decoder):
        linear.adapter = Adapter(linear.kernel.shape, rank, alpha, rngs=rngs)
    return nnx.split(decoder)


def split(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """What is trained of a decoder's parameters, and what is not: nothing, if it has no adapters.

    `nnx.merge_state` puts them together again.
    """
    adapters, others = nnx.split_state(params, nnx.LoRAParam, ...)
    return (adapters, others) if adapters else (others, adapters)


def merge(graphdef: nnx.GraphDef, params: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
    """The decoder whose weights have the adapters added to them, rounded to their type."""
    decoder = nnx.merge(graphdef, params)
    for linear in _linears(decoder):
        if linear.adapter is not None:
            kernel = linear.kernel[...] + linear.adapter.kernel
            linear.kernel = nnx.Param(kernel.astype(linear.kernel.dtype))
            del linear.adapter
    return nnx.split(decoder)


def _linears(decoder: nnx.Module) -> list[Linear]:
    return [
        node
        for path, node in nnx.iter_graph(decoder)
        if isinstance(node, Linear) and path[0] == "blocks"
    ]
