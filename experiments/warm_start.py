"""The start that all methods share: a decoder trained on worked examples to about half right.

Reinforcement learning needs some successes to begin with. The start is trained once, saved, and
reused by every run that asks for the same settings. A training that was interrupted, or fell short
and is given more steps, goes on from its last checkpoint, which every check of the accuracy leaves.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from pydantic.dataclasses import dataclass

from experiments import checked, files, records, sampling, validation
from experiments.models.decoder import Decoder, DecoderConfig
from experiments.models.tokens import Characters, padded
from experiments.tasks.settings import TaskConfig
from experiments.tasks.task import Problem, ToyTask, draw
from proma_jax import policy_gradient as pg


@dataclass(frozen=True, config=checked.CONFIG)
class WarmStartConfig:
    """The decoder and its supervised training."""

    decoder: DecoderConfig = DecoderConfig()
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
        if self.check_every > self.max_steps:
            raise ValueError(
                f"check_every={self.check_every} must be at most max_steps={self.max_steps}, or "
                "the accuracy is never checked"
            )


@dataclass(frozen=True, config=checked.CONFIG)
class StartConfig:
    """All that a start depends on."""

    task: TaskConfig
    start: WarmStartConfig

    def __post_init__(self):
        task = self.task.made
        if not hasattr(task, "characters"):
            raise ValueError(
                f"task={self.task.name} is not one that a small decoder can begin with, which has "
                "characters, answers, and widths: choose the model folder that training begins with"
            )
        size, tokens = self.start.decoder.vocab_size, Characters(task.characters).size
        if size and size < tokens:
            raise ValueError(
                f"start.decoder.vocab_size={size} must be at least {tokens}, the task's tokens, or "
                "0, which means as many"
            )
        if self.start.batch_size > len(task.training):
            raise ValueError(
                f"start.batch_size={self.start.batch_size} must be at most {len(task.training)}, "
                "the task's training problems"
            )

    @functools.cached_property
    def toy_task(self) -> ToyTask:
        """The task, which answers its own problems."""
        return cast(ToyTask, self.task.made)

    @functools.cached_property
    def decoder(self) -> DecoderConfig:
        """The decoder's shape, its table's rows included."""
        shape, size = self.start.decoder, Characters(self.toy_task.characters).size
        return dataclasses.replace(shape, vocab_size=shape.vocab_size or size)

    def untrained(self) -> tuple[sampling.Policy, nnx.State]:
        """The policy, and its parameters before training."""
        graphdef, params = nnx.split(Decoder(self.decoder, rngs=nnx.Rngs(self.start.seed)))
        policy = sampling.Policy(
            graphdef=graphdef,
            tokenizer=Characters(self.toy_task.characters),
            prompt_width=self.toy_task.longest_prompt,
            response_width=self.toy_task.longest_response + 1,
        )
        return policy, params


def examples(
    policy: sampling.Policy, task: ToyTask, problems: Sequence[Problem]
) -> sampling.Rollouts:
    """Worked examples in the form of rollouts: the prompts with their answers as responses."""
    tokens, valid = padded(
        policy.tokenizer, [problem.prompt for problem in problems], policy.prompt_width
    )
    answers = [policy.tokenizer.encode(task.answer(problem)) for problem in problems]
    responses = np.full((len(problems), policy.response_width), policy.tokenizer.pad, np.int32)
    for row, answer in zip(responses, answers, strict=True):
        row[: len(answer) + 1] = [*answer, policy.tokenizer.ends[0]]
    mask = responses != policy.tokenizer.pad
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
    config: StartConfig,
    directory: pathlib.Path,
    on_row: Callable[[records.Row], None] = lambda row: None,
    stopping: Callable[[], bool] = lambda: False,
    on_open: Callable[[records.Run, bool], None] = lambda run, finished: None,
) -> tuple[sampling.Policy, nnx.State]:
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
        The policy and its parameters.

    Raises:
        files.Failure: the directory holds a checkpoint that does not fit, is damaged, cannot be
            used, or has no room for the checkpoints; a step gave numbers that are not finite; or
            the target was not reached within max_steps.
        records.Preempted: `stopping` said so; what was done is saved.
    """
    settings, task = config.start, config.toy_task
    policy, params = config.untrained()
    optimizer = optax.chain(
        optax.clip_by_global_norm(settings.max_gradient_norm), optax.adamw(settings.learning_rate)
    )
    with records.Run.beside(directory, config, stopping, grows=("start.max_steps",)) as run:
        fresh = State(params, optimizer.init(params), jnp.float32(jnp.nan))
        state = run.restore(fresh)
        rows = run.rows()
        finished = bool(state.accuracy >= settings.target_accuracy)
        on_open(run, finished)
        if finished:
            return policy, state.params
        run.begin(state, rows)
        done = run.step or 0
        rng = np.random.default_rng(settings.seed)
        for step in range(1, settings.max_steps + 1):
            problems = draw(task, settings.batch_size, rng)
            if step <= done:
                continue
            batch = examples(policy, task, problems)
            loss, params, opt_state = _update(
                optimizer, policy, state.params, state.opt_state, batch
            )
            state = State(params, opt_state, state.accuracy)
            row = {"step": step, "loss": float(loss)}
            run.check_finite(row, (params, opt_state))
            if step % settings.check_every == 0:
                row |= validation.scores(policy, params, task)
                state = state._replace(accuracy=jnp.float32(row["validation"]))
                run.log(row)
                run.save(step, state)
            on_row(row)
            if state.accuracy >= settings.target_accuracy:
                return policy, params
            if stopping():
                run.stop(step, state)
    raise files.Failure(
        f"The warm start has a greedy validation accuracy of {state.accuracy:.2f} after "
        f"{settings.max_steps} steps, below --start.target-accuracy {settings.target_accuracy}. "
        "With a larger --start.max-steps it goes on; with a lower target another begins."
    )


@functools.partial(jax.jit, static_argnames=("optimizer", "policy"))
def _update(optimizer, policy, params, opt_state, batch):
    def loss_fn(params):
        logprobs = sampling.response_logprobs(policy, params, batch)
        weights = pg.token_mean_coefficients(jnp.ones(len(batch.mask)), batch.mask.sum())
        return pg.reinforce_loss(logprobs, weights, batch.mask)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return loss, optax.apply_updates(params, updates), opt_state
