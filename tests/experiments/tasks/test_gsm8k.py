"""Word problems from files in published formats, and what is wrong with files that are not."""

import gzip
import pathlib

import pytest

from experiments import files
from experiments.tasks.gsm8k import GSM8K, SVAMP

SAMPLES = pathlib.Path(__file__).parent / "samples"
REAL = pathlib.Path(__file__).parents[4] / "shared" / "data"


def test_gsm8k_is_read_split_and_graded():
    task = GSM8K(train_file=SAMPLES / "gsm8k.jsonl", validation_problems=1)
    assert len(task.training) == 3
    problems = [*task.training, *task.validation]
    assert sorted(problem.answer for problem in problems) == [-5, 1.5, 10, 1200]
    first = next(problem for problem in problems if problem.answer == 10)
    assert first.prompt[0]["role"] == "user"
    assert first.prompt[0]["content"].startswith("Mara bakes 12 rolls")
    assert "#### <number>" in first.prompt[0]["content"]
    grades = task.grade([first] * 4, ["5*2 = 10\n#### 10", "So $10.00.", "10 - 1\n#### 9", "####"])
    assert grades == {"reward": [1, 1, 0, 0], "format": [1, 0, 1, 0]}


def test_a_validation_file_is_taken_whole_or_as_many_as_asked_for():
    sample = str(SAMPLES / "gsm8k.jsonl")
    whole = GSM8K(train_file=sample, validation_file=sample)
    assert len(whole.training) == len(whole.validation) == 4
    some = GSM8K(train_file=sample, validation_file=sample, validation_problems=3)
    assert (len(some.training), len(some.validation)) == (4, 3)


def test_svamp_is_read_from_a_list_and_from_lines(tmp_path):
    (listed,) = SVAMP(train_file=SAMPLES / "svamp.json", validation_problems=1).training
    lines = tmp_path / "svamp.jsonl.gz"
    lines.write_bytes(
        gzip.compress(
            b'{"Body": "Ola has 9 shells and gives 4 away", "Question": "How many are left?",'
            b' "Answer": "5.0"}\n\n{"Body": "A box has 6 eggs.", "Question": "How many eggs do 7'
            b' boxes have?", "Answer": 42}\n'
        )
    )
    (lined,) = SVAMP(train_file=lines, validation_problems=1).training
    assert listed == lined
    assert listed.prompt[0]["content"].startswith(
        {5: "Ola has 9 shells and gives 4 away. How many are left?\n"}.get(
            int(listed.answer), "A box has 6 eggs. How many eggs do 7 boxes have?\n"
        )
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "answer": "#### 1"}\n{"question": "b"}\n', "line 2 lacks 'answer'"),
        ('\n{"question": 1, "answer": "#### 1"}', "line 2: 'question' must be text, not 1"),
        ('{"question": "a", "answer": "1"}', "problem 1: 'answer' must end in '#### '"),
        ('{"question": "a", "answer": "#### x"}', "problem 1: 'answer' must end in '#### '"),
        ('{"question": "a"', "line 1 is no JSON"),
        ('[{"question": "a"}]', "record 1 lacks 'answer'"),
        ("[1]", "record 1 must be an object, not a int"),
        ("\n", "holds no problems"),
        ('{"question": "a", "answer": "#### 1"}', "validation_problems=256 must be fewer than"),
    ],
)
def test_a_bad_file_is_named_with_the_line(tmp_path, content, message):
    path = tmp_path / "problems.jsonl"
    path.write_text(content)
    with pytest.raises(files.Failure, match=message) as caught:
        len(GSM8K(train_file=path).training)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(files.Failure, match=r"none.jsonl cannot be read"):
        len(GSM8K(train_file=tmp_path / "none.jsonl").training)
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"not gzip")
    with pytest.raises(files.Failure, match=r"broken.jsonl.gz cannot be read"):
        len(GSM8K(train_file=broken).training)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the published files are not in {REAL}")
def test_the_published_files_are_read_and_their_own_answers_are_right():
    task = GSM8K(
        train_file=REAL / "gsm8k_train.jsonl",
        validation_file=REAL / "gsm8k_test.jsonl",
        validation_problems=2000,
    )
    assert (len(task.training), len(task.validation)) == (7473, 1319)
    written = [f"So it is #### {problem.answer:,}." for problem in task.validation]
    assert task.grade(task.validation, written)["reward"] == [1.0] * 1319
