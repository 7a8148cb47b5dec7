"""A task from a file of problems and a function of the user's that grades the responses.

The file holds objects with a "prompt", a text or a list of messages, and whatever else the
function needs (`problem_files` says which formats it may have). The function gets these objects,
whole, and the responses:

    def reward(problems: list[dict], responses: list[str]) -> list[float]:
        return [float(p["answer"] in text) for p, text in zip(problems, responses, strict=True)]

It may also return a dict of lists, "reward" among them; the others are logged.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic.dataclasses import dataclass

from experiments import checked, files
from experiments.tasks import importing, problem_files
from experiments.tasks.task import Problem, is_chat


@dataclass(frozen=True, config=checked.CONFIG)
class Data:
    """The task."""

    data: problem_files.File
    """The problems."""
    reward: str
    """The function, as `my_module:reward`."""
    validation_data: problem_files.File | None = None
    """The validation problems; without it, some of `data` are held out."""
    validation_problems: checked.Count = 256
    """Problems held out of `data`; with `validation_data`, at most so many of it."""
    seed: checked.Seed = 0
    """Chooses the validation problems."""

    def __post_init__(self):
        if not callable(self._reward):
            raise files.Failure(f"reward {self.reward!r} must be a function, not {self._reward!r}")

    @functools.cached_property
    def _reward(self) -> Callable[[list[dict], list[str]], Any]:
        return importing.load(self.reward, "reward")

    @functools.cached_property
    def _split(self) -> tuple[list[Problem], list[Problem]]:
        return problem_files.train_and_validation(
            _read, self.data, self.validation_data, self.validation_problems, self.seed
        )

    @property
    def training(self) -> list[Problem]:
        """The problems of `data` that are not held out."""
        return self._split[0]

    @property
    def validation(self) -> list[Problem]:
        """The problems of `validation_data`, or those held out."""
        return self._split[1]

    def grade(
        self, problems: Sequence[Problem], responses: Sequence[str]
    ) -> Mapping[str, Sequence[float]]:
        """What the user's function says."""
        grades = self._reward([problem.answer for problem in problems], list(responses))
        return grades if isinstance(grades, Mapping) else {"reward": grades}


def _read(path: pathlib.Path) -> list[Problem]:
    records = problem_files.read(path, prompt=(str, list))
    for i, record in enumerate(records, 1):
        if not isinstance(record["prompt"], str) and not is_chat(record["prompt"]):
            raise files.Failure(
                f"{path}, problem {i}: each message of 'prompt' must be an object with 'role' and "
                f"'content', both texts, but they are {record['prompt']!r:.200}"
            )
    return [Problem(record["prompt"], record) for record in records]
