"""`make bench-training`: a rollout batch and an optimizer step, ours beside Tunix's GRPO learner.

Both train one Qwen3 from the same weights on the same prompts, by turns in one process: after each
of Tunix's steps ours take one each. What is timed is what a training loop does for a step: to
sample the responses, to reward them, to update, and of ours also to measure the KL divergences and
the entropy, which Tunix does not have. Validation and checkpoints are left out on both sides.
"""

import dataclasses
import pathlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import tyro
from flax import nnx
from rich import box, table

from benchmarks import measure, tunix_learner
from benchmarks.screen import terminal
from experiments import (
    batches,
    configs,
    divergence,
    environment,
    methods,
    sampling,
    training,
    warm_start,
)
from experiments.models import lora
from experiments.models.config import DecoderConfig
from experiments.tasks.settings import TaskConfig
from experiments.tasks.task import Problem

CHARACTERS = "".join(map(chr, range(0x4E00, 0x4E00 + 1022)))
"""With padding and the end token a vocabulary of 1,024."""
WIDTH = 16
"""Tokens of a prompt, and most of a response."""
TUNIX = "Tunix, GRPO"
PARTS = ("sampling", "update", "KL", "step")


class Even:
    """Random texts, to be gone on with by characters of even code points."""

    characters = CHARACTERS
    longest_prompt = WIDTH
    longest_response = WIDTH - 1

    def __init__(self, problems: int = 64):
        rng = np.random.default_rng(0)
        rows = rng.choice(list(CHARACTERS), (problems, WIDTH))
        self.training = [Problem("".join(row)) for row in rows]
        self.validation = self.training[:1]

    def answer(self, problem: Problem) -> str:
        """A response of the highest reward."""
        return CHARACTERS[0]

    def grade(
        self, problems: Sequence[Problem], responses: Sequence[str]
    ) -> dict[str, list[float]]:
        """The share of even characters."""
        return {"reward": rewards(responses)}


def rewards(responses: Sequence[str]) -> list[float]:
    """The share of even characters of each response."""
    return [
        float(np.mean([ord(character) % 2 == 0 for character in response] or [False]))
        for response in responses
    ]


@dataclasses.dataclass(frozen=True)
class Command:
    """Times a rollout batch and an optimizer step, ours and Tunix's, in interleaved rounds."""

    repeats: int = 11
    """Timed rounds, after two in which programs are compiled."""
    width: int = 128
    """Of the decoder, whose feed-forward is 2.5 times as wide."""
    layers: int = 4
    """Of the decoder."""
    prompts: int = 64
    """In a rollout batch, each with 4 responses, in microbatches of 8."""
    seed: int = 0
    """Of parameters, sampling, and the order within the rounds."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu counts the seconds of all threads, where other programs use the machine too."""
    directory: pathlib.Path = pathlib.Path("runs/bench/training")
    """Where the results go."""

    @property
    def now(self) -> Callable[[], float]:
        """The clock."""
        return time.perf_counter if self.clock == "wall" else time.process_time


def run_configs(command: Command) -> dict[str, configs.RunConfig]:
    """The settings of each of our methods, by its name in the table."""
    width = command.width
    shape = DecoderConfig(
        width=width,
        layers=command.layers,
        heads=4,
        kv_heads=2,
        head_dim=width // 4,
        hidden=width * 5 // 2,
        rope_theta=tunix_learner.ROPE_THETA,
    )
    task = TaskConfig("benchmarks.training:Even", (f"problems={command.prompts}",))
    start = warm_start.WarmStartConfig(decoder=shape, batch_size=1, seed=command.seed)
    settings = configs.TrainingConfig(prompts=command.prompts, group_size=4, steps_per_batch=1)
    method = dataclasses.replace(settings.method, fused=True)
    fused = dataclasses.replace(settings, method=method)
    fewer = dataclasses.replace(fused, kl_sequences=command.prompts)

    def config(method: methods.MethodName, settings: configs.TrainingConfig) -> configs.RunConfig:
        return configs.RunConfig(method, command.seed, task=task, start=start, training=settings)

    return {
        "GRPO": config("grpo", settings),
        "PROMA": config("proma_accumulation", settings),
        "PROMA, fused": config("proma_accumulation", fused),
        "PROMA, fused, KL of a quarter": config("proma_accumulation", fewer),
    }


