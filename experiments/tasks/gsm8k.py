"""Word problems from files: GSM8K and SVAMP in the formats that they are published in.

Both ask for the answer after `####`, as GSM8K's own answers end, and take it by the rule of
`answers.number`. Records that lack something are an error that names file and line.
"""

import abc
import functools
import pathlib
from collections.abc import Sequence
from decimal import Decimal

from pydantic.dataclasses import dataclass

from experiments import checked, files
from experiments.tasks import answers, problem_files
from experiments.tasks.task import Problem

INSTRUCTION = "Think step by step. End with the answer in the form: #### <number>"


@dataclass(frozen=True, config=checked.CONFIG)
class WordProblems(abc.ABC):
    """Problems whose answer is a number."""

    train_file: problem_files.File
    """The training problems."""
    validation_file: problem_files.File | None = None
    """The validation problems; without it, some of the training problems are held out."""
    validation_problems: checked.Count = 256
    """Problems held out of `train_file`; with a `validation_file`, at most so many of it."""
    instruction: str = INSTRUCTION
    """What is said after the question."""
    seed: checked.Seed = 0
    """Chooses the validation problems."""

    @abc.abstractmethod
    def read(self, path: pathlib.Path) -> list[tuple[str, Decimal]]:
        """The questions and answers in a file."""

    @functools.cached_property
    def _split(self) -> tuple[list[Problem], list[Problem]]:
        return problem_files.train_and_validation(
            self._problems,
            self.train_file,
            self.validation_file,
            self.validation_problems,
            self.seed,
        )

    def _problems(self, path: pathlib.Path) -> list[Problem]:
        return [
            Problem([{"role": "user", "content": f"{question}\n{self.instruction}"}], answer)
            for question, answer in self.read(path)
        ]

    @property
    def training(self) -> list[Problem]:
        """The problems of `train_file` that are not held out."""
        return self._split[0]

    @property
    def validation(self) -> list[Problem]:
        """The problems of `validation_file`, or those held out."""
        return self._split[1]

    def grade(
        self, problems: Sequence[Problem], responses: Sequence[str]
    ) -> dict[str, list[float]]:
        """Grades responses.

        Returns:
            "reward", 1 if `answers.number` finds the right number, however it is written, and
            "format", 1 if there is a number after `####`.
        """
        pairs = zip(problems, responses, strict=True)
        return {
            "reward": [float(answers.number(text) == problem.answer) for problem, text in pairs],
            "format": [
                float("####" in text and answers.number(text) is not None) for text in responses
            ],
        }


@dataclass(frozen=True, config=checked.CONFIG)
class GSM8K(WordProblems):
    """Lines with "question" and "answer", which ends in `#### N`."""

    def read(self, path: pathlib.Path) -> list[tuple[str, Decimal]]:
        read = []
        for i, record in enumerate(problem_files.read(path, question=str, answer=str), 1):
            answer = answers.number(record["answer"]) if "####" in record["answer"] else None
            if answer is None:
                raise files.Failure(
                    f"{path}, problem {i}: 'answer' must end in '#### ' and a number, but ends in "
                    f"{record['answer'][-40:]!r}"
                )
            read.append((record["question"], answer))
        return read


@dataclass(frozen=True, config=checked.CONFIG)
class SVAMP(WordProblems):
    """Objects with "Body", "Question" and "Answer", a number, in a JSON list or in lines."""

    def read(self, path: pathlib.Path) -> list[tuple[str, Decimal]]:
        read = []
        records = problem_files.read(path, Body=str, Question=str, Answer=(int, float, str))
        for i, record in enumerate(records, 1):
            answer = answers.number(str(record["Answer"]))
            if answer is None:
                raise files.Failure(
                    f"{path}, problem {i}: 'Answer' must be a number, not {record['Answer']!r}"
                )
            body = record["Body"].strip()
            read.append((f"{body}{'' if body.endswith('.') else '.'} {record['Question']}", answer))
        return read
