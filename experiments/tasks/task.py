"""What a task is: problems to train and to validate on, and grades for the responses to them.

Any object with these three attributes is a task; it need not inherit from anything.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

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
    """Problems and grades.

    Attributes:
        training: problems to learn from; only its length and its items are asked for, so they can
            be made when they are needed.
        validation: problems that training never sees.
    """

    training: Sequence[Problem]
    validation: Sequence[Problem]

    def grade(
        self, problems: Sequence[Problem], responses: Sequence[str]
    ) -> Mapping[str, Sequence[float]]:
        """Grades responses, each to the problem at its place.

        Returns:
            Grades by name, each with a number per response. "reward", from 0 to 1 in all built-in
            tasks, is what the policy learns from and what validation reports; the means of the
            others are logged beside it.
        """
        ...
