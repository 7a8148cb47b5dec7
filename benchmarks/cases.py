"""The cases that are measured: a decoder, and the shape of one optimizer step's batch."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import decoder

Size = Literal["micro", "tiny", "small", "smollm2-135m", "qwen3-0.6b", "qwen3-8b", "qwen3-32b"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A decoder and the batch of one optimizer step."""

    config: decoder.DecoderConfig
    sequences: int
    """b, sequences in a microbatch."""
    tokens: int
    """T, tokens of each sequence."""
    microbatches: int
    """k, microbatches of the optimizer step."""
    on_mesh: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What `sequence_scores` and `accumulated_gradient` are told of a mesh."""

    def with_batch(
        self, sequences: int | None, tokens: int | None, microbatches: int | None
    ) -> "Case":
        """The case with another batch, as far as that is given."""
        return dataclasses.replace(
            self,
            sequences=sequences or self.sequences,
            tokens=tokens or self.tokens,
            microbatches=microbatches or self.microbatches,
        )

    def logprob(self, params: decoder.Params, tokens: jax.Array) -> jax.Array:
        """Log-probability of one sequence."""
        return decoder.logprob(self.config, params, tokens)

    def token_logprobs(self, params: decoder.Params, tokens: jax.Array) -> jax.Array:
        """Log-probabilities of the tokens of (b, T) sequences."""
        return decoder.token_logprobs(self.config, params, tokens)


class Batch(NamedTuple):
    """One optimizer step's sequences; without the axis k, one microbatch.

    Attributes:
        tokens: (k, b, T) int32.
        coefficients: (k, b) float32, each sequence's weight in the loss gradient.
        old_logprobs: (k, b, T - 1) float32, what the clipped loss compares with.
    """

    tokens: jax.Array
    coefficients: jax.Array
    old_logprobs: jax.Array


def _qwen3(**shape: Any) -> Case:
    """A model of the family, of what they share and its own shape."""
    config = decoder.DecoderConfig(
        vocab=151_936, kv_heads=8, head_dim=128, dtype="bfloat16", **shape
    )
    return Case(config, sequences=8, tokens=1536, microbatches=2)


SIZES: dict[Size, Case] = {
    "micro": Case(
        decoder.DecoderConfig(
            vocab=64, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, hidden=48
        ),
        sequences=3,
        tokens=12,
        microbatches=2,
    ),
    "tiny": Case(
        decoder.DecoderConfig(
            vocab=2048, width=256, layers=4, heads=4, kv_heads=2, head_dim=64, hidden=768
        ),
        sequences=8,
        tokens=256,
        microbatches=4,
    ),
    "small": Case(
        decoder.DecoderConfig(
            vocab=8192, width=768, layers=12, heads=12, kv_heads=4, head_dim=64, hidden=2304
        ),
        sequences=8,
        tokens=256,
        microbatches=2,
    ),
    "smollm2-135m": Case(
        decoder.DecoderConfig(
            vocab=49_152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, hidden=1536
        ),
        sequences=8,
        tokens=64,
        microbatches=4,
    ),
    "qwen3-0.6b": _qwen3(width=1024, layers=28, heads=16, hidden=3072),
    "qwen3-8b": _qwen3(
        width=4096, layers=36, heads=32, hidden=12_288, tied=False, logits_at_a_time=256
    ),
    "qwen3-32b": _qwen3(
        width=5120, layers=64, heads=64, hidden=25_600, tied=False, logits_at_a_time=256
    ),
}


def inputs(case: Case, seed: int) -> tuple[decoder.Params, Batch]:
    """Random parameters and a random batch; the old policy is the present one."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = jax.jit(decoder.init, static_argnums=0)(case.config, keys[0])
    shape = (case.microbatches, case.sequences)
    tokens = jax.random.randint(keys[1], (*shape, case.tokens), 0, case.config.vocab)
    advantages = jax.random.normal(keys[2], shape)

    @jax.jit
    def logprobs(params, tokens):  # one by one, in less memory than any step needs
        return jax.lax.map(lambda t: case.token_logprobs(params, t), tokens)

    old_logprobs = logprobs(params, tokens.reshape(-1, case.tokens)).reshape(*shape, -1)
    return params, Batch(tokens, -advantages / jnp.float32(tokens.size), old_logprobs)
