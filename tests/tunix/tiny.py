"""Tiny Tunix learners, all from one start, on one device and without a network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from tests.tunix.models import VOCABULARY, tiny_qwen3

GROUP = 4


class Tokenizer:
    """Token ids 3, 4, ... are the words "3", "4", ...; the three below are special."""

    def encode(self, text, **kwargs):
        return [int(word) for word in text.split()]

    def decode(self, ids, **kwargs):
        return " ".join(str(int(i)) for i in ids)

    def pad_id(self):
        return 0

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2


def reward(prompts, completions, **kwargs):
    """How many tokens of a completion are even."""
    return [float(sum(int(word) % 2 == 0 for word in text.split())) for text in completions]


def prompts(batches=8, size=4):
    """Batches of prompts of differing lengths."""
    rng = np.random.default_rng(0)

    def prompt():
        return " ".join(map(str, rng.integers(3, VOCABULARY, rng.integers(2, 5))))

    return [{"prompts": np.array([prompt() for _ in range(size)])} for _ in range(batches)]


def learner(model=None, *, mesh_shape=(1, 1), training=None, rollout=None, **algorithm):
    """A GRPOLearner with microbatches of 2 prompts and 2 of them a step, unless told otherwise."""
    model = tiny_qwen3() if model is None else model
    devices = np.array(jax.devices()[: np.prod(mesh_shape)])
    mesh = jax.sharding.Mesh(devices.reshape(mesh_shape), ("fsdp", "tp"))
    training = {
        "actor_optimizer": optax.adamw(1e-2),
        "eval_every_n_steps": 100,
        "max_steps": 3,
        "mini_batch_size": 4,
        "train_micro_batch_size": 2,
    } | (training or {})
    rollout = {
        "max_tokens_to_generate": 6,
        "max_prompt_length": 8,
        "kv_cache_size": 32,
        "temperature": 1.0,
    } | (rollout or {})
    cluster = rl_cluster.RLCluster(
        actor=model,
        reference=tiny_qwen3() if algorithm.get("beta") else None,
        tokenizer=Tokenizer(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
            training_config=rl_cluster.RLTrainingConfig(**training),
            rollout_config=base_rollout.RolloutConfig(**rollout),
        ),
    )
    settings = grpo_learner.GRPOConfig(**{"num_generations": GROUP, "beta": 0.0} | algorithm)
    return grpo_learner.GRPOLearner(rl_cluster=cluster, algo_config=settings, reward_fns=reward)


def parameters(learner):
    model = learner.rl_cluster.actor_trainer.model
    return jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))


def logged(learner, name, mode="train"):
    """What the actor's trainer logged, one number for each optimizer step."""
    logger = learner.rl_cluster.actor_trainer.metrics_logger
    return logger.get_metric_history("actor", name, mode)
