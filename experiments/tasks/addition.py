"""Integer addition as text: prompts `37+58=`, responses `95` and an end token, exact-answer reward.

Prompts are padded on the left to one width and responses, which vary in length, on the right,
as for a language model. Every pair of operands is a problem; a fixed shuffle sets some aside for
validation, so that training never sees them.

Example:
    >>> task = Addition(digits=2)
    >>> tokens, valid = task.encode_prompts(["37+58=", "4+5="])
    >>> tokens.shape, valid.sum(axis=1).tolist()
    ((2, 6), [6, 4])
    >>> task.reward(["37+58=", "37+58="], task.encode_responses(["95", "96"]))
    array([1., 0.], dtype=float32)
"""

import functools
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments import checked
from experiments.tasks.task import LazyProblems, Problem

PAD, END = 0, 1
CHARACTERS = "0123456789+="
VOCAB_SIZE = 2 + len(CHARACTERS)

_TOKEN_OF = {character: 2 + i for i, character in enumerate(CHARACTERS)}


@dataclass(frozen=True, config=checked.CONFIG)
class Addition:
    """The task: which problems there are, and how they read as tokens."""

    digits: Annotated[int, Field(ge=1, le=4)] = 2
    """Most digits of an operand, drawn from 0 to 10^digits - 1; at 4, all problems take 0.8 GB."""
    validation_problems: checked.Count = 512
    """Problems held out for validation."""
    seed: checked.Seed = 0
    """Seed of the split into training and validation problems."""

    def __post_init__(self):
        if self.training_problems < 1:
            raise ValueError(
                f"validation_problems={self.validation_problems} must be fewer than the "
                f"{self._problem_count} problems with digits={self.digits}: the others are for "
                "training"
            )

    @property
    def _problem_count(self) -> int:
        return 10 ** (2 * self.digits)

    @property
    def training_problems(self) -> int:
        """Problems that are not held out."""
        return self._problem_count - self.validation_problems

    @property
    def prompt_width(self) -> int:
        """Tokens of the longest prompt."""
        return 2 * self.digits + 2

    @property
    def response_width(self) -> int:
        """Tokens of the longest answer, its end token included."""
        return self.digits + 2

    @functools.cached_property
    def _problems(self) -> np.ndarray:
        return np.random.default_rng(self.seed).permutation(self._problem_count)

    def _prompts(self, problems: np.ndarray) -> list[str]:
        left, right = np.divmod(problems, 10**self.digits)
        return [f"{a}+{b}=" for a, b in zip(left, right, strict=True)]

    def validation_prompts(self) -> list[str]:
        """The held-out prompts."""
        return self._prompts(self._problems[: self.validation_problems])

    def training_prompts(self, count: int, rng: np.random.Generator) -> list[str]:
        """`count` training prompts, drawn without replacement."""
        problems = self._problems[self.validation_problems :]
        if count > len(problems):
            raise ValueError(f"{count=} prompts, but digits={self.digits} has only {len(problems)}")
        return self._prompts(rng.choice(problems, count, replace=False))

    @property
    def characters(self) -> str:
        """All characters of prompts and answers."""
        return CHARACTERS

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
        return LazyProblems(len(problems), lambda i: Problem(*self._prompts(problems[i : i + 1])))

    def grade(
        self, problems: Sequence[Problem], responses: Sequence[str]
    ) -> dict[str, list[float]]:
        """Rewards exactly the sum, in digits and nothing else."""
        pairs = zip(problems, responses, strict=True)
        return {"reward": [float(response == self.answer(problem)) for problem, response in pairs]}

    def answer(self, problem: Problem | str, /) -> str:
        """The right response to a problem or its prompt."""
        prompt = problem if isinstance(problem, str) else str(problem.prompt)
        left, right = prompt.removesuffix("=").split("+")
        return str(int(left) + int(right))

    def encode_prompts(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n, prompt_width), padded on the left, and which of them are no padding."""
        tokens = np.full((len(prompts), self.prompt_width), PAD, np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[len(row) - len(prompt) :] = [_TOKEN_OF[character] for character in prompt]
        return tokens, tokens != PAD

    def encode_responses(self, responses: list[str]) -> np.ndarray:
        """Tokens (n, response_width): the response, an end token, padding on the right."""
        tokens = np.full((len(responses), self.response_width), PAD, np.int32)
        for row, response in zip(tokens, responses, strict=True):
            row[: len(response) + 1] = [_TOKEN_OF[character] for character in response] + [END]
        return tokens

    def reward(self, prompts: list[str], responses: np.ndarray) -> np.ndarray:
        """1 for each response (n, response_width) that is the answer, ended and padded, else 0."""
        answers = self.encode_responses([self.answer(prompt) for prompt in prompts])
        return np.all(responses == answers, axis=1).astype(np.float32)
