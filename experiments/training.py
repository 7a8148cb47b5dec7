"""One method's run from the warm start: rollouts, updates, and a row of metrics per optimizer step.

A rollout batch serves several optimizer steps, each with its own prompts; within a step the
sequences of a group are spread over the microbatches at random. Prompts, sampling noise and that
shuffle depend on the seed and the batch alone, so they are the same for every method, and a run
resumed after any of its steps equals the uninterrupted one.
"""

import functools
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments import checked, methods, records, sampling, warm_start
from proma_jax import policy_gradient as pg

FRACTIONS = ("accumulation_fraction", "intra_fraction")
"""What the variants remove; a method uses one of them at most."""


@dataclass(frozen=True, config=checked.CONFIG)
class TrainingConfig:
    """Settings of a run that are the same for all methods."""

    steps: checked.Count = 40
    """Optimizer steps. A finished run goes on if it is asked for more."""
    prompts: checked.Count = 128
    """Prompts in a rollout batch."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Responses sampled to each prompt; rewards count relative to their mean."""
    steps_per_batch: checked.Count = 2
    """Optimizer steps per rollout batch; each takes its share of the prompts."""
    microbatch_size: checked.Count = 8
    """Sequences in a microbatch."""
    validation_every: checked.Count = 4
    """Optimizer steps between two greedy validations; the last step is validated too."""
    checkpoint_every: checked.Count = 10
    """Optimizer steps between two checkpoints."""
    method: methods.MethodConfig = methods.MethodConfig()

    def __post_init__(self):
        if self.steps % self.steps_per_batch:
            raise ValueError(
                f"steps={self.steps} must be a multiple of steps_per_batch={self.steps_per_batch}"
            )
        if self.prompts % self.steps_per_batch:
            raise ValueError(
                f"prompts={self.prompts} must be a multiple of "
                f"steps_per_batch={self.steps_per_batch}"
            )
        if self.sequences_per_step % self.microbatch_size:
            raise ValueError(
                f"microbatch_size={self.microbatch_size} must divide the {self.sequences_per_step} "
                f"sequences of an optimizer step, which are prompts={self.prompts} times "
                f"group_size={self.group_size} over steps_per_batch={self.steps_per_batch}"
            )

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one optimizer step learns from."""
        return self.prompts * self.group_size // self.steps_per_batch

    @property
    def microbatches(self) -> int:
        """Microbatches of one optimizer step."""
        return self.sequences_per_step // self.microbatch_size


def check_together(
    names: Sequence[methods.MethodName],
    start: warm_start.WarmStartConfig,
    training: TrainingConfig,
) -> None:
    """Raises a ValueError if the methods cannot be trained from this start with these settings."""
    task, rank, narrowest = start.task, training.method.rank, start.decoder.narrowest
    if training.prompts > task.training_problems:
        raise ValueError(
            f"training.prompts={training.prompts} must be at most {task.training_problems}, the "
            f"training problems with start.task.digits={task.digits} and "
            f"start.task.validation_problems={task.validation_problems}"
        )
    if "proma_intra" in names and rank > narrowest:
        raise ValueError(
            f"training.method.rank={rank} must be at most {narrowest}, the inputs or outputs of "
            "the decoder's narrowest matrix"
        )


@dataclass(frozen=True, config=checked.CONFIG)
class RunConfig:
    """All that a run's results depend on."""

    method: methods.MethodName
    """Which method to train with."""
    seed: checked.Seed = 0
    """Of prompts, sampling and shuffling."""
    start: warm_start.WarmStartConfig = warm_start.WarmStartConfig()
    training: TrainingConfig = TrainingConfig()
    update_norms: tuple[checked.NotNegative, ...] = ()
    """grpo_matched: the global norm that each optimizer step's update is rescaled to."""

    def __post_init__(self):
        check_together([self.method], self.start, self.training)
        needed = self.training.steps if self.method == "grpo_matched" else 0
        if len(self.update_norms) != needed:
            raise ValueError(
                f"{len(self.update_norms)} update_norms for method={self.method!r}, which needs "
                f"{needed}: grpo_matched takes one per optimizer step, the others none"
            )


class State(NamedTuple):
    """What a run carries from one optimizer step to the next."""

    params: nnx.State
    opt_state: optax.OptState
    cumulative_kl: jax.Array
    rollouts: sampling.Rollouts
    """Of the last batch sampled."""


