"""MBPP and HumanEval: prompts, splits, the code in a response, and that right solutions pass."""

import gzip
import pathlib

import pytest

from experiments import files
from experiments.tasks import problem_files, sandbox
from experiments.tasks.code import MBPP, SPLITS, code
from experiments.tasks.registry import make_task
from experiments.tasks.task import graded

SAMPLES = pathlib.Path(__file__).parent / "samples"
REAL = pathlib.Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture
def _sandboxes():
    try:
        sandbox.check()
    except files.Failure as failure:
        pytest.skip(str(failure))


def _task(**options):
    defaults = {"train_file": str(SAMPLES / "mbpp.jsonl"), "allow_code_execution": True}
    return make_task("mbpp", {**defaults, **options})


def _solutions(path, field, ids=None):
    records = problem_files.read(path)
    return [r[field] for r in records if ids is None or r["task_id"] in ids]


@pytest.mark.usefixtures("_sandboxes")
class TestMBPP:
    """Its problems and grades."""

    def test_the_published_splits_are_taken(self):
        task = _task()
        assert [len(task.training), len(task.validation)] == [3, 1]
        assert "add one" in _task(validation_split="test").validation[0].prompt[0]["content"]

    def test_the_prompt_has_the_description_and_the_tests(self):
        content = _task().training[0].prompt[0]["content"]
        assert content.startswith("Write a function to double a number.\n")
        assert "\nassert double(-3) == -6\n" in content

    def test_right_solutions_pass_and_others_do_not(self):
        task = _task()
        solutions = _solutions(SAMPLES / "mbpp.jsonl", "code", SPLITS["training"])
        answers = [f"Here:\n```python\n{solution}\n```\nDone." for solution in solutions]
        grades = graded(task, task.training, answers)
        assert grades["reward"].tolist() == grades["format"].tolist() == [1, 1, 1]
        wrong = graded(task, task.training, [solutions[1], solutions[0], ""])
        assert wrong["reward"].tolist() == wrong["format"].tolist() == [0, 0, 0]

    def test_a_file_without_the_split_is_refused(self, tmp_path):
        line = (SAMPLES / "mbpp.jsonl").read_text().splitlines()[-1]
        (tmp_path / "few.jsonl").write_text(line)
        with pytest.raises(files.Failure, match=r"few\.jsonl holds no problem .* from 601 to 974"):
            _task(train_file=str(tmp_path / "few.jsonl"))

    def test_a_file_of_something_else_is_refused(self):
        with pytest.raises(files.Failure, match=r"gsm8k\.jsonl, line 1 lacks 'task_id'"):
            _task(train_file=str(SAMPLES / "gsm8k.jsonl"))


@pytest.mark.usefixtures("_sandboxes")
class TestHumanEval:
    """As validation problems."""

    def test_continuations_and_whole_functions_are_graded(self, tmp_path):
        packed = tmp_path / "humaneval.jsonl.gz"
        packed.write_bytes(gzip.compress((SAMPLES / "humaneval.jsonl").read_bytes()))
        task = _task(validation_file=str(packed))
        problem = task.validation[0]
        assert "def total(numbers: List[float]) -> float:" in problem.prompt[0]["content"]
        responses = [
            "    return float(sum(numbers))\n",
            "```python\ndef total(numbers):\n    return float(sum(numbers))\n```",
            "```\ndef total(numbers: List[float]):\n    return float(sum(numbers))",
            "    return 0.0\n",
            "def total(numbers):\n    return numbers[0]",
            "I cannot.",
        ]
        grades = graded(task, [problem] * 6, responses)
        assert grades["reward"].tolist() == [1, 1, 1, 0, 0, 0]
        assert grades["format"].tolist() == [0, 1, 1, 0, 0, 0]

    def test_what_the_tests_call_besides_is_the_prompts_own(self):
        task = _task(validation_file=str(SAMPLES / "humaneval.jsonl"))
        cheat = "```python\ndef double(x):\n    return x\ndef halve(x):\n    return x\n```"
        right = "```python\ndef halve(x):\n    return x >> 1\n```"
        grades = graded(task, [task.validation[1]] * 2, [cheat, right])
        assert grades["reward"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("x = 1\n", "x = 1\n"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("Draft:\n```py\nx = 0\n```\nBetter:\n```python\nx = 1\n```\nSo.", "x = 1\n"),
        ("  ```\n  x = 1\n  ```\n", "  x = 1\n"),
        ("```python\nx = 1\n", "x = 1\n"),
        ("```python\nx = '```'\n```", "x = '```'\n"),
        ("```python\n```", ""),
    ],
)
def test_the_code_is_that_of_the_last_block(response, expected):
    assert code(response) == expected


def test_code_is_not_run_without_permission():
    with pytest.raises(files.Failure, match=r"mbpp: allow_code_execution=False.*must be True"):
        _task(allow_code_execution=False)
    with pytest.raises(ValueError, match="allow_code_execution=False"):
        MBPP(train_file=SAMPLES / "mbpp.jsonl")


def test_code_is_not_run_without_sandboxes(monkeypatch):
    def fail():
        raise files.Failure("no sandbox here")

    monkeypatch.setattr(sandbox, "check", fail)
    with pytest.raises(files.Failure, match="no sandbox here"):
        _task()


@pytest.mark.usefixtures("_sandboxes")
@pytest.mark.skipif(not REAL.is_dir(), reason=f"the published files are not in {REAL}")
class TestPublished:
    """The published solutions pass the published tests."""

    def _check(self, every):
        task = make_task(
            "mbpp",
            {
                "train_file": str(REAL / "mbpp.jsonl"),
                "validation_file": str(REAL / "HumanEval.jsonl.gz"),
                "allow_code_execution": True,
            },
        )
        assert (len(task.training), len(task.validation)) == (374, 164)
        mbpp = _solutions(REAL / "mbpp.jsonl", "code", SPLITS["training"])
        humaneval = _solutions(REAL / "HumanEval.jsonl.gz", "canonical_solution")
        for problems, solutions in ((task.training, mbpp), (task.validation, humaneval)):
            rewards = graded(task, problems[::every], solutions[::every])["reward"]
            assert rewards.tolist() == [1] * len(rewards)

    def test_some(self):
        self._check(every=20)

    @pytest.mark.campaign
    def test_all(self):
        self._check(every=1)
