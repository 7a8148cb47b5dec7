"""`python -m experiments.train`: one method alone, from the warm start."""

import dataclasses
import pathlib

import tyro

from experiments import preemption, records, report, warm_start
from experiments.methods import MethodName
from experiments.training import RunConfig, TrainingConfig, update_norms


@dataclasses.dataclass(frozen=True)
class Command:
    """Trains one method from the warm start. Run again, it goes on where it was interrupted."""

    method: MethodName
    """Which method to train with."""
    seed: int = 0
    """Of prompts, sampling and shuffling."""
    match: pathlib.Path | None = None
    """grpo_matched: the directory of the finished run whose update norms it takes on."""
    directory: pathlib.Path = pathlib.Path("runs/train")
    """Where runs go, each to <method>/seed_<seed>."""
    start_directory: pathlib.Path = pathlib.Path("runs/warm_start")
    """Where the warm start is, or will be."""
    start: warm_start.WarmStartConfig = warm_start.WarmStartConfig()
    training: TrainingConfig = TrainingConfig()


def main(command: Command) -> None:
    """Runs the command."""
    records.check_writable(command.directory)
    norms = () if command.match is None else update_norms(command.match)
    config = RunConfig(command.method, command.seed, command.start, command.training, norms)
    directory = command.directory / command.method / f"seed_{command.seed}"
    report.settings(config.training, config.start)
    with preemption.handled() as stopping:
        graphdef, params = report.start(config.start, command.start_directory, stopping)
        rows = report.train(config, graphdef, params, directory, stopping)
        report.terminal.print(report.summary({command.method: [rows]}))
        report.terminal.print(f"Settings, environment, metrics and checkpoint: {directory}")


if __name__ == "__main__":
    main(tyro.cli(Command, prog="python -m experiments.train"))
