"""`python -m experiments.compare`: all methods from one start, then the table and the figures."""

import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Annotated

from flax import nnx
from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments import (
    checked,
    command_line,
    figures,
    files,
    meshes,
    pool,
    preemption,
    processes,
    records,
    report,
    sampling,
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
    processes: checked.Count = 1
    """How many runs go on at a time, if more than one each in a process of its own. On a CPU as
    many as it has cores; processes on one accelerator would have to share its memory."""
    directory: pathlib.Path = pathlib.Path("runs/compare")
    """Where figures and runs go, each to <method>/seed_<seed>, with other settings beside it."""
    start_directory: pathlib.Path = pathlib.Path("runs/warm_start")
    """Where the warm start is, or will be."""
    task: Annotated[TaskConfig, Unprefixed] = TaskConfig()
    model: Annotated[ModelConfig, Unprefixed] = ModelConfig()
    start: warm_start.WarmStartConfig = warm_start.WarmStartConfig()
    training: TrainingConfig = TrainingConfig()
    loggers: Annotated[LoggersConfig, Unprefixed] = LoggersConfig()
    devices: Annotated[meshes.DevicesConfig, Unprefixed] = meshes.DevicesConfig()

    def __post_init__(self):
        checked.check_distinct("methods", self.methods)
        checked.check_distinct("seeds", self.seeds)
        if self.processes > 1 and self.devices.mesh is not None:
            raise ValueError(
                f"processes={self.processes} must be 1 with mesh={self.devices.mesh}, whose devices"
                " work on one run after the other"
            )
        self.training.check_on(self.devices)
        self.devices.check_start(self.model.model)
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


def _cell(
    command: Command, method: MethodName, seed: int, norms: tuple[float, ...] = ()
) -> pool.Cell:
    config = RunConfig(
        method, seed, command.task, command.model, command.start, command.training, norms
    )
    directory = _directory(command, method, seed)
    return pool.Cell(f"{method}, seed {seed}", directory, config, command.loggers)


def _compare(command: Command, stopping: Callable[[], bool]) -> None:
    began = time.monotonic()
    mesh = command.devices.made()
    report.settings(command, mesh=mesh)
    if command.processes > 1:
        pool.prepare(command)
    start = functools.partial(report.start, command, command.start_directory, stopping, mesh)

    def order(cell):
        """The longest go first, so that no process is idle long at the end; then by seed.

        Runs of different methods then begin together, which do not compile the same programs.
        """
        return not cell.config.method.startswith("proma"), command.seeds.index(cell.config.seed)

    cells = [
        _cell(command, method, seed)
        for method in command.methods
        for seed in command.seeds
        if method != "grpo_matched"
    ]
    cells.sort(key=order)
    if command.processes == 1:
        work = _one_by_one(cells, start(), stopping)
    else:
        work = _side_by_side(command, cells, start, stopping)
    found = {}
    for cell, rows in work:
        method, seed = cell.config.method, cell.config.seed
        found[method, seed] = rows
        if method == "proma_accumulation" and "grpo_matched" in command.methods:
            cells.append(_cell(command, "grpo_matched", seed, update_norms(rows)))
            cells.sort(key=order)
    results: figures.Results = {
        method: [found[method, seed] for seed in command.seeds] for method in command.methods
    }
    named = {figures.LABELS[method]: runs for method, runs in results.items()}
    report.terminal.print(report.summary(named, command.processes))
    title = f"{command.task.name}, {command.training.microbatches} microbatches per optimizer step"
    folder = command.directory / "figures"
    each = map if command.processes == 1 else functools.partial(pool.each, command)
    drawn = processes.by_first(lambda: figures.draw(results, title, folder, each))
    report.terminal.print(
        f"Settings, environment, metrics, checkpoints: {command.directory}/<method>/seed_<seed>, "
        "unless said above\n"
        f"Figures: {', '.join(map(str, drawn))}\n"
        f"Done in {(time.monotonic() - began) / 60:.1f} minutes.",
        highlight=False,
    )


def _one_by_one(
    cells: list[pool.Cell],
    start: tuple[sampling.Policy, nnx.State],
    stopping: Callable[[], bool],
) -> Iterator[tuple[pool.Cell, list[records.Row]]]:
    """Each run and its metrics, worked on by this process; `cells` may grow meanwhile."""
    while cells:
        cell = cells.pop(0)
        _, rows = report.train(cell.config, *start, cell.directory, stopping, cell.to)
        yield cell, rows


def _side_by_side(
    command: Command,
    cells: list[pool.Cell],
    start: Callable[[Callable[[], None]], object],
    stopping: Callable[[], bool],
) -> Iterator[tuple[pool.Cell, list[records.Row]]]:
    """The same, worked on by several processes, which read the start themselves."""
    count = len(command.methods) * len(command.seeds)
    report.say(f"{count} runs, {command.processes} at a time, each in a process of its own")
    for number, (cell, outcome) in enumerate(pool.outcomes(command, cells, start, stopping), 1):
        if outcome.not_finite is not None:
            raise outcome.not_finite
        how = f"{outcome.seconds:.0f} s" if outcome.seconds else "complete already"
        report.say(f"{number}/{count}  {cell.name}: {how}, in {outcome.directory}")
        yield cell, records.read_metrics(outcome.directory)


if __name__ == "__main__":
    command_line.run(Command, main, "python -m experiments.compare")
