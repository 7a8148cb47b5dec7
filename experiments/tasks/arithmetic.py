"""Sums and products of two numbers for pretrained models: "What is 7 times 8?", the number only.

There are levels of difficulty. A question and its mirror image (7 times 8, 8 times 7; in digits or
in words) are both for training or both held out, so validation shows what was learned beyond them.

Example:
    >>> task = Arithmetic(products=1.0)
    >>> problem = Problem(question("times", 7, 8), 56)
    >>> task.grade([problem] * 4, [" 56.", "57", "7 times 8 is 56", "56 or 57"])["reward"]
    [1.0, 0.0, 0.5, 0.0]
"""

import functools
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments import checked
from experiments.tasks import answers
from experiments.tasks.task import Chat, Problem


class Bounds(NamedTuple):
    """The numbers of a level: those with a larger one than the level below allows."""

    factor: int
    term: int


LEVELS = {1: Bounds(5, 19), 2: Bounds(9, 59), 3: Bounds(12, 99), 4: Bounds(20, 999)}
"""The largest factor and the largest term of each level; the smallest are 2 and 1."""

Level = Annotated[int, Field(ge=min(LEVELS), le=max(LEVELS))]

_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve", *(f"{stem}teen" for stem in ("thir", "four", "fif", "six"))]
_TEENS += [f"{stem}teen" for stem in ("seven", "eigh", "nine")]
_TENS = [f"{stem}ty" for stem in ("twen", "thir", "for", "fif", "six", "seven", "eigh", "nine")]


def in_words(number: int) -> str:
    """A number below 1000 in words.

    Example:
        >>> [in_words(number) for number in (7, 40, 86, 305)]
        ['seven', 'forty', 'eighty-six', 'three hundred and five']
    """
    hundreds, rest = divmod(number, 100)
    if hundreds:
        words = f"{_ONES[hundreds]} hundred"
        return f"{words} and {in_words(rest)}" if rest else words
    if number < 20:
        return [*_ONES, *_TEENS][number]
    tens, ones = divmod(number, 10)
    return f"{_TENS[tens - 2]}-{_ONES[ones]}" if ones else _TENS[tens - 2]


def question(operation: str, left: int | str, right: int | str) -> Chat:
    """The prompt."""
    content = f"What is {left} {operation} {right}? Answer with the number only."
    return [{"role": "user", "content": content}]


@dataclass(frozen=True, config=checked.CONFIG)
class Arithmetic:
    """The task: which questions there are, and how a response is graded."""

    easiest: Level = 1
    """The easiest level; all from here to `hardest` are equally frequent."""
    hardest: Level = 3
    """The hardest level: 1 has products to 5 × 5 and terms below 20, 2 to 9 × 9 and below 60,
    3 to 12 × 12 and below 100, 4 to 20 × 20 and below 1000."""
    products: checked.Fraction = 0.5
    """How many of the questions are products; the others are sums."""
    words: checked.Fraction = 0.0
    """How many of the questions have their numbers in words."""
    in_text: checked.Fraction = 0.5
    """The reward of a response that has other words too and whose last number is right."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How many of the pairs of numbers at each level are for validation alone."""
    training_problems: checked.Count = 8192
    """Training problems; at easy levels they occur more than once."""
    validation_problems: checked.Count = 256
    """Validation problems; at easy levels they occur more than once."""
    seed: checked.Seed = 0
    """Of the pairs held out and of the problems."""

    def __post_init__(self):
        if self.easiest > self.hardest:
            raise ValueError(f"easiest={self.easiest} must be at most hardest={self.hardest}")

    @functools.cached_property
    def training(self) -> list[Problem]:
        """Problems with pairs of numbers that are not held out."""
        return self._draw(self.training_problems, is_held_out=False)

    @functools.cached_property
    def validation(self) -> list[Problem]:
        """Problems with held-out pairs of numbers."""
        return self._draw(self.validation_problems, is_held_out=True)

    def _draw(self, count: int, is_held_out: bool) -> list[Problem]:
        rng = np.random.default_rng([self.seed, is_held_out])
        pools: dict[tuple[bool, int], np.ndarray] = {}
        problems = []
        for _ in range(count):
            kind = (
                bool(rng.random() < self.products),
                int(rng.integers(self.easiest, self.hardest + 1)),
            )
            if kind not in pools:
                pools[kind] = self._pairs(*kind, is_held_out)
            left, right = rng.permutation(rng.choice(pools[kind])).tolist()
            shown = map(in_words if rng.random() < self.words else str, (left, right))
            problems.append(
                Problem(question("times", *shown), left * right)
                if kind[0]
                else Problem(question("plus", *shown), left + right)
            )
        return problems

    def _pairs(self, is_product: bool, level: int, is_held_out: bool) -> np.ndarray:
        """The pairs (n, 2) of one kind, the larger number first, that are held out or not."""
        below = LEVELS.get(level - 1, Bounds(1, 0))
        most, easier, least = (
            (LEVELS[level].factor, below.factor, 2)
            if is_product
            else (LEVELS[level].term, below.term, 1)
        )
        pairs = np.stack(np.tril_indices(most + 1), axis=1)
        pairs = pairs[(pairs[:, 0] > easier) & (pairs[:, 1] >= least)]
        pairs = np.random.default_rng([self.seed, is_product, level]).permutation(pairs)
        cut = min(max(round(self.held_out * len(pairs)), 1), len(pairs) - 1)
        return pairs[:cut] if is_held_out else pairs[cut:]

    def grade(
        self, problems: Sequence[Problem], responses: Sequence[str]
    ) -> dict[str, list[float]]:
        """Grades responses.

        Returns:
            "reward", 1 if the response is the right number and nothing else, where spaces around
            it, thousands separators and a final period do not matter, and `in_text` if it has other
            words but its last number is right; "right", 1 in both cases; and "format", 1 if it is
            any number and nothing else.
        """
        alone = [answers.only_number(response) is not None for response in responses]
        right = [
            answers.number(response) == problem.answer
            for problem, response in zip(problems, responses, strict=True)
        ]
        full = [1.0 if is_alone else self.in_text for is_alone in alone]
        return {
            "reward": [reward * is_right for reward, is_right in zip(full, right, strict=True)],
            "right": [float(is_right) for is_right in right],
            "format": [float(is_alone) for is_alone in alone],
        }
