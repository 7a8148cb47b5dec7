"""A task from a file and a function of the user's."""

import json

import pytest

from experiments import files
from experiments.tasks.data import Data
from experiments.tasks.task import graded

PROBLEMS = [
    {"prompt": "1 + 1 =", "sum": 2},
    {"prompt": [{"role": "user", "content": "2 + 2?"}], "sum": 4},
    {"prompt": "3 + 3 =", "sum": 6},
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, PROBLEMS)))
    (tmp_path / "user_reward_module.py").write_text(
        "def reward(problems, responses):\n"
        "    return [float(str(p['sum']) == r) for p, r in zip(problems, responses)]\n"
        "def several(problems, responses):\n"
        "    return {'reward': reward(problems, responses), 'length': list(map(len, responses))}\n"
        "constant = 1.0\n"
    )
    return tmp_path


def test_problems_are_split_and_graded_by_the_function(here):
    task = Data(data="problems.jsonl", reward="user_reward_module:reward", validation_problems=1)
    assert len(task.training) == 2
    problems = [*task.training, *task.validation]
    assert sorted(problem.answer["sum"] for problem in problems) == [2, 4, 6]
    assert all(problem.prompt == problem.answer["prompt"] for problem in problems)
    responses = [str(problems[0].answer["sum"]), "x", str(problems[2].answer["sum"])]
    assert graded(task, problems, responses)["reward"].tolist() == [1, 0, 1]


def test_a_function_may_return_several_grades(here):
    task = Data(
        data="problems.jsonl",
        validation_data="problems.jsonl",
        reward="user_reward_module:several",
    )
    assert len(task.training) == len(task.validation) == 3
    grades = graded(task, task.training, ["2", "44", ""])
    assert {name: grade.tolist() for name, grade in grades.items()} == {
        "reward": [1, 0, 0],
        "length": [1, 2, 0],
    }


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("user_reward_module", "must have the form my_module:name"),
        ("user_reward_module:nothing", "has no 'nothing'"),
        ("no_such_module:reward", "there is no module 'no_such_module'"),
        ("user_reward_module:constant", "must be a function, not 1.0"),
    ],
)
def test_a_function_that_is_none_is_refused_at_once(here, reward, message):
    with pytest.raises(files.Failure, match=message):
        Data(data="problems.jsonl", reward=reward)


@pytest.mark.parametrize(
    "prompt", [[], [{"role": "user"}], ["hello"], [{"role": "a", "content": 1}]]
)
def test_prompts_that_are_no_chat_are_refused(here, prompt):
    (here / "bad.jsonl").write_text(json.dumps({"prompt": prompt}))
    with pytest.raises(files.Failure, match=r"bad\.jsonl, problem 1: each message"):
        len(Data(data="bad.jsonl", reward="user_reward_module:reward").training)
