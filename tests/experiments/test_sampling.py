"""Rollouts: masks, log-probabilities, what greedy means, and which tokens may be drawn."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import sampling
from experiments.models.decoder import Decoder, DecoderConfig
from experiments.models.tokens import Characters, padded

TOKENIZER = Characters("0123456789+=")
PAD, END, VOCAB_SIZE, WIDTH = 0, 1, 14, 4
PROMPTS = ["37+58=", "4+5=", "10+0=", "99+99="] * 16


@pytest.fixture(scope="module", params=["unrolled", "scanned"])
def policy(request):
    config = DecoderConfig(
        VOCAB_SIZE,
        width=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        hidden=32,
        scan_layers=request.param == "scanned",
    )
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    return sampling.Policy(graphdef, TOKENIZER, prompt_width=6, response_width=WIDTH), params


@pytest.fixture(scope="module")
def rollouts(policy):
    return sampling.respond(*policy, PROMPTS, jax.random.key(0))


def test_the_mask_holds_the_response_up_to_and_including_its_end(rollouts):
    lengths = set()
    for response, mask in zip(np.asarray(rollouts.responses), rollouts.mask, strict=True):
        ends = np.flatnonzero(response == END)
        length = ends[0] + 1 if len(ends) else WIDTH
        assert mask.tolist() == [True] * length + [False] * (WIDTH - length)
        assert (response[length:] == PAD).all()
        lengths.add(length)
    assert len(lengths) > 1


def test_prompts_are_kept_and_validity_covers_prompt_and_response(rollouts):
    tokens, valid = padded(TOKENIZER, PROMPTS, 6)
    chex.assert_trees_all_equal(np.asarray(rollouts.tokens[:, :6]), tokens)
    expected = np.concatenate([valid, rollouts.mask], axis=1)
    chex.assert_trees_all_equal(np.asarray(rollouts.valid), expected)


def test_sampled_logprobs_are_those_of_the_forward(policy, rollouts):
    expected = sampling.response_logprobs(*policy, rollouts)
    chex.assert_trees_all_close(rollouts.logprobs, expected, atol=1e-5)
    assert (np.asarray(rollouts.logprobs)[~np.asarray(rollouts.mask)] == 0).all()
    assert (np.asarray(rollouts.logprobs)[np.asarray(rollouts.mask)] < 0).all()


@pytest.mark.parametrize("width", [1, WIDTH])
def test_hidden_states_are_the_same_if_each_prompt_is_read_once(policy, width):
    policy, params = policy
    policy = policy._replace(response_width=width)
    groups = sampling.respond(policy, params, PROMPTS[:4], jax.random.key(0), copies=3)
    found = sampling.response_hidden(policy, params, groups, copies=3)
    expected = sampling.response_hidden(policy, params, groups)
    mask = groups.mask[..., None]
    chex.assert_trees_all_close(found * mask, expected * mask, atol=1e-5)


def test_the_end_token_gets_a_gradient(policy, rollouts):
    policy, params = policy
    ended = int(np.flatnonzero((rollouts.responses == END).any(axis=1))[0])
    one = jax.tree.map(lambda x: x[ended], rollouts)

    def logprob_of_end(params):
        logprobs = sampling.response_logprobs(policy, params, one)
        return jnp.sum(jnp.where(one.responses == END, logprobs, 0))

    gradient = jax.jit(jax.grad(logprob_of_end))(params)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-3


def test_samples_follow_the_policy(policy):
    many = sampling.respond(*policy, ["37+58="] * 4096, jax.random.key(1))
    counts = np.bincount(np.asarray(many.responses[:, 0]), minlength=VOCAB_SIZE) / 4096
    one = jax.tree.map(lambda x: x[0], many)
    expected = jax.nn.softmax(sampling.response_logits(*policy, one)[0])
    chex.assert_trees_all_close(counts, np.asarray(expected), atol=0.04)


def test_greedy_takes_the_likeliest_token_and_needs_no_key(policy):
    greedy = sampling.respond(*policy, PROMPTS, key=None)
    likeliest = jnp.argmax(sampling.response_logits(*policy, greedy), axis=-1)
    chex.assert_trees_all_equal(
        jnp.where(greedy.mask, greedy.responses, PAD), jnp.where(greedy.mask, likeliest, PAD)
    )


def test_keys_make_rollouts_repeatable(policy, rollouts):
    again = sampling.respond(*policy, PROMPTS, jax.random.key(0))
    other = sampling.respond(*policy, PROMPTS, jax.random.key(1))
    chex.assert_trees_all_equal(again, rollouts)
    assert (np.asarray(other.tokens) != np.asarray(rollouts.tokens)).any()


def with_settings(policy, **settings):
    return policy[0]._replace(config=sampling.SamplingConfig(**settings)), policy[1]


def test_the_temperature_is_that_of_samples_and_logprobs(policy):
    cooler = with_settings(policy, temperature=0.5)
    many = sampling.respond(*cooler, ["37+58="] * 4096, jax.random.key(1))
    one = jax.tree.map(lambda x: x[0], many)
    expected = jax.nn.softmax(2 * sampling.response_logits(*policy, one)[0])
    counts = np.bincount(np.asarray(many.responses[:, 0]), minlength=VOCAB_SIZE) / 4096
    chex.assert_trees_all_close(counts, np.asarray(expected), atol=0.04)
    chex.assert_trees_all_close(many.logprobs, sampling.response_logprobs(*cooler, many), atol=1e-5)


def drawn_first(policy, **settings):
    """Which tokens came first in many responses, and the policy's probabilities for them."""
    many = sampling.respond(
        *with_settings(policy, **settings), ["37+58="] * 4096, jax.random.key(2)
    )
    one = jax.tree.map(lambda x: x[0], many)
    return set(np.asarray(many.responses[:, 0]).tolist()), np.asarray(
        jax.nn.softmax(sampling.response_logits(*policy, one)[0])
    )


