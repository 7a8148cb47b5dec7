"""A task by its name and options, as a command line gives them; what is wrong is one plain line.

Names are those of `BUILT_IN`, `reasoning_gym:NAME` for each dataset of that library, and
`my_module:MyTask` for any class or function that can be imported, also from the current folder.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import pydantic

from experiments import files
from experiments.tasks import importing, reasoning_gym_task
from experiments.tasks.task import Problem, Task, is_chat

BUILT_IN = {
    "addition": "experiments.tasks.addition:Addition",
    "arithmetic": "experiments.tasks.arithmetic:Arithmetic",
    "data": "experiments.tasks.data:Data",
    "gsm8k": "experiments.tasks.gsm8k:GSM8K",
    "mbpp": "experiments.tasks.code:MBPP",
    "reversal": "experiments.tasks.reversal:Reversal",
    "svamp": "experiments.tasks.gsm8k:SVAMP",
}
"""Where each task is; it is imported when it is asked for."""


def make_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task with this name.

    Args:
        name: of a built-in task, `reasoning_gym:NAME` or `my_module:MyTask`.
        options: what its class or function gets as keyword arguments.

    Raises:
        files.Failure: there is no such task, it does not take these options, or what it makes is
            no task.

    Example:
        >>> task = make_task("addition", {"digits": 3})
        >>> len(task.validation), task.grade([Problem("3+4=")], ["7"])
        (512, {'reward': [1.0]})
    """
    options = dict(options or {})
    make = _maker(name)
    _check_names(name, make, options)
    try:
        task = make(**options)
        _check(name, task)
    except pydantic.ValidationError as error:
        raise files.Failure(f"Task {name}: {_in_words(error)}") from error
    return task


def _maker(name: str) -> Callable[..., Any]:
    library, _, dataset = name.partition(":")
    if library == "reasoning_gym" and dataset:
        return functools.partial(reasoning_gym_task.make, dataset)
    if name not in BUILT_IN and not dataset:
        raise files.Failure(
            f"There is no task {name!r}, but: {', '.join(BUILT_IN)}, reasoning_gym:NAME, and "
            "my_module:MyTask for one of your own"
        )
    return importing.load(BUILT_IN.get(name, name), "task")


def _check_names(name: str, make: Callable[..., Any], options: Mapping[str, Any]) -> None:
    if not callable(make):
        raise files.Failure(f"Task {name} must be a class or a function, not {make!r}")
    try:
        signature = inspect.signature(make)
    except ValueError:  # some that are written in C have none
        return
    parameters = signature.parameters.values()
    takes = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [parameter.name for parameter in takes]
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
        for option in options:
            if option not in names:
                raise files.Failure(
                    f"{option} is no option of task {name}; it takes: {', '.join(names) or 'none'}"
                )
    for parameter in takes:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise files.Failure(f"Task {name} needs the option {parameter.name}")


def _in_words(error: pydantic.ValidationError) -> str:
    """What was refused first."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    must = re.sub(r"^\w+ (should be|is not)", "must be", first["msg"])
    return f"{first['loc'][0]}={first['input']!r} {must}"


def _check(name: str, task: Any) -> None:
    for attribute in ("training", "validation", "grade"):
        if not hasattr(task, attribute):
            raise files.Failure(f"Task {name} makes a {type(task).__name__} without {attribute!r}")
    if not callable(task.grade):
        raise files.Failure(f"Task {name}: grade must be a method, not {task.grade!r}")
    for part in ("training", "validation"):
        problems = getattr(task, part)
        if not (hasattr(problems, "__len__") and hasattr(problems, "__getitem__")):
            raise files.Failure(
                f"Task {name}: {part} must be a sequence of problems, such as a list, not a "
                f"{type(problems).__name__}"
            )
        if len(problems) == 0:
            raise files.Failure(f"Task {name} has no problems for {part}")
        _check_problem(f"Task {name}: {part}[0]", problems[0])


def _check_problem(place: str, problem: Any) -> None:
    if not isinstance(problem, Problem):
        raise files.Failure(
            f"{place} must be an experiments.tasks.task.Problem, not a {type(problem).__name__}"
        )
    if not isinstance(problem.prompt, str) and not is_chat(problem.prompt):
        raise files.Failure(
            f"{place} must have as its prompt a text or a list of messages, each with a role and a "
            f"content, not {problem.prompt!r:.200}"
        )
