"""One method's run: rollouts, updates, and a row of metrics per optimizer step.

A rollout batch serves several optimizer steps, each with its own prompts; within a step the
sequences of a group are spread over the microbatches at random. Prompts, sampling noise and that
shuffle depend on the seed and the batch alone, so they are the same for every method, and a run
resumed after any of its steps equals the uninterrupted one.
"""

import functools
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments import (
    batches,
    divergence,
    meshes,
    methods,
    processes,
    records,
    sampling,
    validation,
)
from experiments.configs import RunConfig, TrainingConfig
from experiments.models import lora


class State(NamedTuple):
    """What a run carries from one optimizer step to the next."""

    params: nnx.State
    """Those that are trained."""
    opt_state: optax.OptState
    cumulative_kl: jax.Array
    rollouts: sampling.Rollouts
    """Of the last batch sampled."""


def train(
    config: RunConfig,
    policy: sampling.Policy,
    start: nnx.State,
    directory: pathlib.Path,
    *,
    on_open: Callable[[records.Run, bool], None] = lambda run, finished: None,
    on_row: Callable[[records.Row], None] = lambda row: None,
    on_compiled: Callable[[jax.stages.Compiled], None] = lambda update: None,
    stopping: Callable[[], bool] = lambda: False,
) -> list[records.Row]:
    """Runs one method, or what is left of the run that is there.

    Args:
        config: the run's settings.
        policy: the policy; it is sampled from as the settings say.
        start: its parameters at the start.
        directory: where the run's records go, or beside it (`records.Run.beside`) if a run with
            other settings is there. One of fewer steps is gone on with.
        on_open: called with the run's records, and whether it is finished.
        on_row: called with each new row of metrics.
        on_compiled: called before each step with the compiled `update`.
        stopping: called after each optimizer step and each sampling, and while another process
            works on the run; True stops it there.

    Returns:
        The metrics of the whole run. Row 0 is the start; row t > 0 describes optimizer step t:
        `reward` of its rollout batch, with `response_tokens`, the mean length of its responses,
        `cut_off`, the fraction of them without an end token, and `rollout_NAME`, the mean of the
        task's grade NAME; `step_kl` of the policy before the step from that after it,
        `start_kl` of the policy after it from the start and its `entropy` (exact, over the whole
        vocabulary, in nats per response token of the rollout batch, or of its `kl_sequences`);
        `gradient_norm` before clipping, `update_norm`, `accumulation_fraction` and `intra_fraction`
        (means over the microbatches, 0 where the method does not remove so), `seconds` of the
        update, and at times `validation`, the mean reward of greedy responses to held-out problems,
        and `validation_NAME`.

    Raises:
        files.Failure: a step gave numbers that are not finite; or the directory holds a
            checkpoint that does not fit, is damaged, cannot be used, or has no room for the
            checkpoints.
        records.Preempted: `stopping` said so; what was done is saved.
    """
    settings = config.training
    policy, method = _prepared(config, policy)
    if policy.mesh is None:
        # As `Run.restore` does: arrays that are not committed would have more programs compiled.
        start = jax.device_put(start, jax.devices()[0])
    start = meshes.spread(policy.mesh, start)
    _, frozen = lora.split(start)

    def validate(params):
        return validation.scores(
            policy,
            params,
            config.task.made,
            settings.validation_problems,
            settings.sequences_at_a_time,
        )

    grows = ("training.steps", "update_norms", "start.max_steps")
    with (
        meshes.used(policy.mesh),
        records.Run.beside(directory, config, stopping, grows=grows) as run,
    ):
        rows = run.rows()
        finished = run.step == settings.steps
        on_open(run, finished)
        if finished:
            return rows
        state = run.restore(_fresh(config, policy, method, start))
        run.begin(state, [_without_early_validation(row, settings) for row in rows])
        if run.step is None:
            row = {"step": 0, "start_kl": 0.0, "cumulative_kl": 0.0, **validate(start)}
            run.log(row)
            on_row(row)
        done = run.step or 0
        in_batch = done % settings.steps_per_batch
        for first in range(done - in_batch, settings.steps, settings.steps_per_batch):
            if first >= done:
                state = state._replace(
                    rollouts=batches.collect(
                        config, policy, nnx.merge_state(state.params, frozen), first
                    )
                )
                if processes.any_of(stopping()):
                    run.stop(first, state)
            batch = batches.divide(config, policy, state.rollouts, first)
            meter = divergence.Meter(
                policy,
                batch.measured,
                batch.copies,
                settings.sequences_at_a_time,
                start,
                nnx.merge_state(state.params, frozen),
            )
            for step, minibatch in enumerate(batch.minibatches, first + 1):
                if step <= done:
                    continue
                if config.update_norms:
                    length = config.update_norms[step - 1]
                    state = state._replace(opt_state=methods.aimed(state.opt_state, length))
                state, row = _step(method, state, minibatch, frozen, meter, on_compiled)
                row = {"step": step, **batch.described, **row}
                if step % settings.validation_every == 0 or step == settings.steps:
                    row |= validate(nnx.merge_state(state.params, frozen))
                run.log(row)
                run.check_finite(row, state)
                on_row(row)
                if step % settings.checkpoint_every == 0 or step == settings.steps:
                    run.save(step, state)
                if processes.any_of(stopping()):
                    run.stop(step, state)
        return run.all_rows()