class Ours:
    """One of our methods, step after step, as `training.train` takes them."""

    def __init__(self, config: configs.RunConfig, policy: sampling.Policy, params: nnx.State):
        settings = config.training
        self._config, self._policy = config, policy._replace(config=settings.sampling)
        self._method = methods.make_method(
            config.method, settings.method, self._policy, settings.microbatches
        )
        self._start = self._params = jax.device_put(params, jax.devices()[0])
        self._opt_state = jax.device_put(self._method.init(params), jax.devices()[0])
        _, self._frozen = lora.split(self._start)
        self._steps = 0

    def step(self, now: Callable[[], float]) -> dict[str, float]:
        """Takes a step, and says how many seconds of the clock `now` each part of it took."""
        config, policy = self._config, self._policy
        began = now()
        rollouts = batches.collect(config, policy, self._params, self._steps)
        jax.block_until_ready(rollouts)
        sampled = now()
        batch = batches.divide(config, policy, rollouts, self._steps)
        divided = now()
        meter = divergence.Meter(
            policy,
            batch.measured,
            batch.copies,
            config.training.sequences_at_a_time,
            self._start,
            self._params,
        )
        metered = now()
        [minibatch] = batch.minibatches
        self._params, self._opt_state, _ = jax.block_until_ready(
            training.update(
                self._method.step, self._params, self._opt_state, minibatch, self._frozen
            )
        )
        updated = now()
        jax.block_until_ready(meter.step(self._params))
        ended = now()
        self._steps += 1
        return {
            "sampling": sampled - began,
            "update": updated - metered,
            "KL": metered - divided + ended - updated,
            "step": ended - began,
        }


def measured(command: Command) -> dict[str, list[Mapping[str, float]]]:
    """The seconds of each round's parts, by name.

    In the first round everyone compiles all of its programs, and in the second most do again.
    """
    chosen = run_configs(command)
    first = chosen["GRPO"]
    start = warm_start.StartConfig(first.task, first.start)
    policy, params = start.untrained()
    ours = {name: Ours(config, policy, params) for name, config in chosen.items()}
    learner = tunix_learner.learner(first.training, policy, params, CHARACTERS, rewards)
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in (TUNIX, *ours)}
    order = random.Random(command.seed)

    def between(seconds: Mapping[str, float]) -> None:
        is_first = not found[TUNIX]
        found[TUNIX].append(seconds)
        for name in order.sample(list(ours), len(ours)):
            if is_first:
                jax.clear_caches()
            found[name].append(ours[name].step(command.now))

    prompts = [str(problem.prompt) for problem in start.toy_task.training]
    tunix_learner.train_timed(learner, [prompts] * (command.repeats + 2), between, command.now)
    return found


def _summary(found: Mapping[str, list[Mapping[str, float]]]) -> dict[str, Any]:
    """Of each row: the first call's seconds, and the quartiles of the timed rounds' seconds."""
    return {
        name: {"first": rounds[0]["step"]}
        | {
            part: measure.quartiles([seconds[part] for seconds in rounds[2:]])
            for part in PARTS
            if part in rounds[0]
        }
        for name, rounds in found.items()
    }


def _table(command: Command, summary: Mapping[str, Any]) -> table.Table:
    responses = command.prompts * 4
    shown = table.Table(
        title=f"{responses} sequences of {WIDTH} + {WIDTH} tokens, {responses // 8} microbatches",
        caption=f"{command.clock} seconds: median and quartiles of the rounds; tokens/s: response "
        "tokens over the median; step: sampling, rewards, update, and of ours KL; first: with "
        "compilation",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    headers = ("sampling\ntokens/s", "sampling\ns", "update\ns", "KL\ns", "step\ns")
    shown.add_column("", no_wrap=True)
    for header in (*headers, "step\ntokens/s", "first\ns"):
        shown.add_column(header, justify="right", no_wrap=True)
    tokens = responses * WIDTH
    for name, row in summary.items():
        cells = [
            f"{row[part].median:.3f}\n[{row[part].lower:.3f}, {row[part].upper:.3f}]"
            if part in row
            else ""
            for part in PARTS
        ]
        rates = [f"{tokens / row[part].median:,.0f}" for part in ("sampling", "step")]
        shown.add_row(name, rates[0], *cells, rates[1], f"{row['first']:.1f}")
    return shown


def main(command: Command) -> None:
    """Runs the command."""
    found = measured(command)
    summary = _summary(found)
    terminal.print(_table(command, summary))
    command.directory.mkdir(parents=True, exist_ok=True)
    file = command.directory / "results.json"
    measure.save(file, command, environment.current(), seconds=found, summary=summary)
    terminal.print(f"All numbers: {file}", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Command, prog="python -m benchmarks.training"))
