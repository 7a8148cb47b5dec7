"""The paper's four figures, from the metrics of finished runs.

Greedy validation reward, per-step KL and KL to the start against the optimizer step, and the
validation reward against the cumulative KL: a low KL may only mean a small step, so the last one
shows what each nat bought. Every method has a column of its own, with the others in grey behind it.

matplotlib, which takes seconds to import, is imported when the figures are drawn.
"""

from __future__ import annotations

import functools
import pathlib
import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments import records
from experiments.methods import MethodName

if TYPE_CHECKING:
    from matplotlib import axes, figure

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
COLOURS: dict[MethodName, str] = {
    "reinforce": "#000000",
    "grpo": "#E69F00",
    "grpo_matched": "#D55E00",
    "proma_accumulation": "#0072B2",
    "proma_intra": "#009E73",
    "proma_both": "#CC79A7",
}
_FEW = 20
"""Points up to which each gets a marker."""


class _Panel(NamedTuple):
    """What is drawn against what, by the names of metrics."""

    x: str
    y: str
    across: str
    up: str
    scale: str = "linear"


_STEP = "optimizer step"
_SCORE = "greedy validation\nreward"
_PANELS = {
    "step_kl": _Panel("step", "step_kl", _STEP, "per-step KL,\nnats per token", "log"),
    "start_kl": _Panel("step", "start_kl", _STEP, "KL to the start,\nnats per token"),
    "validation": _Panel("step", "validation", _STEP, _SCORE),
    "score_against_kl": _Panel(
        "cumulative_kl", "validation", "sum of per-step KL,\nnats per token", _SCORE
    ),
}


def _points(runs: list[list[records.Row]], panel: _Panel) -> tuple[Any, Any]:
    """Where the points are, as a mean over the runs, and (runs, points) how high."""
    rows = [[row for row in run if panel.x in row and panel.y in row] for run in runs]
    across = np.mean([[row[panel.x] for row in run] for run in rows], axis=0)
    return across, np.array([[row[panel.y] for row in run] for run in rows])


def _draw(place: axes.Axes, results: Results, method: MethodName, panel: _Panel) -> None:
    """A method's curve, over those of the others."""
    for other, runs in results.items():
        if other != method:
            across, up = _points(runs, panel)
            place.plot(across, up.mean(axis=0), color="#BBBBBB", linewidth=0.8)
    across, up = _points(results[method], panel)
    colour = COLOURS[method]
    marker = "." if len(across) <= _FEW else None
    place.fill_between(across, up.min(axis=0), up.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    place.plot(across, up.mean(axis=0), color=colour, marker=marker)
    place.set_yscale(panel.scale)
    place.grid(alpha=0.3)


def _figure(results: Results, panels: list[_Panel], title: str) -> figure.Figure:
    """A row for each panel, a column for each method."""
    from matplotlib import figure

    rows, columns = len(panels), len(results)
    size = (max(5, 1 + 1.7 * columns), 1.6 + 1.5 * rows)
    drawn = figure.Figure(figsize=size, layout="constrained")
    places = drawn.subplots(rows, columns, squeeze=False, sharex="row", sharey="row")
    for panel, below, row in zip(panels, [*panels[1:], None], places, strict=True):
        is_last = below is None or below.across != panel.across
        for method, place in zip(results, row, strict=True):
            _draw(place, results, method, panel)
            place.set_xlabel(panel.across if is_last else "", fontsize="small")
            place.tick_params(labelsize="small", labelbottom=is_last)
        row[0].set_ylabel(panel.up)
    for method, place in zip(results, places[0], strict=True):
        name = textwrap.fill(LABELS[method], 14)
        place.set_title(name, color=COLOURS[method], fontsize="medium", fontweight="bold")
    drawn.suptitle("\n".join([title, *textwrap.wrap(_key(results), int(13 * size[0]))]))
    return drawn


def _key(results: Results) -> str:
    """What lines and bands are."""
    seeds = max(map(len, results.values()))
    key = (
        f"Lines are means over {seeds} seeds, bands reach from the least to the most."
        if seeds > 1
        else "One seed."
    )
    return key + (" Grey: the lines of the other methods." if len(results) > 1 else "")


def draw(
    results: Results,
    title: str,
    directory: pathlib.Path,
    each: Callable[..., Iterable[None]] = map,
) -> list[pathlib.Path]:
    """Draws each figure, and all four in one, as PNG files in `directory`.

    Args:
        results: per method the metrics of its runs, one per seed.
        title: what was run, for example the task.
        directory: made if it is not there.
        each: calls a function for each figure, as `map` does; one from `pool` does it side by side.

    Returns:
        The files, the one with all four first.
    """
    directory.mkdir(parents=True, exist_ok=True)
    contents = {"comparison": list(_PANELS.values())}
    contents |= {name: [panel] for name, panel in _PANELS.items()}
    files = [directory / f"{name}.png" for name in contents]
    list(each(functools.partial(_save, results, title), files, contents.values()))
    return files


def _save(results: Results, title: str, file: pathlib.Path, panels: list[_Panel]) -> None:
    _figure(results, panels, title).savefig(file, dpi=150)
