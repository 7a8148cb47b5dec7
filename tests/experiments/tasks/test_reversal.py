"""Reversal: its words, its split, its alphabet and its grades."""

import pytest

from experiments.tasks.reversal import Reversal
from experiments.tasks.task import Problem

SETTINGS = {"length": 3, "validation_length": 5, "letters": 5, "training_problems": 500}
SETTINGS["validation_problems"] = 100
TASK = Reversal(**SETTINGS)


def _words(problems):
    return [problem.prompt.removesuffix("=") for problem in problems]


def test_training_and_validation_share_no_word():
    training, validation = _words(TASK.training), _words(TASK.validation)
    assert len(training) == 500
    assert len(validation) == TASK.validation_problems
    assert not set(training) & set(validation)
    assert set(map(len, training)) <= {1, 2, 3}
    assert set(map(len, validation)) == {1, 2, 3, 4, 5}


def test_the_words_depend_on_the_seed_alone():
    again, other = (Reversal(**SETTINGS, seed=seed) for seed in (0, 1))
    assert TASK.training == again.training
    assert TASK.validation == again.validation
    assert TASK.training != other.training
    assert TASK.validation != other.validation


def test_characters_and_widths_hold_every_problem_and_answer():
    problems = [*TASK.training, *TASK.validation]
    answers = [TASK.answer(problem) for problem in problems]
    prompts = [problem.prompt for problem in problems]
    assert set("".join(prompts + answers)) == set(TASK.characters)
    assert max(map(len, prompts)) == TASK.longest_prompt
    assert max(map(len, answers)) == TASK.longest_response
    assert TASK.grade(problems, answers)["reward"] == [1.0] * len(problems)


def test_only_the_exact_answer_is_rewarded():
    responses = ["cba", "cb", "cbab", " cba", "abc", ""]
    grades = TASK.grade([Problem("abc=")] * len(responses), responses)
    assert grades["reward"] == [1, 0, 0, 0, 0, 0]
    assert grades["prefix"] == [1, 2 / 3, 1, 0, 0, 0]


def test_a_split_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="validation_problems=512 must be fewer than the 64"):
        Reversal(length=3, letters=4)
