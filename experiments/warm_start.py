"""The start that all methods share: a decoder trained on worked examples to about half right.

Reinforcement learning needs some successes to begin with. The start is trained once, saved, and
reused by every run that asks for the same settings. A training that was interrupted, or fell short
and is given more steps, goes on from its last checkpoint, which every check of the accuracy leaves.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from pydantic.dataclasses import dataclass

from experiments import checked, files, records, sampling
from experiments.models.decoder import Decoder, DecoderConfig
from experiments.tasks import addition
from proma_jax import policy_gradient as pg


@dataclass(frozen=True, config=checked.CONFIG)
class WarmStartConfig:
    """The task, the decoder, and its supervised training."""

    task: addition.Addition = addition.Addition()
    decoder: DecoderConfig = DecoderConfig(vocab_size=addition.VOCAB_SIZE)
    target_accuracy: checked.Fraction = 0.5
    """Training ends at the first check with at least this greedy validation accuracy."""
    check_every: checked.Count = 25
    """Steps between two checks of the accuracy."""
    max_steps: checked.Count = 2000
    """Steps after which a start that is still not good enough is an error."""
    batch_size: checked.Count = 256
    """Worked examples in one step."""
    learning_rate: checked.Positive = 1e-3
    """Of AdamW, constant."""
    max_gradient_norm: checked.Positive = 1.0
    """Gradients are clipped to this global norm."""
    seed: checked.Seed = 0
    """Of the decoder's initialisation and of the examples."""

    def __post_init__(self):
        if self.decoder.vocab_size < addition.VOCAB_SIZE:
            raise ValueError(
                f"decoder.vocab_size={self.decoder.vocab_size} must be at least "
                f"{addition.VOCAB_SIZE}, the task's tokens"
            )
        if self.batch_size > self.task.training_problems:
            raise ValueError(
                f"batch_size={self.batch_size} must be at most {self.task.training_problems}, the "
                f"training problems with task.digits={self.task.digits} and "
                f"task.validation_problems={self.task.validation_problems}"
            )
        if self.check_every > self.max_steps:
            raise ValueError(
                f"check_every={self.check_every} must be at most max_steps={self.max_steps}, or "
                "the accuracy is never checked"
            )


def examples(task: addition.Addition, prompts: list[str]) -> sampling.Rollouts:
    """Worked examples in the form of rollouts: the prompts with their answers as responses."""
    tokens, valid = task.encode_prompts(prompts)
    responses = task.encode_responses([task.answer(prompt) for prompt in prompts])
    mask = responses != addition.PAD
    return sampling.Rollouts(
        tokens=jnp.concatenate([tokens, responses], axis=1),
        valid=jnp.concatenate([valid, mask], axis=1),
        mask=jnp.asarray(mask),
        logprobs=jnp.zeros(mask.shape),
    )


class State(NamedTuple):
    """What the training carries from one step to the next."""

    params: nnx.State
    opt_state: optax.OptState
    accuracy: jax.Array
    """At the last check, NaN before the first."""


def warm_start(
    config: WarmStartConfig,
    directory: pathlib.Path,
    on_row: Callable[[records.Row], None] = lambda row: None,
    stopping: Callable[[], bool] = lambda: False,
    on_open: Callable[[records.Run, bool], None] = lambda run, finished: None,
) -> tuple[nnx.GraphDef, nnx.State]:
    """The trained policy, as it is if it is there.

    Args:
        config: its settings.
        directory: where it is, or will be, or beside it (`records.Run.beside`) if a start with
            other settings is there.
        on_row: called with each step's row (step, loss and, if the accuracy was checked,
            validation).
        stopping: called after each step, and while another process works on the start; True stops
            the training there.
        on_open: called with the start's records, and whether it is finished.

    Returns:
        The decoder as `nnx.split` gives it.

    Raises:
        files.Failure: the directory holds a checkpoint that does not fit, is damaged, cannot be
            used, or has no room for the checkpoints; a step gave numbers that are not finite; or
            the target was not reached within max_steps.
        records.Preempted: `stopping` said so; what was done is saved.
    """
    task = config.task
    graphdef, params = nnx.split(Decoder(config.decoder, rngs=nnx.Rngs(config.seed)))
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_gradient_norm), optax.adamw(config.learning_rate)
    )
    with records.Run.beside(directory, config, stopping, grows=("max_steps",)) as run:
        fresh = State(params, optimizer.init(params), jnp.float32(jnp.nan))
        state = run.restore(fresh)
        rows = run.rows()
        finished = bool(state.accuracy >= config.target_accuracy)
        on_open(run, finished)
        if finished:
            return graphdef, state.params
        run.begin(state, rows)
        done = run.step or 0
        rng = np.random.default_rng(config.seed)
        validation_prompts = task.validation_prompts()
        for step in range(1, config.max_steps + 1):
            prompts = task.training_prompts(config.batch_size, rng)
            if step <= done:
                continue
            loss, params, opt_state = _update(
                optimizer, graphdef, state.params, state.opt_state, examples(task, prompts)
            )
            state = State(params, opt_state, state.accuracy)
            row = {"step": step, "loss": float(loss)}
            run.check_finite(row, (params, opt_state))
            if step % config.check_every == 0:
                accuracy = sampling.greedy_accuracy(task, graphdef, params, validation_prompts)
                state = state._replace(accuracy=jnp.float32(accuracy))
                row["validation"] = accuracy
                run.log(row)
                run.save(step, state)
            on_row(row)
            if state.accuracy >= config.target_accuracy:
                return graphdef, params
            if stopping():
                run.stop(step, state)
    raise files.Failure(
        f"The warm start has a greedy validation accuracy of {state.accuracy:.2f} after "
        f"{config.max_steps} steps, below --start.target-accuracy {config.target_accuracy}. With a "
        "larger --start.max-steps it goes on; with a lower target another begins."
    )


@functools.partial(jax.jit, static_argnames=("optimizer", "graphdef"))
def _update(optimizer, graphdef, params, opt_state, batch):
    def loss_fn(params):
        logprobs = sampling.response_logprobs(graphdef, params, batch)
        weights = pg.token_mean_coefficients(jnp.ones(len(batch.mask)), batch.mask.sum())
        return pg.reinforce_loss(logprobs, weights, batch.mask)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return loss, optax.apply_updates(params, updates), opt_state
