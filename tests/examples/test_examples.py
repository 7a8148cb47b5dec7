"""The examples run, at sizes that take seconds."""

import json
import pathlib

import pytest

from examples import own_task

MODEL = pathlib.Path(__file__).parents[1] / "experiments" / "models" / "data" / "qwen3"


@pytest.mark.any_version
def test_a_task_of_your_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_task.main(MODEL, steps=2, learning_rate=1e-3)
    [metrics] = tmp_path.glob("runs/capitals/proma_accumulation/seed_0/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[2]["update_norm"] > 0
    assert rows[2]["rollout_letters"] > 0
