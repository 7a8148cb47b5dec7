"""Datasets of reasoning-gym as tasks: lazy, split, scored by the library."""

import pytest

from experiments import files
from experiments.tasks import reasoning_gym_task
from experiments.tasks.registry import make_task
from experiments.tasks.task import graded


def test_a_library_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    reasoning_gym_task.library.cache_clear()
    with pytest.raises(files.Failure, match=r"pip install '.\[tasks\]'"):
        make_task("reasoning_gym:leg_counting")


class TestWithTheLibrary:
    """What needs the library, which takes seconds to import."""

    @pytest.fixture(autouse=True)
    def _library(self):
        pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")

    def test_problems_are_disjoint_and_answers_scored_by_the_library(self):
        task = make_task(
            "reasoning_gym:base_conversion",
            {"min_value": 1, "max_value": 40, "max_base": 3, "validation_problems": 20},
        )
        questions = [problem.answer["question"] for problem in task.validation]
        trained = [task.training[i].answer["question"] for i in range(100)]
        assert not set(questions) & set(trained)
        assert task.validation[3].prompt[0]["content"].startswith(questions[3])
        answer = task.validation[0].answer["answer"]
        responses = [
            f"Hm, <answer>1{answer}</answer> no, <answer> {answer}\n</answer>",
            f" {answer} ",
            f"It is {answer}",
            "<answer>none</answer>",
        ]
        grades = graded(task, [task.validation[0]] * 4, responses)
        assert grades["reward"][:2].tolist() == [1, 1]
        assert 0 < grades["reward"][2] < 1  # the library's own partial score
        assert grades["format"].tolist() == [1, 0, 0, 1]

    def test_what_the_library_raises_on_an_answer_is_no_reward(self):
        task = make_task("reasoning_gym:prime_factorization", {"validation_problems": 1})
        grades = graded(task, task.validation, ["<answer>garbage</answer>"])
        assert (grades["reward"].tolist(), grades["unscorable"].tolist()) == ([0], [1])

    @pytest.mark.parametrize(
        ("dataset", "options", "message"),
        [
            ("no_such", {}, "the library has no such dataset, but: ab, "),
            ("leg_counting", {"legs": 4}, "legs is no option .* it takes: .*max_animals"),
            ("leg_counting", {"size": 4}, "size is no option .* it takes: training_problems"),
            ("leg_counting", {"max_animals": 0}, "does not take the options.*max_animals must"),
            ("leg_counting", {"max_animals": "a"}, "does not take the options"),
            ("leg_counting", {"seed": -1}, "seed=-1 must be greater than or equal to 0"),
            (
                "coin_flip",
                {"min_trials": 3, "max_trials": 3, "allow_simple": 1},
                "is no option",
            ),
        ],
    )
    def test_what_is_wrong_is_said_in_one_line(self, dataset, options, message):
        with pytest.raises(files.Failure, match=message):
            make_task(f"reasoning_gym:{dataset}", options)

    def test_too_few_different_problems_are_an_error(self):
        options = {"min_animals": 1, "max_animals": 1, "min_instances": 2, "max_instances": 2}
        with pytest.raises(files.Failure, match="no training problem that is not also among"):
            make_task(
                "reasoning_gym:leg_counting",
                {**options, "training_problems": 50, "validation_problems": 1000},
            )

    def test_a_mixture_of_datasets_is_a_task(self):
        datasets = [
            {"name": "leg_counting", "weight": 1, "config": {}},
            {"name": "chain_sum", "weight": 2, "config": {"min_terms": 3}},
        ]
        task = make_task(
            "reasoning_gym:composite", {"datasets": datasets, "validation_problems": 20}
        )
        asked = [problem.answer["metadata"]["source_dataset"] for problem in task.validation]
        assert set(asked) == {"leg_counting", "chain_sum"}
        answers = [problem.answer["answer"] for problem in task.validation]
        assert graded(task, task.validation, answers)["reward"].tolist() == [1] * 20