def train(
    config: RunConfig,
    graphdef: nnx.GraphDef,
    start: nnx.State,
    directory: pathlib.Path,
    *,
    on_open: Callable[[records.Run, bool], None] = lambda run, finished: None,
    on_row: Callable[[records.Row], None] = lambda row: None,
    stopping: Callable[[], bool] = lambda: False,
) -> list[records.Row]:
    """Runs one method, or what is left of the run that is there.

    Args:
        config: the run's settings.
        graphdef: the policy's structure.
        start: its parameters at the warm start.
        directory: where the run's records go, or beside it (`records.Run.beside`) if a run with
            other settings is there. One of fewer steps is gone on with.
        on_open: called with the run's records, and whether it is finished.
        on_row: called with each new row of metrics.
        stopping: called after each optimizer step and each sampling, and while another process
            works on the run; True stops it there.

    Returns:
        The metrics of the whole run. Row 0 is the start; row t > 0 describes optimizer step t:
        `reward` of its rollout batch, `step_kl` of the policy before the step from that after it,
        `start_kl` of the policy after it from the start and its `entropy` (exact, over the whole
        vocabulary, in nats per response token of the rollout batch), `gradient_norm` before
        clipping, `update_norm`, `accumulation_fraction` and `intra_fraction` (means over the
        microbatches, 0 where the method does not remove so), `seconds` of the update, and at times
        `validation`, the greedy accuracy on the held-out prompts.

    Raises:
        files.Failure: a step gave numbers that are not finite; or the directory holds a
            checkpoint that does not fit, is damaged, cannot be used, or has no room for the
            checkpoints.
        records.Preempted: `stopping` said so; what was done is saved.
    """
    settings = config.training
    method = methods.make_method(
        config.method, settings.method, graphdef, settings.microbatches, config.update_norms
    )
    validation_prompts = config.start.task.validation_prompts()

    def validate(params):
        return sampling.greedy_accuracy(config.start.task, graphdef, params, validation_prompts)

    grows = ("training.steps", "update_norms", "start.max_steps")
    with records.Run.beside(directory, config, stopping, grows=grows) as run:
        rows = run.rows()
        finished = run.step == settings.steps
        on_open(run, finished)
        if finished:
            return rows
        fresh = State(
            params=start,
            opt_state=method.optimizer.init(start),
            cumulative_kl=jnp.float32(0),
            rollouts=sampling.no_rollouts(
                config.start.task, settings.prompts * settings.group_size
            ),
        )
        state = run.restore(fresh)
        run.begin(state, [_without_early_validation(row, settings) for row in rows])
        if run.step is None:
            row = {"step": 0, "start_kl": 0.0, "cumulative_kl": 0.0, "validation": validate(start)}
            run.log(row)
            on_row(row)
        done = run.step or 0
        in_batch = done % settings.steps_per_batch
        for first in range(done - in_batch, settings.steps, settings.steps_per_batch):
            if first >= done:
                state = state._replace(rollouts=collect(config, graphdef, state.params, first))
                if stopping():
                    run.stop(first, state)
            reward, minibatches = divide(config, state.rollouts, first)
            for step, minibatch in enumerate(minibatches, first + 1):
                if step <= done:
                    continue
                state, row = _step(method, graphdef, start, state, minibatch)
                row = {"step": step, "reward": reward, **row}
                if step % settings.validation_every == 0 or step == settings.steps:
                    row["validation"] = validate(state.params)
                run.log(row)
                run.check_finite(row, state)
                on_row(row)
                if step % settings.checkpoint_every == 0 or step == settings.steps:
                    run.save(step, state)
                if stopping():
                    run.stop(step, state)
    return records.read_metrics(run.directory)


def _without_early_validation(row: records.Row, settings: TrainingConfig) -> records.Row:
    """A row of a run that goes on; what was its last step is then validated only if it is due."""
    is_due = row["step"] % settings.validation_every == 0
    return {key: value for key, value in row.items() if is_due or key != "validation"}


def update_norms(rows: Iterable[records.Row]) -> tuple[float, ...]:
    """The length of each update that a run's metrics tell of."""
    return tuple(row["update_norm"] for row in rows if row.get("update_norm") is not None)


