"""Tokens are drawn as often as their probabilities say, and those left out never."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments import next_token


@pytest.mark.parametrize("size", [1, 2, 14, 40])
@pytest.mark.parametrize("seed", range(3))
def test_frequencies_are_the_probabilities(size, seed):
    count = 20_000
    logits = 2 * np.random.default_rng(seed).normal(size=size).astype(np.float32)
    tokens = next_token.drawn(jax.random.key(seed), jnp.tile(logits, (count, 1)))
    assert tokens.dtype == jnp.int32
    found = np.bincount(tokens, minlength=size) / count
    expected = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
    deviations = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(found - expected) <= 4.5 * deviations + 1e-7).all()


def test_rows_are_drawn_independently():
    tokens = next_token.drawn(jax.random.key(0), jnp.zeros((4000, 9)))
    pairs = np.bincount(9 * tokens[::2] + tokens[1::2], minlength=81)
    assert ((pairs - 2000 / 81) ** 2 / (2000 / 81)).sum() < 140  # chi-square, 80 degrees: p > 4e-5


@pytest.mark.parametrize("settings", [{}, {"top_k": 50}, {"top_p": 0.5}])
def test_what_is_left_out_is_never_drawn(settings):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2000, 5000)).astype(np.float32)
    is_out = rng.random(logits.shape) < 0.9
    logits[is_out] = -np.inf
    tokens = np.asarray(next_token.drawn(jax.random.key(1), jnp.asarray(logits), **settings))
    assert not is_out[np.arange(2000), tokens].any()
    rank = (logits > logits[np.arange(2000), tokens][:, None]).sum(axis=1)
    assert rank.max() < settings.get("top_k", 5000)


def test_a_token_that_has_all_the_probability_is_always_drawn():
    logits = jnp.full((1000, 77), -jnp.inf).at[:, 76].set(0.0)
    assert (next_token.drawn(jax.random.key(0), logits) == 76).all()


def test_devices_that_share_the_rows_need_not_communicate():
    mesh = jax.make_mesh((8,), ("rows",), (jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("rows"))
    logits = jax.ShapeDtypeStruct((64, 1000), jnp.float32, sharding=rows)
    draw = jax.jit(next_token.drawn, out_shardings=rows)
    program = draw.lower(jax.random.key(0), logits).compile().as_text()
    assert not any(name in program for name in ("all-gather", "all-reduce", "all-to-all"))
