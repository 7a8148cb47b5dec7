"""Rollouts: masks, log-probabilities, and what greedy means."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import sampling
from experiments.models.decoder import Decoder, DecoderConfig
from experiments.tasks.addition import END, PAD, VOCAB_SIZE, Addition

TASK = Addition(digits=2)
PROMPTS = ["37+58=", "4+5=", "10+0=", "99+99="] * 16


@pytest.fixture(scope="module")
def policy():
    config = DecoderConfig(
        VOCAB_SIZE, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, hidden=32
    )
    return nnx.split(Decoder(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def rollouts(policy):
    return sampling.respond(TASK, *policy, PROMPTS, jax.random.key(0))


def test_the_mask_holds_the_response_up_to_and_including_its_end(rollouts):
    lengths = set()
    for response, mask in zip(np.asarray(rollouts.responses), rollouts.mask, strict=True):
        ends = np.flatnonzero(response == END)
        length = ends[0] + 1 if len(ends) else TASK.response_width
        assert mask.tolist() == [True] * length + [False] * (TASK.response_width - length)
        assert (response[length:] == PAD).all()
        lengths.add(length)
    assert len(lengths) > 1


def test_prompts_are_kept_and_validity_covers_prompt_and_response(rollouts):
    tokens, valid = TASK.encode_prompts(PROMPTS)
    chex.assert_trees_all_equal(np.asarray(rollouts.tokens[:, : TASK.prompt_width]), tokens)
    expected = np.concatenate([valid, rollouts.mask], axis=1)
    chex.assert_trees_all_equal(np.asarray(rollouts.valid), expected)


def test_sampled_logprobs_are_those_of_the_forward(policy, rollouts):
    expected = sampling.response_logprobs(*policy, rollouts)
    chex.assert_trees_all_close(rollouts.logprobs, expected, atol=1e-5)
    assert (np.asarray(rollouts.logprobs)[~np.asarray(rollouts.mask)] == 0).all()
    assert (np.asarray(rollouts.logprobs)[np.asarray(rollouts.mask)] < 0).all()


def test_the_end_token_gets_a_gradient(policy, rollouts):
    graphdef, params = policy
    ended = int(np.flatnonzero((rollouts.responses == END).any(axis=1))[0])
    one = jax.tree.map(lambda x: x[ended], rollouts)

    def logprob_of_end(params):
        logprobs = sampling.response_logprobs(graphdef, params, one)
        return jnp.sum(jnp.where(one.responses == END, logprobs, 0))

    gradient = jax.jit(jax.grad(logprob_of_end))(params)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-3


def test_samples_follow_the_policy(policy):
    graphdef, params = policy
    many = sampling.respond(TASK, graphdef, params, ["37+58="] * 4096, jax.random.key(1))
    counts = np.bincount(np.asarray(many.responses[:, 0]), minlength=VOCAB_SIZE) / 4096
    one = jax.tree.map(lambda x: x[0], many)
    expected = jax.nn.softmax(sampling.response_logits(graphdef, params, one)[0])
    chex.assert_trees_all_close(counts, np.asarray(expected), atol=0.04)


def test_greedy_takes_the_likeliest_token_and_needs_no_key(policy):
    greedy = sampling.respond(TASK, *policy, PROMPTS, key=None)
    likeliest = jnp.argmax(sampling.response_logits(*policy, greedy), axis=-1)
    chex.assert_trees_all_equal(
        jnp.where(greedy.mask, greedy.responses, PAD), jnp.where(greedy.mask, likeliest, PAD)
    )


def test_keys_make_rollouts_repeatable(policy, rollouts):
    again = sampling.respond(TASK, *policy, PROMPTS, jax.random.key(0))
    other = sampling.respond(TASK, *policy, PROMPTS, jax.random.key(1))
    chex.assert_trees_all_equal(again, rollouts)
    assert (np.asarray(other.tokens) != np.asarray(rollouts.tokens)).any()