def _prompts(config: RunConfig, batch: int) -> tuple[list[str], np.random.Generator]:
    """A batch's prompts, one per response, and the generator that shuffles the responses."""
    settings = config.training
    rng = np.random.default_rng([config.seed, batch])
    prompts = config.start.task.training_prompts(settings.prompts, rng)
    return [prompt for prompt in prompts for _ in range(settings.group_size)], rng


def collect(
    config: RunConfig, graphdef: nnx.GraphDef, params: nnx.State, batch: int
) -> sampling.Rollouts:
    """Samples a rollout batch."""
    prompts, _ = _prompts(config, batch)
    key = jax.random.fold_in(jax.random.key(config.seed), batch)
    return jax.block_until_ready(
        sampling.respond(config.start.task, graphdef, params, prompts, key)
    )


def divide(
    config: RunConfig, rollouts: sampling.Rollouts, batch: int
) -> tuple[float, list[methods.Microbatch]]:
    """Rewards a rollout batch and divides it among its optimizer steps.

    Returns:
        The mean reward; per optimizer step its microbatches, stacked (k, b, ...).
    """
    settings = config.training
    prompts, rng = _prompts(config, batch)
    rollouts = jax.device_get(rollouts)
    rewards = config.start.task.reward(prompts, np.asarray(rollouts.responses))
    advantages = pg.group_relative_advantages(rewards.reshape(-1, settings.group_size)).ravel()

    def minibatch(share):
        order = rng.permutation(share).reshape(settings.microbatches, settings.microbatch_size)
        chosen = jax.tree.map(lambda x: x[order], rollouts)
        weights = pg.token_mean_coefficients(advantages[order], chosen.mask.sum())
        return methods.Microbatch(chosen, weights)

    shares = np.split(np.arange(len(prompts)), settings.steps_per_batch)
    return float(rewards.mean()), [minibatch(share) for share in shares]


def _step(
    method: methods.Method,
    graphdef: nnx.GraphDef,
    start: nnx.State,
    state: State,
    minibatch: methods.Microbatch,
) -> tuple[State, dict[str, float]]:
    """One optimizer step, and what there is to say about it."""
    arguments = method, state.params, state.opt_state, minibatch
    update.lower(*arguments).compile()  # at the first step only, and not timed
    began = time.perf_counter()
    params, opt_state, lengths = jax.block_until_ready(update(*arguments))
    seconds = time.perf_counter() - began
    divergences = _divergences(graphdef, state.params, params, start, state.rollouts)
    cumulative_kl = state.cumulative_kl + divergences["step_kl"]
    row = divergences | {"cumulative_kl": cumulative_kl} | lengths | {"seconds": seconds}
    state = State(params, opt_state, cumulative_kl, state.rollouts)
    return state, {k: float(v) for k, v in row.items()}


@functools.partial(jax.jit, static_argnames="method")
def update(
    method: methods.Method,
    params: nnx.State,
    opt_state: optax.OptState,
    minibatch: methods.Microbatch,
) -> tuple[nnx.State, optax.OptState, dict[str, jax.Array]]:
    """One optimizer step: a scan over the microbatches of `minibatch` (k, b, ...)."""

    def accumulate(carry, microbatch):
        params, opt_state = carry
        grads, extra = method.gradient(params, microbatch)
        updates, opt_state = method.optimizer.update(grads, opt_state, params, **extra)
        removed = {name: optax.tree.get(opt_state, name, 0.0) for name in FRACTIONS}
        return (optax.apply_updates(params, updates), opt_state), removed

    (params, opt_state), removed = jax.lax.scan(accumulate, (params, opt_state), minibatch)
    return (
        params,
        opt_state,
        {
            "gradient_norm": optax.tree.get(opt_state, "gradient_norm"),
            "update_norm": optax.tree.get(opt_state, "update_norm"),
        }
        | jax.tree.map(jnp.mean, removed),
    )


@functools.partial(jax.jit, static_argnames="graphdef")
def _divergences(graphdef, before, after, start, rollouts):
    before, after, start = (
        sampling.response_logits(graphdef, params, rollouts) for params in (before, after, start)
    )
    return {
        "step_kl": pg.exact_kl(before, after, rollouts.mask),
        "start_kl": pg.exact_kl(after, start, rollouts.mask),
        "entropy": pg.entropy(after, rollouts.mask),
    }
