"""The task: tokens, split, answers and reward."""

import numpy as np
import pytest

from experiments.tasks.addition import END, PAD, Addition
from experiments.tasks.task import Problem

TASK = Addition(digits=2, validation_problems=100)


def test_prompts_are_padded_on_the_left():
    tokens, valid = TASK.encode_prompts(["37+58=", "4+5="])
    assert tokens.shape == (2, TASK.prompt_width)
    assert valid.tolist() == [[True] * 6, [False] * 2 + [True] * 4]
    assert (tokens[1, :2] == PAD).all()
    assert tokens[0, 2] == tokens[1, 3]  # "+"
    assert tokens[0, 3] == tokens[1, 4]  # "5"


def test_responses_end_and_vary_in_length():
    responses = TASK.encode_responses(["9", "95", "198"])
    assert responses.shape == (3, TASK.response_width)
    assert np.argmax(responses == END, axis=1).tolist() == [1, 2, 3]
    assert responses[0, 2:].tolist() == [PAD, PAD]


def test_splits_are_disjoint_deterministic_and_complete():
    validation = TASK.validation_prompts()
    training = TASK.training_prompts(9_900, np.random.default_rng(0))
    assert len(validation) == 100
    assert len(set(validation) | set(training)) == 10_000
    assert validation == Addition(digits=2, validation_problems=100).validation_prompts()
    assert validation != Addition(digits=2, validation_problems=100, seed=1).validation_prompts()


def test_only_the_exact_ended_answer_is_rewarded():
    answer = TASK.encode_responses(["95"])[0]
    unended = np.where(answer == END, PAD, answer)
    longer = TASK.encode_responses(["950"])[0]
    wrong = TASK.encode_responses(["96"])[0]
    early = TASK.encode_responses(["9"])[0]
    rewards = TASK.reward(["37+58="] * 5, np.stack([answer, unended, longer, wrong, early]))
    assert rewards.tolist() == [1, 0, 0, 0, 0]
    assert rewards.dtype == np.float32


@pytest.mark.parametrize("problems", [0, 10_000])
def test_a_split_that_leaves_nothing_is_refused(problems):
    with pytest.raises(ValueError, match="validation_problems"):
        Addition(digits=2, validation_problems=problems)


def test_problems_are_those_of_the_shuffle_in_its_order():
    assert [problem.prompt for problem in TASK.validation] == TASK.validation_prompts()
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
