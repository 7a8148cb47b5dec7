"""Set-ups that tests share: normal draws, and factors of them."""

import jax.numpy as jnp
import numpy as np

import proma_jax as proma


def normal(rng, *shape, dtype=jnp.float32):
    """Standard normal numbers from a generator, or from the first of a seed."""
    return jnp.asarray(np.random.default_rng(rng).normal(size=shape), dtype)


def layer_factors(rng, b, tokens, d_in, d_out, dtype=jnp.float32):
    """The scores of one kernel, of b sequences of so many tokens."""
    inputs, output_grads = (normal(rng, b, tokens, d, dtype=dtype) for d in (d_in, d_out))
    return proma.LayerFactors(inputs, output_grads)
