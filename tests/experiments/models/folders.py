"""Model folders of the tests, and greedy decoding."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models.decoder import empty_cache

DATA = pathlib.Path(__file__).parent / "data"


@nnx.jit
def logits_of(decoder, tokens, valid):
    return decoder(tokens, valid)


@nnx.jit(static_argnames="count")
def greedy(decoder, tokens, valid, count):
    """The `count` most likely next tokens (b, count), one after another."""
    batch, width = tokens.shape
    cache = empty_cache(decoder.config, batch, width + count)
    hidden, cache = decoder.extend_hidden(tokens, valid, cache)

    def step(carry, _):
        hidden, cache = carry
        token = jnp.argmax(decoder.logits(hidden), axis=-1)
        hidden, cache = decoder.extend_hidden(token[:, None], jnp.ones((batch, 1), bool), cache)
        return (hidden[:, -1], cache), token

    return jax.lax.scan(step, (hidden[:, -1], cache), None, length=count)[1].T


def assert_as_expected(graphdef, params, expected, atol=1e-4):
    """Compares logits and continuations with those of an expected.npz."""
    decoder = nnx.merge(graphdef, params)
    for name in ("whole", "padded"):
        tokens, valid = jnp.asarray(expected["tokens"]), jnp.asarray(expected[f"{name}_valid"])
        logits = np.asarray(logits_of(decoder, tokens, valid))
        found, wanted = logits[valid], expected[f"{name}_logits"][valid]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)
        continued = expected[f"{name}_continued"]
        np.testing.assert_array_equal(greedy(decoder, tokens, valid, continued.shape[1]), continued)
