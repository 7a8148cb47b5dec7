"""`python -m experiments.compare`: all methods from one start, then the table and the figures."""

import dataclasses
import pathlib
import time
from collections.abc import Callable

import tyro

from experiments import figures, preemption, records, report, warm_start
from experiments.methods import MethodName
from experiments.training import RunConfig, TrainingConfig, update_norms


@dataclasses.dataclass(frozen=True)
class Command:
    """Trains all methods from one warm start, with the same prompts and seeds, and compares them.

    Run again, it goes on where it was interrupted, and takes finished runs as they are.
    """

    methods: tuple[MethodName, ...] = (
        "reinforce",
        "grpo",
        "proma_accumulation",
        "grpo_matched",
        "proma_intra",
    )
    """Which methods. grpo_matched is GRPO with every update rescaled to the norm of the
    proma_accumulation run's, which must come before it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of prompts, sampling and shuffling; every method runs once with each."""
    directory: pathlib.Path = pathlib.Path("runs/compare")
    """Where runs go, each to <method>/seed_<seed>, and the figures."""
    start_directory: pathlib.Path = pathlib.Path("runs/warm_start")
    """Where the warm start is, or will be."""
    start: warm_start.WarmStartConfig = warm_start.WarmStartConfig()
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self):
        if not self.methods or not self.seeds:
            raise ValueError(f"{self.methods=} and {self.seeds=} must not be empty")
        order = {method: place for place, method in enumerate(self.methods)}
        last = len(order)
        if order.get("proma_accumulation", last) > order.get("grpo_matched", last):
            raise ValueError(f"{self.methods=}: grpo_matched needs proma_accumulation before it")


def main(command: Command) -> None:
    """Runs the command."""
    records.check_writable(command.directory)
    with preemption.handled() as stopping:
        _compare(command, stopping)


def _compare(command: Command, stopping: Callable[[], bool]) -> None:
    began = time.monotonic()
    report.settings(command.training, command.start)
    graphdef, params = report.start(command.start, command.start_directory, stopping)
    results: figures.Results = {method: [] for method in command.methods}
    for seed in command.seeds:
        directory_of = {name: command.directory / name / f"seed_{seed}" for name in command.methods}
        for method, directory in directory_of.items():
            norms: tuple[float, ...] = ()
            if method == "grpo_matched":
                norms = update_norms(directory_of["proma_accumulation"])
            config = RunConfig(method, seed, command.start, command.training, norms)
            rows = report.train(config, graphdef, params, directory, stopping)
            results[method].append(rows)
    report.terminal.print(report.summary(results))
    files = figures.draw(results, command.directory / "figures")
    report.terminal.print(
        f"Settings, environment, metrics, checkpoints: {command.directory}/<method>/seed_<seed>\n"
        f"Figures: {', '.join(map(str, files))}\n"
        f"Done in {(time.monotonic() - began) / 60:.1f} minutes.",
        highlight=False,
    )


if __name__ == "__main__":
    main(tyro.cli(Command, prog="python -m experiments.compare"))
