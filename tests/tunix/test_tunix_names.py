"""What proma_jax.tunix relies on in Tunix beyond its documentation, so that a new version shows."""

import inspect
import pathlib
import re

import numpy as np
import optax
import pytest
from flax import nnx
from tunix.rl import common, function_registry
from tunix.rl.grpo import grpo_learner
from tunix.sft import peft_trainer

import proma_jax as proma
from proma_jax.tunix import on_policy, use_proma
from tests.tunix import tiny

PACKAGE = pathlib.Path(proma.__file__).parent / "tunix"


def test_the_only_private_name_is_in_hooks():
    private = {
        path.name: set(re.findall(r"\w\.(_[a-z]\w*)", path.read_text()))
        for path in PACKAGE.glob("*.py")
    }
    assert private.pop("hooks.py") == {"_post_process_train_step"}
    assert private.pop("step.py") == {"_states"}  # ours
    assert not any(private.values())


def test_a_trainer_makes_its_train_step_by_create_train_step_fn():
    trainer = tiny.learner().rl_cluster.actor_trainer
    parameters = inspect.signature(trainer.create_train_step_fn()).parameters
    assert list(parameters) == ["model", "optimizer", "inputs"]
    assert "self.create_train_step_fn()" in inspect.getsource(
        peft_trainer.PeftTrainer.jit_train_and_eval_step
    )


def test_a_trainer_accumulates_by_multisteps_in_an_nnx_optimizer():
    trainer = tiny.learner().rl_cluster.actor_trainer
    assert isinstance(trainer.optimizer, nnx.Optimizer)
    assert isinstance(trainer.optimizer.tx, optax.MultiSteps)
    assert isinstance(trainer.optimizer.opt_state, optax.MultiStepsState)
    assert trainer.optimizer.wrt is nnx.Param


def test_the_loss_of_a_learner_is_the_registered_one():
    learner = tiny.learner()
    assert learner.rl_cluster.actor_trainer.loss_fn.__module__ == grpo_learner.__name__
    registered = function_registry.get_policy_loss_fn("grpo")
    assert registered.__module__ == "tunix.rl.algo_core"


@pytest.mark.parametrize("mode", on_policy.ONE_WEIGHT_PER_SEQUENCE)
def test_the_ways_to_aggregate_a_loss_have_one_weight_for_each_sequence(mode):
    mask = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], np.float32)
    losses = np.arange(9, dtype=np.float32).reshape(3, 3)
    per_sequence = (losses * mask).sum(axis=-1, keepdims=True)
    moved = per_sequence * mask / np.maximum(mask.sum(axis=-1, keepdims=True), 1)
    expected, found = (common.aggregate_loss(x, mask, mode) for x in (losses, moved))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_evaluation_logs_no_fractions_and_training_does():
    learner = tiny.learner(training={"max_steps": 1, "eval_every_n_steps": 1})
    use_proma(learner, accumulation=proma.Accumulation())
    learner.train(tiny.prompts(2), tiny.prompts(1))
    assert tiny.logged(learner, "proma/accumulation_fraction").shape == (1,)
    assert len(tiny.logged(learner, "kl", mode="eval"))
    logger = learner.rl_cluster.actor_trainer.metrics_logger
    assert not logger.metric_exists("actor", "proma/accumulation_fraction", "eval")
