"""The examples in the docstrings of the tasks do what they say."""

import doctest
import importlib
import pkgutil

import pytest

from experiments import files, tasks
from experiments.tasks import sandbox

MODULES = [module.name for module in pkgutil.iter_modules(tasks.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_do_what_they_say(name):
    if name == "sandbox":
        try:
            sandbox.check()
        except files.Failure as failure:
            pytest.skip(str(failure))
    module = importlib.import_module(f"experiments.tasks.{name}")
    assert doctest.testmod(module).failed == 0


def test_there_are_examples():
    task = importlib.import_module("experiments.tasks.task")
    assert doctest.testmod(task).attempted > 3
