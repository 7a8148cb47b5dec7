"""Scores of Tunix's models against `jax.grad` of Tunix's own log-probabilities, one by one."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tunix.rl import common
from tunix.rl.grpo import grpo_learner

import proma_jax as proma
from proma_jax.tunix import step
from tests.tunix.models import FAMILIES, VOCABULARY

PAD, EOS = 0, 2
TEMPERATURE = 0.7


def microbatch():
    """Three sequences with prompts padded on the left and completions on the right."""
    prompts = jax.random.randint(jax.random.key(0), (3, 4), 3, VOCABULARY)
    completions = jax.random.randint(jax.random.key(1), (3, 5), 3, VOCABULARY)
    prompts = prompts.at[0, :2].set(PAD)
    completions = completions.at[1, 3:].set(PAD)
    return grpo_learner.TrainExample(
        prompt_ids=prompts,
        prompt_mask=prompts != PAD,
        completion_ids=completions,
        completion_mask=completions != PAD,
        advantages=jnp.array([1.0, -1.0, 0.5]),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_gradients_of_tunix_log_probabilities(family):
    model, example = FAMILIES[family](), microbatch()
    wrt = nnx.LoRAParam if family.endswith("lora") else nnx.Param
    graphdef, params, rest = nnx.split(model, wrt, ...)

    def logprobs(params):
        found = common.compute_per_token_logps(
            graphdef,
            nnx.merge_state(params, rest),
            prompt_tokens=example.prompt_ids,
            completion_tokens=example.completion_ids,
            pad_id=PAD,
            eos_id=EOS,
            stop_gradient=False,
            temperature=TEMPERATURE,
        )
        return jnp.sum(found * example.completion_mask, axis=-1)

    @jax.jit
    def sequence_gradients(params):
        scores = step.token_scores(
            model, wrt, example, pad_id=PAD, eos_id=EOS, temperature=TEMPERATURE
        )[1]
        return [proma.weighted_sum(scores, one) for one in jnp.eye(3)]

    params = nnx.as_pure(params)
    expected = jax.jit(jax.jacobian(logprobs))(params)
    for i, found in enumerate(sequence_gradients(params)):
        one = jax.tree.map(lambda x, i=i: x[i], expected)
        assert any(jnp.any(leaf) for leaf in jax.tree.leaves(one))
        chex.assert_trees_all_close(found, one, rtol=1e-4, atol=1e-5)
