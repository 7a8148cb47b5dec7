"""`python -m experiments.evaluate`: how a model does on a task's validation problems."""

import functools
import json
import pathlib
from typing import Annotated

import numpy as np
from pydantic.dataclasses import dataclass
from rich import console, progress

from experiments import (
    checked,
    command_line,
    environment,
    files,
    meshes,
    processes,
    starts,
    validation,
)
from experiments.models.settings import DType, ModelConfig
from experiments.tasks.settings import TaskConfig
from experiments.tasks.task import Problem


@dataclass(frozen=True, config=checked.CONFIG)
class Command:
    """Grades a pretrained model's greedy responses to a task's validation problems.

    Results go to runs/evaluate/<task> in the current folder, or, if that is there, to <task>-2 and
    so on: settings and environment, each problem's response and grades, and the mean grades.
    """

    model: pathlib.Path
    """A Hugging Face folder of a Llama, Qwen2 or Qwen3 model."""
    task: Annotated[TaskConfig, command_line.Unprefixed] = TaskConfig()
    problems: checked.Count | None = None
    """How many of the validation problems, the first ones; None: all."""
    prompt_tokens: checked.Count = 512
    """Most tokens of a prompt; a longer one is an error."""
    response_tokens: checked.Count = 256
    """Most tokens of a response, which is cut off there."""
    at_a_time: checked.Count = 64
    """Problems that are answered together; fewer take less memory."""
    dtype: DType = "float32"
    """Of parameters and computation."""
    devices: Annotated[meshes.DevicesConfig, command_line.Unprefixed] = meshes.DevicesConfig()
    directory: pathlib.Path = pathlib.Path("runs/evaluate")
    """Where results go."""

    def __post_init__(self):
        validation.check_count("problems", self.problems, self.task.name, self.task.made)


def main(command: Command) -> None:
    """Runs the command."""
    mesh = command.devices.made()
    terminal = console.Console()
    name = command.task.name.replace("/", "_").replace(":", "_")
    directory = processes.by_first(lambda: files.free(command.directory / name))
    files.check_writable(directory)
    task = command.task.made
    problems = validation.problems(task, command.problems)
    policy, params = starts.pretrained(
        ModelConfig(
            command.model,
            prompt_tokens=command.prompt_tokens,
            response_tokens=command.response_tokens,
            dtype=command.dtype,
        ),
        mesh,
    )
    processes.by_first(lambda: _begin(directory, command))
    grades: dict[str, list[float]] = {}
    firsts = range(0, len(problems), command.at_a_time)
    for first in progress.track(firsts, "answering", console=terminal):
        part = problems[first : first + command.at_a_time]
        found = validation.respond(policy, params, task, part, command.at_a_time)
        processes.by_first(functools.partial(_write, directory, part, found))
        for grade, values in found.grades.items():
            grades.setdefault(grade, []).extend(values.tolist())
    means = {grade: float(np.mean(values)) for grade, values in grades.items()}
    processes.by_first(lambda: _end(directory, means))
    terminal.print(
        *(f"{grade:12} {mean:.3f} of {len(problems)}" for grade, mean in means.items()),
        f"Responses, grades, settings, environment: {directory}",
        sep="\n",
        highlight=False,
    )


def _begin(directory: pathlib.Path, command: Command) -> None:
    with files.using(directory):
        directory.mkdir(parents=True)
        environment.describe(directory, command)


def _write(directory: pathlib.Path, problems: list[Problem], found: validation.Graded) -> None:
    with files.using(directory), (directory / "responses.jsonl").open("a") as file:
        for i, (problem, response) in enumerate(zip(problems, found.responses, strict=True)):
            graded = {grade: float(values[i]) for grade, values in found.grades.items()}
            line = {"prompt": problem.prompt, "response": response, **graded}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _end(directory: pathlib.Path, means: dict[str, float]) -> None:
    with files.using(directory):
        files.replace(directory / "means.json", json.dumps(means, indent=2) + "\n")


if __name__ == "__main__":
    command_line.run(Command, main, "python -m experiments.evaluate")
