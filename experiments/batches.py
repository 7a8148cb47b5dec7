"""Rollout batches: sampled, graded, and divided among optimizer steps and their microbatches.

Problems, sampling noise and the shuffle depend on the seed and the batch alone.
"""

from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from experiments import meshes, methods, sampling
from experiments.configs import RunConfig
from experiments.tasks.task import Problem, draw, graded
from proma_jax import policy_gradient as pg


class Batch(NamedTuple):
    """A rollout batch, ready to learn from.

    Attributes:
        described: its metrics.
        measured: the rollouts whose KL is measured.
        copies: how many of those have the same prompt, side by side.
        minibatches: for each optimizer step its microbatches, stacked (k, b, ...).
    """

    described: dict[str, float]
    measured: sampling.Rollouts
    copies: int
    minibatches: list[methods.Microbatch]


def _problems(config: RunConfig, batch: int) -> tuple[list[Problem], np.random.Generator]:
    """A batch's problems, one per response, and the generator that shuffles the responses."""
    settings = config.training
    rng = np.random.default_rng([config.seed, batch])
    problems = draw(config.task.made, settings.prompts, rng)
    return [problem for problem in problems for _ in range(settings.group_size)], rng


def collect(
    config: RunConfig, policy: sampling.Policy, params: nnx.State, batch: int
) -> sampling.Rollouts:
    """Samples a rollout batch."""
    settings = config.training
    problems, _ = _problems(config, batch)
    key = jax.random.fold_in(jax.random.key(config.seed), batch)
    prompts = [problem.prompt for problem in problems[:: settings.group_size]]
    return sampling.respond(
        policy, params, prompts, key, settings.sequences_at_a_time, copies=settings.group_size
    )


def divide(
    config: RunConfig, policy: sampling.Policy, rollouts: sampling.Rollouts, batch: int
) -> Batch:
    """Grades a rollout batch and divides it among its optimizer steps."""
    settings = config.training
    problems, rng = _problems(config, batch)
    grades = graded(config.task.made, problems, sampling.texts(policy, rollouts))
    rewards = grades["reward"].reshape(-1, settings.group_size)
    advantages = np.asarray(jax.jit(pg.group_relative_advantages)(rewards)).ravel()
    rollouts = sampling.trimmed(rollouts)

    def minibatch(share):
        order = rng.permutation(share).reshape(settings.microbatches, settings.microbatch_size)
        chosen = jax.tree.map(lambda x: x[order], rollouts)
        weights = pg.token_mean_coefficients(advantages[order], chosen.mask.sum())
        return meshes.rows(policy.mesh, methods.Microbatch(chosen, weights), axis=1)

    described = {
        "reward" if name == "reward" else f"rollout_{name}": float(grade.mean())
        for name, grade in grades.items()
    } | {
        "response_tokens": float(rollouts.mask.sum(axis=1).mean()),
        "cut_off": float(1 - sampling.ended(policy, rollouts).mean()),
    }
    shares = np.split(np.arange(len(problems)), settings.steps_per_batch)
    count = len(problems)
    rows = np.linspace(0, count, settings.kl_sequences or count, endpoint=False, dtype=int)
    measured = jax.tree.map(lambda x: x[rows], rollouts)
    copies = settings.group_size if settings.kl_sequences is None else 1
    return Batch(described, measured, copies, [minibatch(share) for share in shares])
