"""What docs/experiments.md shows works: its tasks grade, its commands are taken."""

import importlib
import pathlib
import re
import shlex

import pytest

from experiments import command_line
from experiments.tasks.registry import make_task
from experiments.tasks.settings import TaskConfig
from experiments.tasks.task import graded

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "experiments.md").read_text()
MODEL = pathlib.Path(__file__).parent / "models" / "data" / "qwen3"
SAMPLES = pathlib.Path(__file__).parent / "tasks" / "samples"
COMMANDS = [
    line
    for line in re.findall(r"^python -m (.*)", PAGE.replace("\\\n", ""), re.MULTILINE)
    if "mbpp" not in line  # which takes a sandbox
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the modules and files that the page names."""
    task, reward = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "page_task.py").write_text(task)
    (tmp_path / "grading.py").write_text(reward)
    (tmp_path / "problems.jsonl").write_text(
        10 * '{"prompt": "2 + 2 =", "answer": "4"}\n{"prompt": "2 + 3 =", "answer": "5"}\n'
    )
    (tmp_path / "train.jsonl").write_text(100 * (SAMPLES / "gsm8k.jsonl").read_text())
    monkeypatch.chdir(tmp_path)


def test_its_tasks_grade(folder):
    capitals = make_task("page_task:Capitals")
    grades = graded(capitals, capitals.training, ["TREE", "House", ""])
    assert grades["reward"].tolist() == [1, 0, 0]
    data = TaskConfig(
        task_options=("validation_problems=1",), data="problems.jsonl", reward="grading:reward"
    ).made
    [problem] = data.validation
    assert graded(data, [problem] * 2, ["it is 4 or 5", "6"])["reward"].tolist() == [1, 0]


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_taken(command, folder):
    name, *flags = shlex.split(command)
    if {"--model", "--preset"} & set(flags):
        flags += ["--model", str(MODEL)]
    command_line.read(importlib.import_module(name).Command, name, flags)
