"""Writing Python functions that pass tests: MBPP, with its own validation problems or HumanEval's.

The files are those that are published. Code is run in the sandboxes of `sandbox.py`, and only if
the task is told that it may be. It is taken from the last block of the response that begins with
three backticks, or, if there is none, is the whole response.
"""

import builtins
import functools
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic.dataclasses import dataclass

from experiments import checked, files
from experiments.tasks import problem_files, sandbox
from experiments.tasks.task import Problem

SPLITS = {"training": range(601, 975), "validation": range(511, 601), "test": range(11, 511)}
"""MBPP's published split by task_id."""

_INSTRUCTION = "Answer with the code alone, in one block that begins with ```python."
_BLOCK = re.compile(r"^[ \t]*```[\w+]*[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


class Exercise(NamedTuple):
    """What a response is tried with.

    Attributes:
        start: code that the response goes on from, or writes anew.
        function: the function that `start` begins, if it does.
        tests: Python source.
        overriding: names of Python's own that are the response's in the tests.
    """

    start: str
    function: str
    tests: str
    overriding: tuple[str, ...] = ()

    def run(self, response: str) -> sandbox.Run:
        """The response as a program, with its tests."""
        written = code(response)
        is_anew = re.search(rf"^def\s+{re.escape(self.function)}\b", written, re.MULTILINE)
        separator = "\n\n" if is_anew else ""
        return sandbox.Run(self.start + separator + written, self.tests, self.overriding)


def code(response: str) -> str:
    r"""The code in a response.

    Example:
        >>> code("It is:\n```python\nx = 1\n```\nThat sets x."), code("x = 1")
        ('x = 1\n', 'x = 1')
    """
    blocks = _BLOCK.findall(response)
    return blocks[-1] if blocks else response


@dataclass(frozen=True, config=checked.CONFIG)
class MBPP:
    """The task."""

    train_file: problem_files.File
    """MBPP's problems, of which those of the published training split are trained on."""
    validation_file: problem_files.File | None = None
    """HumanEval's problems, or other ones of MBPP's; by default those in `train_file`."""
    validation_split: Literal["validation", "test"] = "validation"
    """Which of MBPP's published splits is validated on."""
    allow_code_execution: bool = False
    """Whether code that the model writes may be run here, in sandboxes."""
    timeout: checked.Positive = sandbox.TIMEOUT
    """Seconds of processor time that a program may take, and three times as many by the clock."""

    def __post_init__(self):
        if not self.allow_code_execution:
            raise ValueError(
                "allow_code_execution=False: this task runs the code that the model writes, in "
                "sandboxes without network and files; it must be True to say that this is fine"
            )
        sandbox.check()

    @functools.cached_property
    def training(self) -> list[Problem]:
        """MBPP's training problems."""
        return _problems(self.train_file, "training")

    @functools.cached_property
    def validation(self) -> list[Problem]:
        """MBPP's validation or test problems, or all of HumanEval's."""
        return _problems(self.validation_file or self.train_file, self.validation_split)

    def grade(
        self, problems: Sequence[Problem], responses: Sequence[str]
    ) -> dict[str, list[float]]:
        """Grades responses.

        Returns:
            "reward", 1 if the code passes all tests, and "format", 1 if there is a block of code.
        """
        pairs = zip(problems, responses, strict=True)
        runs = [problem.answer.run(response) for problem, response in pairs]
        return {
            "reward": list(map(float, sandbox.passes_all(runs, timeout=self.timeout))),
            "format": [float(bool(_BLOCK.search(response))) for response in responses],
        }


def _problems(path: pathlib.Path, split: str) -> list[Problem]:
    records = problem_files.read(path)
    if "entry_point" in records[0]:
        needed = dict.fromkeys(("prompt", "entry_point", "test"), str)
        return [_humaneval(record) for record in problem_files.read(path, **needed)]
    records = problem_files.read(
        path, task_id=int, text=str, code=str, test_setup_code=str, test_list=list
    )
    chosen = [_mbpp(record) for record in records if record["task_id"] in SPLITS[split]]
    if not chosen:
        ids = SPLITS[split]
        raise files.Failure(
            f"{path} holds no problem with a task_id from {ids[0]} to {ids[-1]}, which are MBPP's "
            f"for {split}"
        )
    return chosen


def _mbpp(record: Mapping) -> Problem:
    shown = "\n".join(record["test_list"])
    content = f"{record['text']}\nThese tests must pass:\n```python\n{shown}\n```\n{_INSTRUCTION}"
    defined = re.findall(r"^(?:def|class)\s+(\w+)", record["code"], re.MULTILINE)
    of_python = sys.stdlib_module_names.union(dir(builtins))
    overriding = tuple(name for name in defined if name in of_python)
    exercise = Exercise("", "", f"{record['test_setup_code']}\n{shown}", overriding)
    return Problem([{"role": "user", "content": content}], exercise)


def _humaneval(record: Mapping) -> Problem:
    start, function = record["prompt"], record["entry_point"]
    content = f"Complete this function:\n```python\n{start.rstrip()}\n```\n{_INSTRUCTION}"
    # Other functions of the prompt are also in the tests' process, where the program is not.
    tests = f"{start}\ndel {function}\n{record['test']}\ncheck({function})\n"
    return Problem([{"role": "user", "content": content}], Exercise(start, function, tests))
