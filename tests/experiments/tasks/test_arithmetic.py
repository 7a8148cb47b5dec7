"""Arithmetic: its levels, its mixture, its split and its grades."""

import re

import pytest

from experiments.tasks.arithmetic import LEVELS, Arithmetic, question
from experiments.tasks.task import Problem


def _parts(problem):
    """Left, operation and right of a question in digits."""
    content = problem.prompt[0]["content"]
    left, operation, right = re.fullmatch(
        r"What is (\w+) (\w+) (\w+)\? .* only\.", content
    ).groups()
    return int(left), operation, int(right)


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_has_the_numbers_it_says(level):
    task = Arithmetic(easiest=level, hardest=level, training_problems=2000)
    factors, terms = [], []
    for problem in [*task.training, *task.validation]:
        left, operation, right = _parts(problem)
        assert problem.answer == (left * right if operation == "times" else left + right)
        (factors if operation == "times" else terms).append(sorted((left, right)))
    below = LEVELS.get(level - 1, (1, 0))
    assert min(map(min, factors)) == 2
    for (_, larger), bound, easier in [
        *((pair, LEVELS[level].factor, below[0]) for pair in factors),
        *((pair, LEVELS[level].term, below[1]) for pair in terms),
    ]:
        assert easier < larger <= bound


def test_no_pair_of_numbers_is_in_both_parts_even_mirrored_or_in_words():
    task = Arithmetic(hardest=4, words=0.5)
    digits = Arithmetic(hardest=4)

    def pairs(problems):
        return {(op, *sorted((left, right))) for left, op, right in map(_parts, problems)}

    assert not pairs(digits.training) & pairs(digits.validation)
    assert [p.answer for p in task.training] == [p.answer for p in digits.training]
    words = [p for p in task.training if not re.search(r"\d", p.prompt[0]["content"])]
    assert 0.4 < len(words) / len(task.training) < 0.6


def test_the_mixture_is_as_set():
    products = [" times " in p.prompt[0]["content"] for p in Arithmetic(products=0.8).training]
    assert 0.77 < sum(products) / len(products) < 0.83
    assert all(" plus " in p.prompt[0]["content"] for p in Arithmetic(products=0.0).training)


def test_the_problems_depend_on_the_seed_alone():
    assert Arithmetic().training == Arithmetic().training
    assert Arithmetic().validation == Arithmetic().validation
    assert Arithmetic().validation != Arithmetic(seed=1).validation


@pytest.mark.parametrize(
    ("response", "right", "is_number"),
    [
        ("1056", 1, 1),
        (" 1,056.\n", 1, 1),
        ("1056.0", 1, 1),
        ("1057", 0, 1),
        ("-1056", 0, 1),
        ("1,05,6", 0, 0),
        ("1056 1057", 0, 0),
        ("1057, 1056", 1, 0),
        ("32 times 33 is 1056", 1, 0),
        ("1056 apples", 1, 0),
        ("", 0, 0),
    ],
)
def test_the_number_alone_is_rewarded_most(response, right, is_number):
    problem = Problem(question("times", 32, 33), 1056)
    for in_text in (0.0, 0.5):
        grades = Arithmetic(in_text=in_text).grade([problem], [response])
        reward = right * (1 if is_number else in_text)
        assert grades == {"reward": [reward], "right": [right], "format": [is_number]}


def test_levels_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="easiest=3 must be at most hardest=2"):
        Arithmetic(easiest=3, hardest=2)
