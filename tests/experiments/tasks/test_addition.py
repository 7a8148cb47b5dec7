"""The task: split, answers and reward."""

import numpy as np
import pytest

from experiments.tasks.addition import Addition
from experiments.tasks.task import Problem

TASK = Addition(digits=2, validation_problems=100)


def test_splits_are_disjoint_deterministic_and_complete():
    def prompts(problems):
        return [problem.prompt for problem in problems]

    validation, training = prompts(TASK.validation), prompts(TASK.training)
    assert len(validation) == 100
    assert len(set(validation) | set(training)) == 10_000
    assert validation == prompts(Addition(digits=2, validation_problems=100).validation)
    assert validation != prompts(Addition(digits=2, validation_problems=100, seed=1).validation)


@pytest.mark.parametrize("problems", [0, 10_000])
def test_a_split_that_leaves_nothing_is_refused(problems):
    with pytest.raises(ValueError, match="validation_problems"):
        Addition(digits=2, validation_problems=problems)


def test_problems_are_those_of_the_shuffle_in_its_order():
    everything = np.random.default_rng(0).permutation(10_000)
    left, right = divmod(int(everything[100 + 7]), 100)
    assert TASK.training[7].prompt == f"{left}+{right}="
    assert len(TASK.training) == 9_900


def test_characters_and_widths_hold_every_problem_and_answer():
    problems = [*TASK.training, *TASK.validation]
    answers = [TASK.answer(problem) for problem in problems]
    prompts = [problem.prompt for problem in problems]
    assert set("".join(prompts + answers)) == set(TASK.characters)
    assert max(map(len, prompts)) == TASK.longest_prompt
    assert max(map(len, answers)) == TASK.longest_response


def test_only_the_sum_is_graded_with_a_reward():
    responses = ["95", "95 ", "095", "96", ""]
    assert TASK.grade([Problem("37+58=")] * 5, responses) == {"reward": [1, 0, 0, 0, 0]}