def trained(
    config: RunConfig, policy: sampling.Policy, start: nnx.State, directory: pathlib.Path
) -> nnx.State:
    """All parameters that a finished run ended with; arguments and errors are those of `train`."""
    policy, method = _prepared(config, policy)
    with records.Run(directory, config) as run:
        state = run.restore(_fresh(config, policy, method, start))
    _, frozen = lora.split(start)
    return nnx.merge_state(state.params, frozen)


def _prepared(config: RunConfig, policy: sampling.Policy) -> tuple[sampling.Policy, methods.Method]:
    """The policy as the run samples from it, and the method that trains it."""
    settings = config.training
    policy = policy._replace(config=settings.sampling)
    return policy, methods.make_method(
        config.method, settings.method, policy, settings.microbatches
    )


def _fresh(
    config: RunConfig, policy: sampling.Policy, method: methods.Method, start: nnx.State
) -> State:
    """A run's state before its first step."""
    sequences = config.training.prompts * config.training.group_size
    params, _ = lora.split(start)
    params, opt_state = meshes.spread(policy.mesh, (params, method.init(params)))
    others = jnp.float32(0), sampling.no_rollouts(policy, sequences)
    return State(params, opt_state, *meshes.whole(policy.mesh, others))


def _without_early_validation(row: records.Row, settings: TrainingConfig) -> records.Row:
    """A row of a run that goes on; what was its last step is then validated only if it is due."""
    is_due = row["step"] % settings.validation_every == 0
    return {k: value for k, value in row.items() if is_due or not k.startswith("validation")}


def update_norms(rows: Iterable[records.Row]) -> tuple[float, ...]:
    """The length of each update that a run's metrics tell of."""
    return tuple(row["update_norm"] for row in rows if row.get("update_norm") is not None)


def _step(
    method: methods.Method,
    state: State,
    minibatch: methods.Microbatch,
    frozen: nnx.State,
    meter: divergence.Meter,
    on_compiled: Callable[[jax.stages.Compiled], None],
) -> tuple[State, dict[str, float]]:
    """One optimizer step, and what there is to say about it."""
    arguments = method.step, state.params, state.opt_state, minibatch, frozen
    on_compiled(update.lower(*arguments).compile())  # at the first step only, and not timed
    began = time.perf_counter()
    params, opt_state, lengths = jax.block_until_ready(update(*arguments))
    seconds = time.perf_counter() - began
    divergences = meter.step(nnx.merge_state(params, frozen))
    cumulative_kl = state.cumulative_kl + divergences["step_kl"]
    row = divergences | {"cumulative_kl": cumulative_kl} | lengths | {"seconds": seconds}
    state = State(params, opt_state, cumulative_kl, state.rollouts)
    return state, {k: float(v) for k, v in row.items()}


@functools.partial(jax.jit, static_argnames="take_step")
def update(
    take_step: methods.Step,
    params: nnx.State,
    opt_state: optax.OptState,
    minibatch: methods.Microbatch,
    frozen: nnx.State,
) -> tuple[nnx.State, optax.OptState, dict[str, jax.Array]]:
    """One optimizer step, from the microbatches of `minibatch` (k, b, ...)."""
    params, opt_state, removed = take_step(params, opt_state, minibatch, frozen)
    lengths = {name: optax.tree.get(opt_state, name) for name in ("gradient_norm", "update_norm")}
    return params, opt_state, lengths | jax.tree.map(jnp.mean, removed)
