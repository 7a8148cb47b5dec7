"""`python -m experiments.train`: one method alone."""

import pathlib
from typing import Annotated

from pydantic.dataclasses import dataclass

from experiments import (
    checked,
    command_line,
    figures,
    files,
    meshes,
    preemption,
    records,
    report,
    starts,
    training,
    warm_start,
)
from experiments.command_line import Unprefixed
from experiments.configs import RunConfig, TrainingConfig
from experiments.loggers import LoggersConfig
from experiments.methods import MethodName
from experiments.models.settings import ModelConfig
from experiments.tasks.settings import TaskConfig


@dataclass(frozen=True, config=checked.CONFIG)
class Command:
    """Trains a policy by one method. Run again, it goes on where it was interrupted.

    `--preset NAME` stands for the flags of a preset, in experiments/presets.py: demo, addition,
    reversal, smollm2-arithmetic, gsm8k-qwen3-0.6b or mbpp-qwen3-0.6b. `--config FILE` stands for
    those of an earlier run's config.json. Flags beside them win.

    Results go to runs/train/<method>/seed_<seed> in the current folder, the warm start, where no
    pretrained model is named, to runs/warm_start.
    """

    method: MethodName
    """Which method to train with."""
    seed: checked.Seed = 0
    """Of prompts, sampling and shuffling."""
    match: pathlib.Path | None = None
    """grpo_matched: folder of a run, of as many steps or more, whose update norms it takes on."""
    directory: pathlib.Path = pathlib.Path("runs/train")
    """Where runs go, each to <method>/seed_<seed>, with other settings to seed_<seed>-2 and on."""
    start_directory: pathlib.Path = pathlib.Path("runs/warm_start")
    """Where the warm start is, or will be."""
    save_model: pathlib.Path | None = None
    """With a pretrained model: the folder that the trained one goes to, in the same format."""
    task: Annotated[TaskConfig, Unprefixed] = TaskConfig()
    model: Annotated[ModelConfig, Unprefixed] = ModelConfig()
    start: warm_start.WarmStartConfig = warm_start.WarmStartConfig()
    training: TrainingConfig = TrainingConfig()
    loggers: Annotated[LoggersConfig, Unprefixed] = LoggersConfig()
    devices: Annotated[meshes.DevicesConfig, Unprefixed] = meshes.DevicesConfig()

    def __post_init__(self):
        if (self.match is not None) != (self.method == "grpo_matched"):
            raise ValueError(
                f"match={self.match} with method={self.method}: grpo_matched needs the folder of "
                "the run to match, and no other method takes one"
            )
        if self.save_model is not None and self.model.model is None:
            raise ValueError(
                f"save_model={self.save_model} needs the folder of a pretrained model, "
                f"model={self.model.model}"
            )
        self.training.check_on(self.devices)
        self.devices.check_start(self.model.model)
        self.run_config()

    def run_config(self) -> RunConfig:
        """The settings of the run, with what it takes from the run to match."""
        norms: tuple[float, ...] = ()
        if self.match is not None:
            steps = self.training.steps
            rows = [row for row in records.read_metrics(self.match) if row["step"] <= steps]
            norms = training.update_norms(rows)
            if len(norms) < steps:
                raise ValueError(
                    f"match={self.match} must be the folder of a run of training.steps={steps} "
                    f"steps or more, but has the update norms of {len(norms)}"
                )
        return RunConfig(
            self.method, self.seed, self.task, self.model, self.start, self.training, norms
        )


def main(command: Command) -> None:
    """Runs the command."""
    config, mesh = command.run_config(), command.devices.made()
    directory = command.directory / command.method / f"seed_{command.seed}"
    files.check_writable(directory, command.start_directory)
    if command.save_model is not None:
        starts.check_free(command.save_model)
    report.settings(config, mesh=mesh)
    with preemption.handled() as stopping:
        policy, params = report.start(config, command.start_directory, stopping, mesh)
        directory, rows = report.train(config, policy, params, directory, stopping, command.loggers)
        report.terminal.print(report.summary({figures.LABELS[command.method]: [rows]}))
        if command.save_model is not None:
            trained = training.trained(config, policy, params, directory)
            starts.save(command.save_model, policy, trained, config.model)
            report.terminal.print(f"Trained model: {command.save_model}", highlight=False)
        report.terminal.print(
            f"Settings, environment, metrics and checkpoint: {directory}", highlight=False
        )


if __name__ == "__main__":
    command_line.run(Command, main, "python -m experiments.train")
