"""`python -m experiments.compare`: all methods from one start, then the table and the figures."""

import pathlib
import time
from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments import (
    checked,
    command_line,
    figures,
    files,
    meshes,
    preemption,
    report,
    warm_start,
)
from experiments.command_line import Unprefixed
from experiments.configs import RunConfig, TrainingConfig
from experiments.loggers import LoggersConfig
from experiments.methods import MethodName
from experiments.models.settings import ModelConfig
from experiments.tasks.settings import TaskConfig
from experiments.training import update_norms


@dataclass(frozen=True, config=checked.CONFIG)
class Command:
    """Trains all methods from one start, with the same prompts and seeds, and compares them.

    `--preset NAME` stands for the flags of a preset, in experiments/presets.py: demo, addition,
    reversal, smollm2-arithmetic, gsm8k-qwen3-0.6b or mbpp-qwen3-0.6b. Flags beside it win.

    Run again, it goes on where it was interrupted, and takes finished runs as they are.

    Results go to runs/compare/<method>/seed_<seed> in the current folder, the figures of the latest
    comparison to runs/compare/figures, and the warm start, where no pretrained model is named, to
    runs/warm_start.
    """

    methods: Annotated[tuple[MethodName, ...], Field(min_length=1)] = (
        "reinforce",
        "grpo",
        "proma_accumulation",
        "grpo_matched",
        "proma_intra",
    )
    """Which methods. grpo_matched is GRPO with every update rescaled to the norm of the
    proma_accumulation run's, which must come before it."""
    seeds: Annotated[tuple[checked.Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of prompts, sampling and shuffling; every method runs once with each."""
    directory: pathlib.Path = pathlib.Path("runs/compare")
    """Where figures and runs go, each to <method>/seed_<seed>, with other settings beside it."""
    start_directory: pathlib.Path = pathlib.Path("runs/warm_start")
    """Where the warm start is, or will be."""
    task: Annotated[TaskConfig, Unprefixed] = TaskConfig()
    model: Annotated[ModelConfig, Unprefixed] = ModelConfig()
    start: warm_start.WarmStartConfig = warm_start.WarmStartConfig()
    training: TrainingConfig = TrainingConfig()
    loggers: Annotated[LoggersConfig, Unprefixed] = LoggersConfig()
    devices: Annotated[meshes.MeshConfig, Unprefixed] = meshes.MeshConfig()

    def __post_init__(self):
        checked.check_distinct("methods", self.methods)
        checked.check_distinct("seeds", self.seeds)
        self.training.check_on(self.devices)
        self.training.check_with(self.methods, self.task, self.model, self.start)
        order = {method: place for place, method in enumerate(self.methods)}
        last = len(order)
        if order.get("proma_accumulation", last) > order.get("grpo_matched", last):
            raise ValueError(
                f"methods={self.methods} must name proma_accumulation before grpo_matched, which "
                "takes on its update norms"
            )


def main(command: Command) -> None:
    """Runs the command."""
    runs = [_directory(command, name, seed) for name in command.methods for seed in command.seeds]
    files.check_writable(command.start_directory, command.directory / "figures", *runs)
    with preemption.handled() as stopping:
        _compare(command, stopping)


def _directory(command: Command, method: MethodName, seed: int) -> pathlib.Path:
    return command.directory / method / f"seed_{seed}"


def _compare(command: Command, stopping: Callable[[], bool]) -> None:
    began = time.monotonic()
    mesh = command.devices.made()
    report.settings(command, mesh=mesh)
    policy, params = report.start(command, command.start_directory, stopping, mesh)
    results: figures.Results = {method: [] for method in command.methods}
    for seed in command.seeds:
        for method in command.methods:
            norms: tuple[float, ...] = ()
            if method == "grpo_matched":
                norms = update_norms(results["proma_accumulation"][-1])
            config = RunConfig(
                method, seed, command.task, command.model, command.start, command.training, norms
            )
            directory = _directory(command, method, seed)
            _, rows = report.train(config, policy, params, directory, stopping, command.loggers)
            results[method].append(rows)
    named = {figures.LABELS[method]: runs for method, runs in results.items()}
    report.terminal.print(report.summary(named))
    title = f"{command.task.name}, {command.training.microbatches} microbatches per optimizer step"
    drawn = figures.draw(results, title, command.directory / "figures")
    report.terminal.print(
        f"Settings, environment, metrics, checkpoints: {command.directory}/<method>/seed_<seed>, "
        "unless said above\n"
        f"Figures: {', '.join(map(str, drawn))}\n"
        f"Done in {(time.monotonic() - began) / 60:.1f} minutes.",
        highlight=False,
    )


if __name__ == "__main__":
    command_line.run(Command, main, "python -m experiments.compare")
