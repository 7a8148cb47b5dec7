"""KL and entropy from kept hidden states against those from the logits of all sequences at once."""

import itertools

import chex
import jax
import pytest

from experiments import divergence, sampling
from proma_jax import policy_gradient as pg
from tests.experiments import tiny


@pytest.mark.parametrize(
    ("copies", "at_a_time", "tokens"),
    [(1, 2, None), (1, 5, 2), (1, 8, None), (4, 8, None), (4, 6, 2), (4, 5, None), (4, 99, None)],
)
def test_every_step_is_measured_from_the_one_before_it(copies, at_a_time, tokens):
    policy, start = tiny.START.untrained()
    policy = policy._replace(logits_at_a_time=tokens)
    prompts = [f"{a}+{b}=" for a, b in ((1, 2), (3, 4), (5, 6), (7, 8), (9, 0))]
    rollouts = sampling.respond(policy, start, prompts, jax.random.key(0), copies=copies)

    def moved(size):
        return jax.tree.map(
            lambda x: x + size * jax.random.normal(jax.random.key(1), x.shape), start
        )

    def logits(params):
        return sampling.response_logits(policy, params, rollouts)

    policies = [moved(size) for size in (0.1, 0.2, 0.4)]
    meter = divergence.Meter(policy, rollouts, copies, at_a_time, start, policies[0])
    for before, after in itertools.pairwise(policies):
        expected = {
            "step_kl": pg.exact_kl(logits(before), logits(after), rollouts.mask),
            "start_kl": pg.exact_kl(logits(after), logits(start), rollouts.mask),
            "entropy": pg.entropy(logits(after), rollouts.mask),
        }
        chex.assert_trees_all_close(meter.step(after), expected, rtol=1e-5)
