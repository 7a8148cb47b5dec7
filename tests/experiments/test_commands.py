"""The two commands and the figures they draw."""

import importlib

import numpy as np
import pytest
import tyro
from matplotlib import image

from experiments import figures


def rows(offset: float):
    start = {"step": 0, "start_kl": 0.0, "cumulative_kl": 0.0, "validation": 0.5}
    later = [
        {
            "step": step,
            "step_kl": 1e-3 * (1 + offset),
            "start_kl": 1e-3 * step,
            "cumulative_kl": 1e-3 * (1 + offset) * step,
        }
        for step in range(1, 9)
    ]
    for row in later[3::4]:
        row["validation"] = 0.5 + 0.01 * row["step"]
    return [start, *later]


def test_figures_are_written(tmp_path):
    results = {method: [rows(i), rows(i + 0.5)] for i, method in enumerate(figures.LABELS)}
    files = figures.draw(results, tmp_path / "figures")
    assert [file.name for file in files] == [
        "comparison.png",
        "validation.png",
        "step_kl.png",
        "start_kl.png",
        "score_against_kl.png",
    ]
    for file in files:
        pixels = image.imread(file)
        assert pixels.shape[1] >= 640
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 5


@pytest.mark.parametrize("name", ["train", "compare"])
def test_help_explains_every_setting(name, capsys):
    command = importlib.import_module(f"experiments.{name}").Command
    with pytest.raises(SystemExit) as ended:
        tyro.cli(command, args=["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for setting in ("--training.method.rank", "--start.decoder.width", "--training.steps"):
        assert setting in shown
    assert "Responses sampled to each prompt" in shown


def test_compare_wants_the_run_to_match_before_its_match():
    compare = importlib.import_module("experiments.compare")
    with pytest.raises(ValueError, match="grpo_matched needs proma_accumulation before it"):
        compare.Command(methods=("grpo_matched", "proma_accumulation"))
    compare.Command(methods=("grpo",))
