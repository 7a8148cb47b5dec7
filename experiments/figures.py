"""The paper's four figures, from the metrics of finished runs.

Greedy validation reward, per-step KL and KL to the start against the optimizer step, and the
validation reward against the cumulative KL: a low KL may only mean a small step, so the last one
shows what each nat bought. With several seeds, lines are means and bands reach from least to most.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import axes, figure

from experiments import records
from experiments.methods import MethodName

Results = dict[MethodName, list[list[records.Row]]]

LABELS: dict[MethodName, str] = {
    "reinforce": "REINFORCE",
    "grpo": "GRPO",
    "grpo_matched": "GRPO, matched norms",
    "proma_accumulation": "PROMA accumulation",
    "proma_intra": "PROMA intra",
    "proma_both": "PROMA, both",
}
# Colours of Okabe and Ito, distinct to colour-blind readers.
_STYLES: dict[MethodName, dict[str, Any]] = {
    "reinforce": {"color": "#000000", "linestyle": "-"},
    "grpo": {"color": "#E69F00", "linestyle": "-"},
    "grpo_matched": {"color": "#E69F00", "linestyle": ":"},
    "proma_accumulation": {"color": "#0072B2", "linestyle": "-"},
    "proma_intra": {"color": "#009E73", "linestyle": "-"},
    "proma_both": {"color": "#CC79A7", "linestyle": "-"},
}
_STEP = "optimizer step"
_VALIDATION = "greedy validation reward"


def _curves(panel: axes.Axes, results: Results, x: str, y: str) -> None:
    for method, runs in results.items():
        rows = [[row for row in run if x in row and y in row] for run in runs]
        across = np.mean([[row[x] for row in run] for run in rows], axis=0)
        up = np.array([[row[y] for row in run] for run in rows])
        panel.plot(across, up.mean(axis=0), label=LABELS[method], **_STYLES[method])
        if len(runs) > 1:
            colour = _STYLES[method]["color"]
            panel.fill_between(across, up.min(axis=0), up.max(axis=0), color=colour, alpha=0.1)
    panel.grid(alpha=0.3)


def _validation(panel: axes.Axes, results: Results) -> None:
    _curves(panel, results, "step", "validation")
    panel.set(xlabel=_STEP, ylabel=_VALIDATION, title="Validation")


def _step_kl(panel: axes.Axes, results: Results) -> None:
    _curves(panel, results, "step", "step_kl")
    panel.set(xlabel=_STEP, ylabel="KL(before ‖ after), nats per token", title="Per-step KL")
    panel.set_yscale("log")


def _start_kl(panel: axes.Axes, results: Results) -> None:
    _curves(panel, results, "step", "start_kl")
    panel.set(xlabel=_STEP, ylabel="KL(policy ‖ start), nats per token", title="KL to the start")


def _score_for_kl(panel: axes.Axes, results: Results) -> None:
    _curves(panel, results, "cumulative_kl", "validation")
    panel.set(xlabel="sum of per-step KL, nats per token", ylabel=_VALIDATION)
    panel.set_title("Score against cumulative KL")


_PANELS: dict[str, Callable[[axes.Axes, Results], None]] = {
    "validation": _validation,
    "step_kl": _step_kl,
    "start_kl": _start_kl,
    "score_against_kl": _score_for_kl,
}


def draw(results: Results, directory: pathlib.Path) -> list[pathlib.Path]:
    """Draws each figure, and all four in one, as PNG files in `directory`.

    Args:
        results: per method the metrics of its runs, one per seed.
        directory: made if it is not there.

    Returns:
        The files, the one with all four first.
    """
    directory.mkdir(parents=True, exist_ok=True)
    together = figure.Figure(figsize=(9, 7.4), layout="constrained")
    panels = together.subplots(2, 2).ravel()
    for panel, plot in zip(panels, _PANELS.values(), strict=True):
        plot(panel, results)
    together.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    files = [directory / "comparison.png"]
    together.savefig(files[0], dpi=150)
    for name, plot in _PANELS.items():
        alone = figure.Figure(figsize=(6.4, 4.4), layout="constrained")
        panel = alone.subplots()
        plot(panel, results)
        panel.legend(fontsize="small")
        files.append(directory / f"{name}.png")
        alone.savefig(files[-1], dpi=120)
    return files
