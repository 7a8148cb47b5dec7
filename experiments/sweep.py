"""`python -m experiments.sweep`: methods x learning rates x seeds from one start, and figures."""

import ast
import dataclasses
import functools
import itertools
import pathlib
import time
import typing
from collections.abc import Callable
from datetime import timedelta
from statistics import fmean
from typing import Annotated, Any

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments import (
    checked,
    command_line,
    files,
    plot,
    pool,
    preemption,
    report,
    warm_start,
)
from experiments.command_line import Unprefixed
from experiments.configs import RunConfig, TrainingConfig
from experiments.loggers import LoggersConfig
from experiments.methods import MethodConfig, MethodName
from experiments.models.settings import ModelConfig
from experiments.tasks.settings import TaskConfig

_METHODS = [name for name in typing.get_args(MethodName) if name != "grpo_matched"]


@dataclass(frozen=True, config=checked.CONFIG)
class Command:
    """Trains variants of the methods with several learning rates and seeds, all from one start.

    Run again, it goes on where it was interrupted or killed, and takes finished runs as they are.
    Without flags it is the study of docs/study.md. `--preset NAME` stands for the flags of a
    preset, in experiments/presets.py: demo, addition, reversal, smollm2-arithmetic,
    gsm8k-qwen3-0.6b or mbpp-qwen3-0.6b. Flags beside it win.

    Results go to runs/sweep/<variant>/lr_<rate>/seed_<seed> in the current folder, the figures
    (`python -m experiments.plot`) to runs/sweep/figures, and the warm start, where no pretrained
    model is named, to runs/warm_start.
    """

    variants: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "reinforce",
        "grpo",
        "proma_accumulation,skip_fraction=0.5,relative_bound=None",
        "proma_accumulation,skip_fraction=0,relative_bound=None",
        "proma_intra",
    )
    """Which methods, each METHOD or METHOD,SETTING=VALUE,... with what differs from the settings
    of --training.method."""
    learning_rates: Annotated[tuple[checked.Positive, ...], Field(min_length=1)] = (
        1e-5,
        3e-5,
        1e-4,
        3e-4,
        1e-3,
    )
    """Of AdamW; every variant runs with each. They take the place of
    --training.method.learning-rate."""
    seeds: Annotated[tuple[checked.Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of prompts, sampling and shuffling; every variant and rate runs once with each."""
    processes: checked.Count = 1
    """How many runs go on at a time, each in a process of its own. On a CPU as many as it has
    cores; processes on one accelerator would have to share its memory."""
    directory: pathlib.Path = pathlib.Path("runs/sweep")
    """Where figures and runs go, each to <variant>/lr_<rate>/seed_<seed>, with other settings
    beside it."""
    start_directory: pathlib.Path = pathlib.Path("runs/warm_start")
    """Where the warm start is, or will be."""
    task: Annotated[TaskConfig, Unprefixed] = TaskConfig()
    model: Annotated[ModelConfig, Unprefixed] = ModelConfig()
    start: warm_start.WarmStartConfig = warm_start.WarmStartConfig()
    training: TrainingConfig = TrainingConfig()
    loggers: Annotated[LoggersConfig, Unprefixed] = LoggersConfig()

    def __post_init__(self):
        checked.check_distinct("variants", self.variants)
        checked.check_distinct("learning_rates", self.learning_rates)
        checked.check_distinct("seeds", self.seeds)
        self.cells()

    def cells(self) -> list[pool.Cell]:
        """The runs of the sweep, those of one seed after those of another."""
        grid = itertools.product(self.seeds, self.learning_rates, self.variants)
        return [self._cell(variant, rate, seed) for seed, rate, variant in grid]

    def _cell(self, variant: str, rate: float, seed: int) -> pool.Cell:
        method, changes = _parsed(variant)
        try:
            settings = dataclasses.replace(
                self.training.method, **changes | {"learning_rate": rate}
            )
        except pydantic.ValidationError as error:
            refused = error.errors()[0]
            allowed = refused["msg"].removeprefix("Input should ")
            raise ValueError(
                f"variants={variant} is not allowed: {refused['loc'][0]} must {allowed}"
            ) from None
        config = RunConfig(
            method,
            seed,
            self.task,
            self.model,
            self.start,
            dataclasses.replace(self.training, method=settings),
        )
        return pool.Cell(
            name=f"{variant}, lr {rate:g}, seed {seed}",
            directory=self.directory / variant / f"lr_{rate}" / f"seed_{seed}",
            config=config,
            to=self.loggers,
        )


def _parsed(variant: str) -> tuple[MethodName, dict[str, Any]]:
    """The method and the changed settings that METHOD,SETTING=VALUE,... stands for."""
    method, *changes = variant.split(",")
    if method not in _METHODS:
        raise ValueError(f"variants={variant} must begin with one of {', '.join(_METHODS)}")
    names = [field.name for field in dataclasses.fields(MethodConfig)]
    names.remove("learning_rate")
    settings = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in names:
            raise ValueError(
                f"variants={variant} must say SETTING=VALUE after each comma, with one of "
                f"{', '.join(names)}"
            )
        try:
            settings[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            raise ValueError(
                f"variants={variant} must have a number, True, False or None as {name}"
            ) from None
    return typing.cast(MethodName, method), settings


def main(command: Command) -> None:
    """Runs the command."""
    cells = command.cells()
    runs = [cell.directory for cell in cells]
    files.check_writable(command.start_directory, command.directory / "figures", *runs)
    with preemption.handled() as stopping:
        _sweep(command, cells, stopping)


def _sweep(command: Command, cells: list[pool.Cell], stopping: Callable[[], bool]) -> None:
    began = time.monotonic()
    report.settings(command, command.learning_rates)
    pool.prepare(command)
    report.say(
        f"Sweep: {len(cells)} runs, {len(command.variants)} variants x "
        f"{len(command.learning_rates)} learning rates x {len(command.seeds)} seeds, "
        f"{command.processes} at a time"
    )
    start = functools.partial(report.start, command, command.start_directory, stopping, None)
    saved: list[plot.Saved] = []
    seconds: list[float] = []
    for cell, outcome in pool.outcomes(command, [*cells], start, stopping):
        saved.append(plot.read(outcome.directory))
        how = "complete already"
        if outcome.seconds:
            seconds.append(outcome.seconds)
            left = fmean(seconds) * (len(cells) - len(saved)) / command.processes
            how = f"{outcome.seconds:.0f} s, {timedelta(seconds=round(left))} left"
        report.say(f"{len(saved)}/{len(cells)}  {cell.name}: {plot.told(saved[-1])}; {how}")
    report.terminal.print(plot.table(saved))
    drawn = plot.draw(saved, command.directory / "figures")
    report.say(
        f"Settings, environment, metrics, checkpoints: {command.directory}/<variant>/lr_<rate>/"
        f"seed_<seed>, unless said above\nFigures: {', '.join(map(str, drawn))}\n"
        f"Done in {(time.monotonic() - began) / 60:.1f} minutes."
    )


if __name__ == "__main__":
    command_line.run(Command, main, "python -m experiments.sweep")
