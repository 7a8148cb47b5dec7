"""What graded() refuses, and lazy problems as a sequence."""

import numpy as np
import pytest

from experiments import files
from experiments.tasks.task import LazyProblems, Problem, graded

PROBLEMS = [Problem("a"), Problem("b")]


class Returning:
    """A task whose grades are given."""

    training = validation = PROBLEMS

    def __init__(self, grades):
        self.grades = grades

    def grade(self, problems, responses):
        return self.grades


def test_grades_become_float32_arrays():
    grades = graded(Returning({"reward": [1, True], "length": np.arange(2)}), PROBLEMS, ["", ""])
    assert {name: grade.tolist() for name, grade in grades.items()} == {
        "reward": [1, 1],
        "length": [0, 1],
    }
    assert {grade.dtype for grade in grades.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("grades", "message"),
    [
        ([1.0, 0.0], "must return a dict"),
        ({"score": [1.0, 0.0]}, r'no "reward", but \[\'score\'\]'),
        ({"reward": [1.0]}, r"\(1,\), but must have a number for each of the 2 responses"),
        ({"reward": 1.0}, r"shape \(\)"),
        ({"reward": [1.0, float("nan")]}, "nan for the response 'second'"),
        ({"reward": [1.0, 0.0], "other": [float("inf"), 0.0]}, "'other' is inf for .* 'first'"),
        ({"reward": [1.0, None]}, "nan for the response 'second'"),
        ({"reward": [1.0, "good"]}, "must be a list of numbers"),
        ({"reward": [[1.0], [1.0, 2.0]]}, "must be a list of numbers"),
    ],
)
def test_grades_that_break_the_promise_are_refused(grades, message):
    with pytest.raises(files.Failure, match=f"Returning.grade.*{message}"):
        graded(Returning(grades), PROBLEMS, ["first", "second"])


def test_lazy_problems_are_made_when_asked_for():
    made = []
    problems = LazyProblems(5, lambda i: made.append(i) or Problem(str(i)))
    assert not made
    assert problems[-1].prompt == "4"
    assert made == [4]
    assert [problem.prompt for problem in problems[1:4:2]] == ["1", "3"]
    assert [problem.prompt for problem in problems] == list("01234")
    with pytest.raises(IndexError):
        problems[5]
