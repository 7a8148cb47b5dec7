"""How good a policy is: the grades of its greedy responses to a task's validation problems."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx

from experiments import sampling
from experiments.tasks.task import Problem, Task, graded


class Graded(NamedTuple):
    """Responses and their grades, each list or array with an entry per problem."""

    rollouts: sampling.Rollouts
    responses: list[str]
    grades: dict[str, np.ndarray]


def problems(task: Task, count: int | None = None) -> list[Problem]:
    """The first `count` validation problems, or all of them."""
    return [task.validation[i] for i in range(len(task.validation) if count is None else count)]


def check_count(argument: str, count: int | None, name: str, task: Task) -> None:
    """Raises a ValueError if `count`, given as `argument`, is more than the task `name` has."""
    if count is not None and count > len(task.validation):
        raise ValueError(
            f"{argument}={count} must be at most {len(task.validation)}, the validation problems "
            f"of {name}"
        )


def respond(
    policy: sampling.Policy,
    params: nnx.State,
    task: Task,
    problems: Sequence[Problem],
    at_a_time: int | None = None,
) -> Graded:
    """Greedy responses to problems, `at_a_time` of them sampled together (None: all)."""
    prompts = [problem.prompt for problem in problems]
    rollouts = sampling.respond(policy, params, prompts, None, at_a_time)
    responses = sampling.texts(policy, rollouts)
    return Graded(rollouts, responses, graded(task, problems, responses))


def scores(
    policy: sampling.Policy,
    params: nnx.State,
    task: Task,
    count: int | None = None,
    at_a_time: int | None = None,
) -> dict[str, float]:
    """Mean grades over the first `count` validation problems.

    Returns:
        "validation", the mean reward, and "validation_NAME", those of the other grades.
    """
    found = respond(policy, params, task, problems(task, count), at_a_time)
    return {
        "validation" if name == "reward" else f"validation_{name}": float(grade.mean())
        for name, grade in found.grades.items()
    }
