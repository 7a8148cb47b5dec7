"""Tasks by name and options: those there are, one's own, and what is refused in plain words."""

import pytest

from experiments import files
from experiments.tasks.registry import BUILT_IN, make_task
from experiments.tasks.reversal import Reversal
from experiments.tasks.task import graded

OWN = """
import dataclasses
from experiments.tasks.task import Problem

@dataclasses.dataclass
class Shout:
    word: str
    loud: bool = True

    @property
    def training(self):
        return [Problem(self.word, self.word.upper())]

    validation = training

    def grade(self, problems, responses):
        return {"reward": [float(p.answer == r) for p, r in zip(problems, responses)]}

class Empty(Shout):
    validation = []

class Endless(Shout):
    validation = iter(())

class Texts(Shout):
    validation = ["a prompt"]

class Numbers(Shout):
    validation = [Problem([1])]

class Nothing(Shout):
    validation = [Problem(None)]

class Ungraded:
    training = validation = [Problem("a")]

def make(**options):
    return Shout(**options)

loudness = 11
"""


@pytest.fixture(autouse=True)
def _own_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "own_tasks_module.py").write_text(OWN)


def test_a_built_in_task_gets_its_options():
    task = make_task("reversal", {"length": 3, "letters": 9})
    assert task == Reversal(length=3, letters=9)


@pytest.mark.parametrize("name", ["Shout", "make"])
def test_a_task_of_ones_own_is_imported_from_the_current_folder(name):
    task = make_task(f"own_tasks_module:{name}", {"word": "hey"})
    assert graded(task, task.training, ["HEY"])["reward"].tolist() == [1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adition", {}, "There is no task 'adition', but: addition, .*reasoning_gym:NAME"),
        ("addition", {"digit": 1}, "digit is no option of task addition; it takes: digits, "),
        ("addition", {"digits": "2"}, "Task addition: digits='2' must be a valid integer"),
        ("addition", {"digits": 2.5}, "digits=2.5 must be a valid integer"),
        ("addition", {"digits": 9}, "digits=9 must be less than or equal to 4"),
        ("addition", {"digits": 1}, "validation_problems=512 must be fewer than the 100"),
        ("gsm8k", {}, "Task gsm8k needs the option train_file"),
        ("gsm8k", {"train_file": 1}, "train_file=1 must be a valid path"),
        ("gsm8k", {"train_file": "no.jsonl"}, "no.jsonl cannot be read"),
        ("no_module:Task", {}, "there is no module 'no_module'"),
        ("experiments.no_module:Task", {}, "there is no module 'experiments.no_module'"),
        ("own_tasks_module:None_", {}, "own_tasks_module has no 'None_'"),
        ("own_tasks_module:", {}, "There is no task"),
        ("own_tasks_module:loudness", {}, "must be a class or a function, not 11"),
        ("own_tasks_module:Shout", {}, "needs the option word"),
        ("own_tasks_module:Shout", {"wort": "a"}, "wort is no option.*; it takes: word, loud"),
        ("own_tasks_module:Ungraded", {}, "makes a Ungraded without 'grade'"),
        ("own_tasks_module:Empty", {"word": "a"}, "no problems for validation"),
        ("own_tasks_module:Endless", {"word": "a"}, "validation must be a sequence"),
        ("own_tasks_module:Texts", {"word": "a"}, r"validation\[0\] must be .*Problem, not a str"),
        ("own_tasks_module:Numbers", {"word": "a"}, r"validation\[0\] must have as its prompt"),
        ("own_tasks_module:Nothing", {"word": "a"}, r"validation\[0\] must have as its prompt"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(name, options, message):
    with pytest.raises(files.Failure, match=message) as caught:
        make_task(name, options)
    assert "\n" not in str(caught.value)


def test_what_a_module_of_ones_own_raises_comes_through(tmp_path):
    (tmp_path / "broken_tasks_module.py").write_text("import no_such_module_either\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_either"):
        make_task("broken_tasks_module:Task")


@pytest.mark.parametrize("place", BUILT_IN.values())
def test_every_built_in_name_leads_to_a_task(place):
    module, name = place.split(":")
    assert hasattr(__import__(module, fromlist=[name]), name)
