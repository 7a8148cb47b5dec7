"""On-policy the scores give the gradient of Tunix's loss, and other losses are told apart."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import proma_jax as proma
from proma_jax.tunix import on_policy, step, use_proma
from tests.tunix import tiny
from tests.tunix.test_scores import microbatch

OFF_POLICY = {
    "epsilon": 0.0,
    "epsilon_high": 0.0,
    "epsilon_c": 0.5,
    "loss_algo": "gspo-token",
    "loss_agg_mode": "another",
    "policy_loss_fn": "another",
}
TOKENS = jnp.zeros((3, 5))
OFF_POLICY_EXAMPLES = {
    "old_per_token_logps": TOKENS,
    "sampler_is_weights": TOKENS,
    "advantages": TOKENS,
}


@pytest.fixture(scope="module")
def learner():
    return tiny.learner()


def changed(config, **changes):
    """A config with attributes that not all of Tunix's have."""
    copied = dataclasses.replace(config)
    vars(copied).update(vars(config) | changes)
    return copied


@pytest.mark.parametrize("mode", on_policy.ONE_WEIGHT_PER_SEQUENCE)
def test_the_scores_give_the_gradient_of_the_loss(learner, monkeypatch, mode):
    trainer = learner.rl_cluster.actor_trainer
    config = changed(learner.algo_config, loss_agg_mode=mode)
    monkeypatch.setattr(learner, "algo_config", config)
    example = microbatch()
    example = example.replace(completion_mask=example.completion_mask.at[2].set(False))

    @nnx.jit
    def gradients(model):
        inputs = trainer.gen_model_input_fn(example)
        expected = nnx.grad(trainer.loss_fn, has_aux=True)(model, **inputs)[0]
        _, scores = step.token_scores(
            model, nnx.Param, example, pad_id=0, eos_id=2, temperature=config.temperature
        )
        found = proma.weighted_sum(scores, on_policy.coefficients(config, example))
        return found, nnx.as_pure(expected)

    found, expected = gradients(trainer.model)
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_no_weighted_sum_is_known(learner):
    loss_fn, config = learner.rl_cluster.actor_trainer.loss_fn, learner.algo_config
    example = microbatch()
    assert on_policy.is_weighted_sum(loss_fn, config, example)
    assert not on_policy.is_weighted_sum(lambda: None, config, example)
    for name, value in OFF_POLICY.items():
        other = changed(config, **{name: value})
        assert not on_policy.is_weighted_sum(loss_fn, other, example), name
    for name, value in OFF_POLICY_EXAMPLES.items():
        other = example.replace(**{name: value})
        assert not on_policy.is_weighted_sum(loss_fn, config, other), name
    with_reference = example.replace(ref_per_token_logps=TOKENS)
    assert on_policy.is_weighted_sum(loss_fn, config, with_reference)
    assert not on_policy.is_weighted_sum(loss_fn, changed(config, beta=0.1), with_reference)


@pytest.mark.parametrize(("epsilon", "passes"), [(0.2, 0), (0.0, 1)])
def test_only_other_losses_get_a_backward_pass_of_their_own(monkeypatch, epsilon, passes):
    learner, calls, value_and_grad = tiny.learner(epsilon=epsilon), [], nnx.value_and_grad

    def counted(*args, **kwargs):
        calls.append(1)
        return value_and_grad(*args, **kwargs)

    monkeypatch.setattr(nnx, "value_and_grad", counted)
    use_proma(learner, accumulation=proma.Accumulation())
    learner.rl_cluster.update_actor([microbatch()], None)
    assert len(calls) == passes
