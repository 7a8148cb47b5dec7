"""What a task is: problems to train and to validate on, and grades for the responses to them.

Any object with these three attributes is a task; it need not inherit from anything. `--task
my_module:Capitals` makes one of your own, with the options that the command gets as keyword
arguments. A whole one:

    >>> from experiments.tasks.task import Problem, graded
    >>> class Capitals:
    ...     '''Asks for words in capital letters.'''
    ...
    ...     def __init__(self, words="yes no maybe perhaps", held_out=1):
    ...         problems = [
    ...             Problem(prompt=f"Write in capital letters: {word}", answer=word.upper())
    ...             for word in words.split()
    ...         ]
    ...         self.training, self.validation = problems[held_out:], problems[:held_out]
    ...
    ...     def grade(self, problems, responses):
    ...         pairs = list(zip(problems, responses, strict=True))
    ...         return {
    ...             "reward": [float(text.strip() == problem.answer) for problem, text in pairs],
    ...             "capitals": [float(text.isupper()) for _, text in pairs],
    ...         }
    >>> task = Capitals()
    >>> graded(task, task.training, ["NO", " MAYBE ", "PERHAPS not"])["reward"]
    array([1., 1., 0.], dtype=float32)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, overload

import numpy as np

from experiments import files, processes

Chat = Sequence[Mapping[str, str]]
"""Messages, each with its "role" ("system", "user" or "assistant") and its "content"."""


class Problem(NamedTuple):
    """One problem.

    Attributes:
        prompt: text that the policy goes on with, or a chat that it answers.
        answer: what the task's grades need to know; nothing else reads it.
    """

    prompt: str | Chat
    answer: Any = None


class Task(Protocol):
    """Problems and grades."""

    @property
    def training(self) -> Sequence[Problem]:
        """Problems to learn from.

        Only the length and single items are asked for, so that they can be made when they are
        needed (`LazyProblems`).
        """
        ...

    @property
    def validation(self) -> Sequence[Problem]:
        """Problems that training never sees."""
        ...

    def grade(
        self, problems: Sequence[Problem], responses: Sequence[str]
    ) -> Mapping[str, Sequence[float]]:
        """Grades responses, each to the problem at its place.

        Returns:
            Grades by name, each with a finite number per response. "reward", from 0 to 1 in all
            built-in tasks, is what the policy learns from and what validation reports; the means
            of the others are logged beside it.
        """
        ...


class ToyTask(Task, Protocol):
    """A task for small decoders that read single characters and begin with worked examples."""

    @property
    def characters(self) -> str:
        """All characters of prompts and right responses, each once."""
        ...

    @property
    def longest_prompt(self) -> int:
        """Characters of the longest prompt, in training or validation."""
        ...

    @property
    def longest_response(self) -> int:
        """Characters of the longest right response."""
        ...

    def answer(self, problem: Problem, /) -> str:
        """A right response."""
        ...


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a chat: messages, at least one, with texts as "role" and "content"."""
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(
            isinstance(message, Mapping)
            and all(isinstance(message.get(name), str) for name in ("role", "content"))
            for message in prompt
        )
    )


class LazyProblems(Sequence[Problem]):
    """Problems that are made when they are asked for.

    Example:
        >>> squares = LazyProblems(10**9, lambda i: Problem(f"{i} squared is ", i * i))
        >>> len(squares), squares[-1].prompt, [problem.answer for problem in squares[2:5]]
        (1000000000, '999999999 squared is ', [4, 9, 16])
    """

    def __init__(self, count: int, make: Callable[[int], Problem]):
        """`count` problems; `make` is called with a place from 0 to count - 1."""
        self._places = range(count)
        self._make = make

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Problem: ...
    @overload
    def __getitem__(self, place: slice) -> list[Problem]: ...
    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self._make(i) for i in self._places[place]]
        return self._make(self._places[place])


def draw(task: Task, count: int, rng: np.random.Generator) -> list[Problem]:
    """`count` training problems, drawn without replacement."""
    return [task.training[int(i)] for i in rng.choice(len(task.training), count, replace=False)]


def graded(
    task: Task, problems: Sequence[Problem], responses: Sequence[str]
) -> dict[str, np.ndarray]:
    """The task's grades, each a float32 array (n,), made sure to be what `Task.grade` promises.

    Raises:
        files.Failure: `grade` returned no mapping, no "reward", another number of grades than
            there are responses, or something else than finite numbers.
    """
    returned = processes.by_first(lambda: task.grade(problems, responses))
    name = f"{type(task).__name__}.grade"
    if not isinstance(returned, Mapping):
        raise files.Failure(
            f'{name} returned a {type(returned).__name__}, but must return a dict: {{"reward": '
            "[...]}, with a number per response"
        )
    if "reward" not in returned:
        raise files.Failure(f'{name} returned no "reward", but {sorted(map(str, returned))}')
    return {
        str(grade): _numbers(returned[grade], responses, f"{name}: {grade!r}") for grade in returned
    }


def _numbers(grades: Sequence[float], responses: Sequence[str], name: str) -> np.ndarray:
    try:
        array = np.asarray(grades, np.float32)
    except (TypeError, ValueError) as error:
        raise files.Failure(f"{name} must be a list of numbers, but: {error}") from error
    if array.shape != (len(responses),):
        raise files.Failure(
            f"{name} has shape {array.shape}, but must have a number for each of the "
            f"{len(responses)} responses"
        )
    wrong = np.flatnonzero(~np.isfinite(array))
    if wrong.size:
        raise files.Failure(
            f"{name} is {array[wrong[0]]} for the response {responses[wrong[0]]!r}, but must be a "
            "finite number"
        )
    return array