def test_top_k_draws_the_likeliest_tokens_alone(policy):
    drawn, probabilities = drawn_first(policy, top_k=3)
    assert drawn == set(np.argsort(probabilities)[-3:].tolist())


def test_top_p_draws_the_fewest_tokens_that_make_up_the_probability(policy):
    drawn, probabilities = drawn_first(policy, top_p=0.4)
    ordered = np.argsort(probabilities)[::-1]
    needed = int(np.searchsorted(np.cumsum(probabilities[ordered]), 0.4)) + 1
    assert drawn == set(ordered[:needed].tolist())


def test_every_end_token_ends_a_response(policy):
    class Ends(Characters):
        ends = (1, 5, 7)

    several = policy[0]._replace(tokenizer=Ends("0123456789+=")), policy[1]
    rollouts = sampling.respond(*several, PROMPTS, jax.random.key(0))
    is_end = np.isin(rollouts.responses, Ends.ends) & np.asarray(rollouts.mask)
    assert {5, 7} <= set(np.asarray(rollouts.responses)[is_end].tolist())
    ended = np.cumsum(is_end, axis=1) - is_end
    assert (np.asarray(rollouts.mask) == (ended == 0)).all()


def test_sampling_ends_when_all_responses_have(policy):
    graphdef, params = policy[0].graphdef, policy[1]

    def lengths(width):
        tokens, valid = padded(TOKENIZER, PROMPTS, 6)
        rollouts = sampling.sample(
            graphdef,
            params,
            tokens,
            valid,
            jax.random.key(0),
            config=sampling.SamplingConfig(),
            response_width=width,
            ends=tuple(range(2, VOCAB_SIZE)),
            pad=PAD,
        )
        return np.asarray(rollouts.mask).sum(axis=1)

    assert (lengths(2**13) == np.minimum(lengths(2**13), 8)).all()


def test_parts_sampled_one_after_the_other_are_like_all_at_once_but_for_their_noise(policy):
    greedy = sampling.respond(*policy, PROMPTS[:10], None)
    in_parts = sampling.respond(*policy, PROMPTS[:10], None, at_a_time=4)
    chex.assert_trees_all_equal(in_parts.tokens, greedy.tokens)
    chex.assert_trees_all_close(in_parts, greedy, atol=1e-5)
    sampled = sampling.respond(*policy, ["37+58="] * 64, jax.random.key(0), at_a_time=32)
    assert (np.asarray(sampled.tokens[:32]) != np.asarray(sampled.tokens[32:])).any()


@pytest.mark.parametrize("at_a_time", [4, 6])
def test_responses_that_share_a_prompt_are_those_to_prompts_of_their_own(policy, at_a_time):
    key, prompts = jax.random.key(0), PROMPTS[:4]
    repeated = [prompt for prompt in prompts for _ in range(3)]
    alone = sampling.respond(*policy, repeated, key, at_a_time)
    sharing = sampling.respond(*policy, prompts, key, at_a_time, copies=3)
    chex.assert_trees_all_equal(sharing.tokens, alone.tokens)
    chex.assert_trees_all_close(sharing, alone, atol=1e-5)


def test_a_prompt_that_is_too_long_is_refused(policy):
    with pytest.raises(ValueError, match="a prompt has 7 tokens, but must have 1 to 6: '100"):
        sampling.respond(*policy, ["100+10="], None)


def test_trimmed_rollouts_lose_padding_alone(policy):
    wide = policy[0]._replace(prompt_width=100, response_width=80), policy[1]
    rollouts = sampling.respond(*wide, PROMPTS, jax.random.key(0))
    assert rollouts.tokens.shape == (64, 180)
    trimmed = sampling.trimmed(rollouts)
    assert trimmed.tokens.shape[1] - trimmed.mask.shape[1] == 16
    assert trimmed.valid.sum() == rollouts.valid.sum()
    assert trimmed.mask.sum() == rollouts.mask.sum()
    assert sampling.texts(wide[0], trimmed) == sampling.texts(wide[0], rollouts)
    expected = sampling.response_logprobs(*wide, rollouts)[:, : trimmed.mask.shape[1]]
    chex.assert_trees_all_close(sampling.response_logprobs(*wide, trimmed), expected, atol=1e-5)
