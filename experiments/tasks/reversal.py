"""Writing letters backwards, as text: prompts `abcd=`, responses `dcba`, exact-answer reward.

All lengths are equally frequent. Validation has held-out words of the lengths that training has,
and longer ones, which training never has; its reward is the mean over both.

Example:
    >>> task = Reversal(length=4, validation_length=6)
    >>> problem = Problem("abcd=")
    >>> task.answer(problem)
    'dcba'
    >>> task.grade([problem] * 3, ["dcba", "dcab", "abcd"])
    {'reward': [1.0, 0.0, 0.0], 'prefix': [1.0, 0.5, 0.0]}
"""

import functools
import itertools
import string
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments import checked
from experiments.tasks.task import Problem


@dataclass(frozen=True, config=checked.CONFIG)
class Reversal:
    """The task: which words there are, and how a response is graded."""

    length: checked.Count = 6
    """Letters of the longest training word."""
    validation_length: checked.Count = 8
    """Letters of the longest validation word; longer than `length` to see whether it carries on."""
    letters: Annotated[int, Field(ge=2, le=26)] = 26
    """Letters that words are made of, the first ones of the alphabet."""
    training_problems: checked.Count = 16384
    """Training words; short ones occur more than once."""
    validation_problems: checked.Count = 512
    """Validation words, none of which training has; short ones may occur more than once."""
    seed: checked.Seed = 0
    """Of the words."""

    def __post_init__(self):
        if self.validation_problems >= self.letters**self.length:
            raise ValueError(
                f"validation_problems={self.validation_problems} must be fewer than the "
                f"{self.letters**self.length} words with letters={self.letters} and "
                f"length={self.length}: the others are for training"
            )

    @property
    def characters(self) -> str:
        """All characters of prompts and answers."""
        return string.ascii_lowercase[: self.letters] + "="

    @property
    def longest_prompt(self) -> int:
        """Characters of the longest prompt."""
        return self.longest_response + 1

    @property
    def longest_response(self) -> int:
        """Characters of the longest answer."""
        return max(self.length, self.validation_length)

    @functools.cached_property
    def validation(self) -> list[Problem]:
        """Held-out words of all lengths up to `validation_length`."""
        rng = np.random.default_rng([self.seed, 0])
        words = self._draw(self.validation_problems, self.validation_length, rng)
        return [Problem(word + "=") for word in words]

    @functools.cached_property
    def training(self) -> list[Problem]:
        """Words of all lengths up to `length`."""
        rng = np.random.default_rng([self.seed, 1])
        held_out = set(self.validation)
        problems: list[Problem] = []
        while len(problems) < self.training_problems:
            drawn = [Problem(word + "=") for word in self._draw(1024, self.length, rng)]
            problems += [problem for problem in drawn if problem not in held_out]
        return problems[: self.training_problems]

    def _draw(self, count: int, longest: int, rng: np.random.Generator) -> list[str]:
        letters = rng.integers(self.letters, size=(count, longest))
        lengths = rng.integers(1, longest + 1, size=count)
        return [
            "".join(string.ascii_lowercase[letter] for letter in row[:length])
            for row, length in zip(letters, lengths, strict=True)
        ]

    def answer(self, problem: Problem, /) -> str:
        """The right response."""
        return str(problem.prompt).removesuffix("=")[::-1]

    def grade(
        self, problems: Sequence[Problem], responses: Sequence[str]
    ) -> dict[str, list[float]]:
        """Grades responses.

        Returns:
            "reward", 1 for exactly the answer, and "prefix", the part of the answer's letters that
            the response begins with.
        """
        answers = [self.answer(problem) for problem in problems]
        pairs = list(zip(answers, responses, strict=True))
        return {
            "reward": [float(answer == response) for answer, response in pairs],
            "prefix": [_common_letters(*pair) / len(pair[0]) for pair in pairs],
        }


def _common_letters(answer: str, response: str) -> int:
    """How many letters both begin with."""
    same = (a == b for a, b in zip(answer, response, strict=False))
    return sum(itertools.takewhile(bool, same))
