"""Three steps on the published files of MBPP, HumanEval and GSM8K, by a tiny random Qwen3."""

import json
import pathlib

import pytest

from experiments import configs, files, train
from experiments.models.settings import ModelConfig
from experiments.tasks import sandbox
from experiments.tasks.settings import TaskConfig

MODEL = pathlib.Path(__file__).parent / "models" / "data" / "qwen3"
DATA = pathlib.Path(__file__).parents[3] / "shared" / "data"


def task(name, **file_names):
    paths = {option: DATA / file for option, file in file_names.items()}
    for path in paths.values():
        if not path.exists():
            pytest.skip(f"{path} is not there")
    if name == "mbpp":
        try:
            sandbox.check()
        except files.Failure as failure:
            pytest.skip(str(failure))
    options = tuple(f"{option}={path}" for option, path in paths.items())
    return TaskConfig(name, options, allow_code_execution=name == "mbpp")


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("name", "file_names"),
    [
        ("mbpp", {"train_file": "mbpp.jsonl", "validation_file": "HumanEval.jsonl.gz"}),
        ("gsm8k", {"train_file": "gsm8k_train.jsonl", "validation_file": "gsm8k_test.jsonl"}),
    ],
)
def test_three_steps(name, file_names, tmp_path):
    command = train.Command(
        method="proma_accumulation",
        directory=tmp_path / "runs",
        task=task(name, **file_names),
        model=ModelConfig(MODEL, prompt_tokens=2048, response_tokens=8),
        training=configs.TrainingConfig(
            steps=3,
            prompts=2,
            group_size=2,
            steps_per_batch=1,
            microbatch_size=2,
            validation_problems=4,
            validation_every=3,
        ),
    )
    train.main(command)
    [metrics] = command.directory.glob("*/seed_0/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "validation" in row] == [0, 3]
