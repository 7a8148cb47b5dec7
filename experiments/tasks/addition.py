"""Integer addition as text: prompts `37+58=`, responses `95`, exact-answer reward.

Every pair of operands is a problem; a fixed shuffle sets some aside for validation, so that
training never sees them.

Example:
    >>> task = Addition(digits=2)
    >>> problem = task.training[0]
    >>> problem.prompt, task.answer(problem)
    ('41+81=', '122')
    >>> task.grade([problem, problem], ["122", "0"])
    {'reward': [1.0, 0.0]}
"""

import functools
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments import checked
from experiments.tasks.task import LazyProblems, Problem


@dataclass(frozen=True, config=checked.CONFIG)
class Addition:
    """The task: which problems there are."""

    digits: Annotated[int, Field(ge=1, le=4)] = 2
    """Most digits of an operand, drawn from 0 to 10^digits - 1; at 4, all problems take 0.8 GB."""
    validation_problems: checked.Count = 512
    """Problems held out for validation."""
    seed: checked.Seed = 0
    """Seed of the split into training and validation problems."""

    def __post_init__(self):
        if self.validation_problems >= self._problem_count:
            raise ValueError(
                f"validation_problems={self.validation_problems} must be fewer than the "
                f"{self._problem_count} problems with digits={self.digits}: the others are for "
                "training"
            )

    @property
    def _problem_count(self) -> int:
        return 10 ** (2 * self.digits)

    @functools.cached_property
    def _problems(self) -> np.ndarray:
        return np.random.default_rng(self.seed).permutation(self._problem_count)

    @property
    def characters(self) -> str:
        """All characters of prompts and answers."""
        return "0123456789+="

    @property
    def longest_prompt(self) -> int:
        """Characters of the longest prompt."""
        return 2 * self.digits + 2

    @property
    def longest_response(self) -> int:
        """Characters of the longest answer."""
        return self.digits + 1

    @property
    def training(self) -> LazyProblems:
        """All problems that are not held out, in the order of the shuffle."""
        return self._lazily(self._problems[self.validation_problems :])

    @property
    def validation(self) -> LazyProblems:
        """The held-out problems."""
        return self._lazily(self._problems[: self.validation_problems])

    def _lazily(self, problems: np.ndarray) -> LazyProblems:
        def make(place: int) -> Problem:
            left, right = divmod(int(problems[place]), 10**self.digits)
            return Problem(f"{left}+{right}=")

        return LazyProblems(len(problems), make)

    def grade(
        self, problems: Sequence[Problem], responses: Sequence[str]
    ) -> dict[str, list[float]]:
        """Rewards exactly the sum, in digits and nothing else."""
        pairs = zip(problems, responses, strict=True)
        return {"reward": [float(response == self.answer(problem)) for problem, response in pairs]}

    def answer(self, problem: Problem, /) -> str:
        """The sum."""
        left, right = str(problem.prompt).removesuffix("=").split("+")
        return str(int(left) + int(right))
