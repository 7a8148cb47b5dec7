"""Which task a run is about, as its settings name it."""

import functools
import json
from typing import Any

from pydantic.dataclasses import dataclass

from experiments import checked
from experiments.tasks.registry import make_task
from experiments.tasks.task import Task


@dataclass(frozen=True, config=checked.CONFIG)
class TaskConfig:
    """The task."""

    task: str = "addition"
    """A built-in task, `reasoning_gym:NAME`, or your own as `module:name`, a class or a function
    that is called with the options."""
    task_options: tuple[str, ...] = ()
    """Settings of the task, each as NAME=VALUE."""
    data: str | None = None
    """Instead of a task: a file with a JSON object in each line, which has a "prompt"."""
    reward: str | None = None
    """For data: the function `module:name` that rewards responses."""
    allow_code_execution: bool = False
    """Lets tasks run programs that the policy writes, in a sandbox."""

    def __post_init__(self):
        if (self.data is None) != (self.reward is None):
            raise ValueError(f"data={self.data} and reward={self.reward} must be given together")
        if self.data is not None and self.task != "addition":
            raise ValueError(f"task={self.task} and data={self.data} must not both be given")
        for option in self.task_options:
            if "=" not in option:
                raise ValueError(f"task_options={option} must be NAME=VALUE")

    @property
    def name(self) -> str:
        """What the task is called."""
        return self.task if self.data is None else self.data

    @functools.cached_property
    def made(self) -> Task:
        """The task.

        Raises:
            ValueError: there is none of this name, or its options are not right.
            files.Failure: what it needs is not there.
        """
        options = dict(map(_option, self.task_options))
        if self.allow_code_execution:
            options["allow_code_execution"] = True
        if self.data is None:
            return make_task(self.task, options)
        return make_task("data", options | {"data": self.data, "reward": self.reward})


def _option(option: str) -> tuple[str, Any]:
    """Name and value, which is JSON where it can be read as that and else a text."""
    name, _, value = option.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
