"""The benchmark of training compares like with like; how long it takes is not tested."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import training, tunix_learner
from experiments import warm_start

TINY = training.Command(repeats=1, width=16, layers=1, prompts=4)


def test_both_models_are_the_same_function():
    config = training.run_configs(TINY)["GRPO"]
    policy, params = warm_start.StartConfig(config.task, config.start).untrained()
    decoder = nnx.merge(policy.graphdef, params)
    theirs = tunix_learner.model(decoder.config, decoder)
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 2, 1024)
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((8, 8), bool)), (2, 8, 8))
    found, _ = theirs(tokens, positions, None, mask)
    chex.assert_trees_all_close(found, decoder(tokens), rtol=1e-4, atol=1e-5)


def test_every_round_has_the_seconds_of_every_part():
    found = training.measured(TINY)
    assert len(found) == 5
    for name, rounds in found.items():
        assert len(rounds) == 3
        parts = ("sampling", "update", "step") if name == training.TUNIX else training.PARTS
        for seconds in rounds:
            assert set(seconds) == set(parts)
            assert all(np.isfinite(value) and value > 0 for value in seconds.values())
            assert seconds["step"] > seconds["sampling"] + seconds["update"]
