"""Tunix's side of `benchmarks.training`: its Qwen3 with our weights, and its GRPO learner, timed.

The learner asks for a batch of prompts when it has finished the step before. So the prompts are a
generator that stops the clock, lets others have their turn, and starts it again.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from experiments import sampling
from experiments.configs import TrainingConfig
from experiments.models.config import DecoderConfig
from experiments.models.decoder import Block, Decoder
from experiments.models.tokens import Characters

ROPE_THETA = 1_000_000.0
"""What Tunix's Qwen3 has, whatever its configuration says."""


class Tokenizer(Characters):
    """Our tokenizer with the names that Tunix calls; it puts no token before a prompt."""

    def encode(self, prompt: Any, **kwargs: Any) -> list[int]:
        return super().encode(prompt)

    def decode(self, tokens: Any, **kwargs: Any) -> str:
        return super().decode(tokens)

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return self.ends[0]

    def pad_id(self) -> int:
        return self.pad


def model(shape: DecoderConfig, decoder: Decoder) -> qwen3.Qwen3:
    """Tunix's Qwen3 with the weights of our decoder, which are copied."""
    made = qwen3.Qwen3(
        qwen3.ModelConfig(
            num_layers=shape.layers,
            vocab_size=shape.vocab_size,
            embed_dim=shape.width,
            hidden_dim=shape.hidden,
            num_heads=shape.heads,
            head_dim=shape.head_dim,
            num_kv_heads=shape.kv_heads,
            rope_theta=int(ROPE_THETA),
            norm_eps=shape.norm_epsilon,
            use_tied_embedding=shape.tied_head,
        ),
        rngs=nnx.Rngs(0),
    )
    pairs: list[tuple[Any, Any]] = [
        (made.embedder.input_embedding, decoder.embed.embedding),
        (made.final_norm.w, decoder.norm.scale),
    ]
    blocks = cast(Sequence[Block], decoder.blocks)
    for theirs, ours in zip(made.layers, blocks, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            pairs.append((getattr(theirs.attn, name).w, getattr(ours.attention, name).kernel))
        for name in ("gate_proj", "up_proj", "down_proj"):
            pairs.append((getattr(theirs.mlp, name).kernel, getattr(ours.mlp, name).kernel))
        for name in ("q_norm", "k_norm"):
            pairs.append((getattr(theirs.attn, name).w, getattr(ours.attention, name).scale))
        pairs.append((theirs.input_layernorm.w, ours.attention_norm.scale))
        pairs.append((theirs.post_attention_layernorm.w, ours.mlp_norm.scale))
    for to, source in pairs:
        to[...] = jnp.reshape(source[...], to.shape, copy=True)
    return made


def learner(
    settings: TrainingConfig,
    policy: sampling.Policy,
    params: nnx.State,
    characters: str,
    reward: Callable[[Sequence[str]], Sequence[float]],
) -> grpo_learner.GRPOLearner:
    """A GRPOLearner with the settings of ours; it samples all responses together.

    Args:
        settings: what it takes over.
        policy: what it trains.
        params: its weights.
        characters: the policy's alphabet.
        reward: of each completion.
    """
    decoder = nnx.merge(policy.graphdef, params)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    method = settings.method
    cluster = rl_cluster.RLCluster(
        actor=model(decoder.config, decoder),
        tokenizer=Tokenizer(characters),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.chain(
                    optax.clip_by_global_norm(method.max_gradient_norm),
                    optax.adamw(method.learning_rate),
                ),
                eval_every_n_steps=sys.maxsize,
                max_steps=sys.maxsize,
                mini_batch_size=settings.prompts // settings.steps_per_batch,
                train_micro_batch_size=settings.microbatch_size // settings.group_size,
                rollout_micro_batch_size=settings.prompts,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=policy.response_width,
                max_prompt_length=policy.prompt_width,
                kv_cache_size=policy.prompt_width + policy.response_width,
                temperature=policy.config.temperature,
            ),
        ),
    )
    algorithm = grpo_learner.GRPOConfig(
        num_generations=settings.group_size, beta=0.0, loss_agg_mode="token-mean"
    )

    def rewards(prompts: Any, completions: Sequence[str], **kwargs: Any) -> list[float]:
        return list(reward(completions))

    return grpo_learner.GRPOLearner(cluster, algorithm, reward_fns=rewards)


def train_timed(
    learner: grpo_learner.GRPOLearner,
    batches: Sequence[Sequence[str]],
    between: Callable[[Mapping[str, float]], None],
    now: Callable[[], float],
) -> None:
    """Trains on batches of prompts, one optimizer step each, until there are no more.

    Args:
        learner: as it was made.
        batches: of prompts.
        between: called after each step with its seconds of "sampling", "update" and "step".
        now: the times.
    """
    cluster = learner.rl_cluster
    times: dict[str, float] = {}
    generate, update_actor = cluster.generate, cluster.update_actor

    def generate_timed(*args: Any, **kwargs: Any) -> Any:
        began = now()
        output = generate(*args, **kwargs)
        times["sampling"] = now() - began
        return output

    def update_timed(*args: Any, **kwargs: Any) -> Any:
        times.setdefault("update began", now())
        return update_actor(*args, **kwargs)

    cluster.generate, cluster.update_actor = generate_timed, update_timed

    def timed_batches() -> Iterator[dict[str, np.ndarray]]:
        for batch in batches:
            times.clear()
            began = now()
            yield {"prompts": np.array(batch)}
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
            ended = now()
            update, step = ended - times["update began"], ended - began
            between({"sampling": times["sampling"], "update": update, "step": step})

    learner.train(timed_batches())
