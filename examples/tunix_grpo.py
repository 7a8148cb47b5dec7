"""GRPO with Tunix, and PROMA in it by one call: a tiny random Qwen3 learns to say even numbers.

    pip install '.[tunix]' && python -m examples.tunix_grpo  # in an environment of its own

About 60 seconds on 2 CPU cores. Nothing is downloaded: words are the numbers themselves.
"""

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

import proma_jax as proma
from proma_jax.tunix import use_proma

VOCABULARY = 32


class Tokenizer:
    """The token ids 3, 4, ... are the words "3", "4", ...; the three below them are special."""

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


def share_of_even(prompts, completions, **kwargs):
    """A reward: the share of a completion's numbers that are even."""
    even = ([int(word) % 2 == 0 for word in text.split()] for text in completions)
    return [np.mean(of_one or [False]) for of_one in even]


def prompts(steps, size):
    """Batches of prompts of three numbers."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(3, VOCABULARY, (steps, size, 3))
    return [{"prompts": np.array([" ".join(map(str, row)) for row in batch])} for batch in numbers]


def main(steps=20):
    """Trains with PROMA accumulation, and returns the mean reward of each step."""
    config = qwen3.ModelConfig(
        num_layers=2,
        vocab_size=VOCABULARY,
        embed_dim=32,
        hidden_dim=64,
        num_heads=2,
        head_dim=16,
        num_kv_heads=1,
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    cluster = rl_cluster.RLCluster(
        actor=qwen3.Qwen3(config, rngs=nnx.Rngs(0)),
        tokenizer=Tokenizer(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-2),
                eval_every_n_steps=steps,
                max_steps=steps,
                mini_batch_size=16,
                train_micro_batch_size=4,  # an optimizer step has 16 / 4 microbatches
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=8, max_prompt_length=4, kv_cache_size=16, temperature=1.0
            ),
        ),
    )
    algorithm = grpo_learner.GRPOConfig(num_generations=4, beta=0.0)
    learner = grpo_learner.GRPOLearner(cluster, algorithm, reward_fns=share_of_even)
    use_proma(learner, accumulation=proma.Accumulation(relative_bound=0.5))

    learner.train(prompts(steps, size=16))
    logger = cluster.actor_trainer.metrics_logger
    removed = logger.get_metric_history("actor", "proma/accumulation_fraction", "train")
    rewards = logger.get_metric_history("rewards", "share_of_even", "train")
    print(f"reward of the first step {rewards[0]:.2f}, of the last {rewards[-1]:.2f}")
    print(f"of what was accumulated, a microbatch removed {np.mean(removed):.2f} on average")
    return rewards


if __name__ == "__main__":
    main()
