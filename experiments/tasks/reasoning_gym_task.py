"""Every dataset of the library reasoning-gym as a task, scored by the library's own functions.

The problems are one dataset of that library, of which the first are for validation. It makes them
when they are asked for. A training problem that asks the same as a validation problem, as happens
where there are few, is replaced by the next one that does not.
"""

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from pydantic.dataclasses import dataclass

from experiments import checked, files
from experiments.tasks.task import LazyProblems, Problem

INSTRUCTION = "Give your final answer between <answer> and </answer>, and nothing else there."


@dataclass(frozen=True, config=checked.CONFIG)
class ReasoningGym:
    """The task."""

    name: str
    """The dataset's name in the library."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the dataset, by the library's names; those not given are the library's."""
    training_problems: checked.Count = 4096
    """Problems to train on."""
    validation_problems: checked.Count = 128
    """Problems held out."""
    instruction: str = INSTRUCTION
    """What is said after the question."""
    seed: checked.Seed = 0
    """Of the problems."""

    def __post_init__(self):
        self._dataset  # noqa: B018  (what the library refuses is refused now)

    @functools.cached_property
    def _dataset(self) -> Any:
        datasets = library().factory.DATASETS
        if self.name not in datasets:
            raise files.Failure(
                f"reasoning_gym:{self.name}: the library has no such dataset, but: "
                f"{', '.join(sorted(datasets))}"
            )
        known = {field.name for field in dataclasses.fields(datasets[self.name][1])}
        known -= {"seed", "size"}
        for option in self.config:
            if option not in known:
                raise files.Failure(
                    f"{option} is no option of task reasoning_gym:{self.name}; it takes: "
                    f"training_problems, validation_problems, instruction, seed, "
                    f"{', '.join(sorted(known))}"
                )
        size = self.validation_problems + self.training_problems
        config = dict(self.config)
        try:
            if self.name == "composite":  # whose setting is a list of objects
                spec = library().composite.DatasetSpec
                config["datasets"] = [spec(**dataset) for dataset in config.get("datasets", ())]
            return library().create_dataset(self.name, seed=self.seed, size=size, **config)
        except Exception as error:  # the library has no type of its own for what it refuses
            raise files.Failure(
                f"reasoning_gym:{self.name} does not take the options {self.config} for {size} "
                f"problems: {error or type(error).__name__}"
            ) from error

    def _problem(self, place: int) -> Problem:
        entry = self._dataset[place]
        content = f"{entry['question']}\n\n{self.instruction}"
        return Problem([{"role": "user", "content": content}], entry)

    @functools.cached_property
    def validation(self) -> list[Problem]:
        """The first problems of the dataset."""
        return [self._problem(place) for place in range(self.validation_problems)]

    @property
    def training(self) -> LazyProblems:
        """The other problems of the dataset."""
        return LazyProblems(self.training_problems, self._training_problem)

    def _training_problem(self, place: int) -> Problem:
        for candidate in (*range(place, self.training_problems), *range(place)):
            problem = self._problem(self.validation_problems + candidate)
            if problem.answer["question"] not in self._held_out:
                return problem
        raise files.Failure(
            f"reasoning_gym:{self.name} has no training problem that is not also among its "
            f"validation_problems={self.validation_problems}; ask for fewer of these"
        )

    @functools.cached_property
    def _held_out(self) -> frozenset[str]:
        return frozenset(problem.answer["question"] for problem in self.validation)

    def grade(
        self, problems: Sequence[Problem], responses: Sequence[str]
    ) -> dict[str, list[float]]:
        """Grades responses.

        Returns:
            "reward", the library's score of what the last <answer> tags enclose, or, if there are
            none, of the whole response; "format", 1 if there are such tags; and "unscorable", 1 if
            the library's function raises on the answer, which is then rewarded with 0.
        """
        extract = library().utils.extract_answer
        tagged = [extract(response) for response in responses]
        given = [
            response.strip() if answer is None else answer
            for answer, response in zip(tagged, responses, strict=True)
        ]
        scores = [self._score(*pair) for pair in zip(problems, given, strict=True)]
        return {
            "reward": [score or 0.0 for score in scores],
            "format": [float(answer is not None) for answer in tagged],
            "unscorable": [float(score is None) for score in scores],
        }

    def _score(self, problem: Problem, answer: str) -> float | None:
        try:
            return float(self._dataset.score_answer(answer, problem.answer))
        except Exception:  # some of the library's functions raise on answers they cannot parse
            return None


@functools.cache
def library() -> ModuleType:
    """The library, imported on first use, since that takes a second or more.

    Raises:
        files.Failure: it is not installed.
    """
    try:
        return importlib.import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        raise files.Failure(
            f"Tasks reasoning_gym:NAME need what is not installed ({error.name}): "
            "pip install '.[tasks]' in the clone"
        ) from error


def make(name: str, **options: Any) -> ReasoningGym:
    """The task of one dataset; options that are not this task's own go to the dataset."""
    own = {field.name for field in dataclasses.fields(ReasoningGym)} - {"name", "config"}
    return ReasoningGym(
        name,
        {option: value for option, value in options.items() if option not in own},
        **{option: value for option, value in options.items() if option in own},
    )
