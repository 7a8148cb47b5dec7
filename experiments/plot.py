"""`python -m experiments.plot`: figures against the learning rate, from saved metrics alone.

Points are means over the seeds, and bars reach from the least of them to the most: with three
seeds that is all there is to know. A run that did not reach its last step, since it is unfinished
or diverged, is in no mean, and is marked by a cross.
"""

import collections
import json
import pathlib
import textwrap
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import tyro
from matplotlib import axes, figure, lines
from pydantic.dataclasses import dataclass
from rich import table as rich_table

from experiments import checked, command_line, figures, files, records, report
from experiments.methods import MethodName


@dataclass(frozen=True, config=checked.CONFIG)
class Command:
    """Draws what saved runs came to, from their metrics alone.

    That is, against the learning rate: best and last validation, per-step KL, KL to the start and
    entropy; and the score against the KL that it cost. Takes the folders of `sweep`, and those of
    `compare` and `train` too. Runs that differ in more than method, learning rate, method settings
    and seed are refused.
    """

    directory: Annotated[pathlib.Path, tyro.conf.Positional] = pathlib.Path("runs/sweep")
    """The folder that the runs are in, at any depth."""
    output: pathlib.Path | None = None
    """Where the figures go; None: to figures in that folder."""


class Saved(NamedTuple):
    """A run as it is on the disk."""

    directory: pathlib.Path
    config: dict[str, Any]
    rows: list[records.Row]

    @property
    def is_complete(self) -> bool:
        """Whether the run reached its last step, with numbers that are finite."""
        return bool(self.rows) and (
            self.rows[-1]["step"] >= self.config["training"]["steps"]
            and None not in self.rows[-1].values()
        )

    @property
    def learning_rate(self) -> float:
        """Of all its steps."""
        return self.config["training"]["method"]["learning_rate"]

    def values(self, key: str) -> list[float]:
        """Of a metric, where it was measured."""
        return [row[key] for row in self.rows if key in row]


class Quantity(NamedTuple):
    """A number that a run comes to, and how it is drawn."""

    title: str
    unit: str
    scale: str
    of: Callable[[Saved], float]


_REWARD = "greedy validation reward"
_KL = "nats per token"
_START: dict[str, Any] = {"color": "grey", "linewidth": 0.8, "linestyle": "--"}
BEST = Quantity("Best validation", _REWARD, "linear", lambda run: max(run.values("validation")))
LAST = Quantity("Last validation", _REWARD, "linear", lambda run: run.values("validation")[-1])
STEP_KL = Quantity(
    "Per-step KL, mean over the steps", _KL, "log", lambda run: fmean(run.values("step_kl"))
)
START_KL = Quantity("KL(last policy ‖ start)", _KL, "log", lambda run: run.values("start_kl")[-1])
ENTROPY = Quantity("Last entropy", _KL, "linear", lambda run: run.values("entropy")[-1])
CUMULATIVE_KL = Quantity(
    "Sum of per-step KL", _KL, "log", lambda run: run.values("cumulative_kl")[-1]
)


class Series(NamedTuple):
    """The runs of one method with the same settings, by learning rate."""

    label: str
    style: dict[str, Any]
    runs: dict[float, list[Saved]]

    def complete(self, rate: float) -> list[Saved]:
        """Those with a learning rate that reached their last step."""
        return [run for run in self.runs[rate] if run.is_complete]


def read(directory: pathlib.Path) -> Saved:
    """A run in a directory.

    Raises:
        files.Failure: its files are damaged.
    """
    path = directory / "config.json"
    with files.using(directory):
        content = path.read_bytes()
    config = files.parse(content, dict, str(path), "Put back a copy of it.")
    return Saved(directory, config, records.read_metrics(directory))


def find(directory: pathlib.Path) -> list[Saved]:
    """All runs below a directory; a warm start is none.

    Raises:
        files.Failure: there is none, or one is damaged.
    """
    saved = [read(path.parent) for path in sorted(directory.rglob("config.json"))]
    runs = [run for run in saved if "method" in run.config]
    if not runs:
        raise files.Failure(f"{directory} has no runs in it: choose a folder that has.")
    return runs


def told(run: Saved) -> str:
    """What a run came to, in a few words."""
    if not run.is_complete:
        return f"not finite at step {run.rows[-1]['step']}" if run.rows else "not begun"
    return f"best {BEST.of(run):.3f}, last {LAST.of(run):.3f}, step KL {STEP_KL.of(run):.1e}"


def series(saved: Sequence[Saved]) -> list[Series]:
    """Runs by method and settings, each named by the settings in which it differs.

    Raises:
        files.Failure: runs differ in more than method, learning rate, its settings and seed.
    """
    _check_comparable(saved)
    by_method: dict[MethodName, dict[str, list[Saved]]] = {name: {} for name in figures.LABELS}
    for run in saved:
        settings = run.config["training"]["method"] | {"learning_rate": None}
        runs = by_method[run.config["method"]].setdefault(json.dumps(settings), [])
        runs.append(run)
    return [
        Series(
            ", ".join([figures.LABELS[method], *_differing(json.loads(settings), variants)]),
            _style(method, number),
            _by_rate(runs),
        )
        for method, variants in by_method.items()
        for number, (settings, runs) in enumerate(variants.items())
    ]


def _check_comparable(saved: Sequence[Saved]) -> None:
    def common(run):
        training = {key: run.config["training"][key] for key in run.config["training"]}
        training.pop("method")
        kept = {key: run.config[key] for key in ("task", "model", "start")}
        return kept | {"training": training}

    for run in saved:
        found = records.differences(common(saved[0]), common(run))
        if found:
            raise files.Failure(
                f"{saved[0].directory} and {run.directory} cannot be drawn together "
                f"({'; '.join(found)}). Choose a folder whose runs differ in method, learning "
                "rate, method settings and seed alone."
            )


def _differing(settings: dict[str, Any], variants: Iterable[str]) -> list[str]:
    """Settings of one variant of a method that another does not share."""
    others = [json.loads(other) for other in variants]
    return [
        f"{name.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}"
        for name, value in settings.items()
        if any(other[name] != value for other in others)
    ]


def _by_rate(runs: list[Saved]) -> dict[float, list[Saved]]:
    by_rate = collections.defaultdict(list)
    for run in sorted(runs, key=lambda run: run.learning_rate):
        by_rate[run.learning_rate].append(run)
    return dict(by_rate)


def _style(method: MethodName, number: int) -> dict[str, Any]:
    """A method's colour and marker; further variants of it have other lines and hollow markers."""
    markers = dict(zip(figures.LABELS, "soXD^v", strict=True))
    return {
        "color": figures.COLOURS[method],
        "marker": markers[method],
        "linestyle": ["-", "--", "-.", ":"][number % 4],
        "markerfacecolor": figures.COLOURS[method] if number == 0 else "white",
        "markersize": 5,
        "linewidth": 1.2,
    }


def table(saved: Sequence[Saved]) -> rich_table.Table:
    """The numbers, a line for each variant and learning rate."""
    results = {}
    for one in series(saved):
        for rate, runs in one.runs.items():
            complete = one.complete(rate)
            missing = len(runs) - len(complete)
            note = f" ({missing} of {len(runs)} incomplete)" if missing else ""
            results[f"{one.label}, lr {rate:g}{note}"] = [run.rows for run in complete]
    return report.summary(results)


def draw(saved: Sequence[Saved], directory: pathlib.Path) -> list[pathlib.Path]:
    """Draws the figures as PNG files in `directory`, which is made if it is not there.

    Returns:
        The files: the numbers against the learning rate, and the score against the KL.

    Raises:
        files.Failure: the runs cannot be compared.
    """
    directory.mkdir(parents=True, exist_ok=True)
    found = series(saved)
    drawn = {
        "learning_rates": (
            _against_rates(found),
            "points are means, bars reach from the least to the most",
        ),
        "score_against_kl": (_against_kl(found), "means, a point for each validation"),
    }
    paths = []
    for name, (one, key) in drawn.items():
        title = textwrap.wrap(f"{_title(saved)}: {key}", int(13 * one.get_figwidth()))
        one.suptitle("\n".join(title), fontsize="medium")
        paths.append(directory / f"{name}.png")
        one.savefig(paths[-1], dpi=120)
    return paths


def _title(saved: Sequence[Saved]) -> str:
    """Task, steps, k and seeds."""
    task, training = saved[0].config["task"], saved[0].config["training"]
    sequences = training["prompts"] * training["group_size"] // training["steps_per_batch"]
    name = task["task"] if task["data"] is None else task["data"]
    seeds = len({run.config["seed"] for run in saved})
    return (
        f"{', '.join([name, *task['task_options']])}: {training['steps']} optimizer steps of "
        f"k = {sequences // training['microbatch_size']} microbatches of "
        f"{training['microbatch_size']} sequences; {seeds} {'seed' if seeds == 1 else 'seeds'}"
    )


def _against_rates(drawn: list[Series]) -> figure.Figure:
    """A panel for each number, against the learning rate; the last one score against KL."""
    whole = figure.Figure(figsize=(11, 7.6), layout="constrained")
    panels = whole.subplots(2, 3)
    for panel, quantity in zip(panels.flat, [BEST, LAST, STEP_KL, START_KL, ENTROPY], strict=False):
        for number, one in enumerate(drawn):
            aside = 10 ** (0.035 * (number - (len(drawn) - 1) / 2))  # so that bars do not overlap
            _points(panel, one, quantity, aside)
        panel.set(xscale="log", yscale=quantity.scale, xlabel="learning rate")
        panel.set(title=quantity.title, ylabel=quantity.unit)
        panel.grid(alpha=0.3)
    for panel in panels[0, :2]:
        panel.axhline(_start_score(drawn), **_START)
    _bought(panels[1, 2], drawn)
    handles = [lines.Line2D([], [], label="before training", **_START)]
    if any(len(one.complete(rate)) < len(one.runs[rate]) for one in drawn for rate in one.runs):
        cross = lines.Line2D([], [], color="grey", marker="x", linestyle="")
        cross.set_label("unfinished or diverged")
        handles.append(cross)
    _legend(whole, drawn, handles)
    return whole


def _start_score(drawn: list[Series]) -> float:
    """Validation of the start, which all runs share."""
    runs = [run for one in drawn for runs in one.runs.values() for run in runs]
    return fmean(run.rows[0]["validation"] for run in runs if run.rows)


def _points(panel: axes.Axes, one: Series, quantity: Quantity, aside: float) -> None:
    rates = [rate for rate in one.runs if one.complete(rate)]
    numbers = [[quantity.of(run) for run in one.complete(rate)] for rate in rates]
    means = list(map(fmean, numbers))
    bars = (
        [mean - min(found) for mean, found in zip(means, numbers, strict=True)],
        [max(found) - mean for mean, found in zip(means, numbers, strict=True)],
    )
    panel.errorbar([rate * aside for rate in rates], means, bars, elinewidth=1, **one.style)
    for rate, runs in one.runs.items():
        if len(one.complete(rate)) < len(runs):
            cross = {"color": one.style["color"], "marker": "x", "clip_on": False}
            panel.plot(rate * aside, 0.02, transform=panel.get_xaxis_transform(), **cross)


def _bought(panel: axes.Axes, drawn: list[Series]) -> None:
    """Last validation against the sum of the per-step KL, the learning rates of each joined."""
    for one in drawn:
        rates = [rate for rate in one.runs if one.complete(rate)]
        across, up = (
            [fmean(quantity.of(run) for run in one.complete(rate)) for rate in rates]
            for quantity in (CUMULATIVE_KL, LAST)
        )
        panel.plot(across, up, **one.style)
    panel.set(xscale="log", xlabel=f"sum of per-step KL, {_KL}", ylabel=_REWARD)
    panel.set_title("Last validation for the KL spent")
    panel.grid(alpha=0.3)


def _against_kl(drawn: list[Series]) -> figure.Figure:
    """A panel for each learning rate: validation during training, against the KL so far."""
    rates = sorted({rate for one in drawn for rate in one.runs})
    columns = min(len(rates), 3)
    rows = -(-len(rates) // columns)
    whole = figure.Figure(figsize=(1.5 + 3.4 * columns, 1.6 + 2.8 * rows), layout="constrained")
    panels = list(whole.subplots(rows, columns, squeeze=False).flat)
    for panel, rate in zip(panels, rates, strict=False):
        for one in drawn:
            runs = one.complete(rate) if rate in one.runs else []
            if runs:
                _path(panel, runs, one.style)
        panel.set(title=f"learning rate {rate:g}", xlabel=f"sum of per-step KL, {_KL}")
        panel.ticklabel_format(axis="x", scilimits=(-2, 3))
        panel.grid(alpha=0.3)
    for panel in panels[::columns]:
        panel.set_ylabel(_REWARD)
    for panel in panels[len(rates) :]:
        panel.remove()
    _legend(whole, drawn)
    return whole


def _path(panel: axes.Axes, runs: list[Saved], style: dict[str, Any]) -> None:
    """A mean over runs of validation and cumulative KL, at the steps that were validated."""
    validated = [[row for row in run.rows if "validation" in row] for run in runs]
    points = [
        (fmean(row["cumulative_kl"] for row in rows), fmean(row["validation"] for row in rows))
        for rows in zip(*validated, strict=True)
    ]
    panel.plot(*zip(*points, strict=True), **style | {"markersize": 3.5})


def _legend(
    whole: figure.Figure, drawn: list[Series], further: Sequence[lines.Line2D] = ()
) -> None:
    handles = [lines.Line2D([], [], label=one.label, **one.style) for one in drawn]
    whole.legend(handles=[*handles, *further], loc="outside lower center", ncols=3)


def main(command: Command) -> None:
    """Runs the command."""
    saved = find(command.directory)
    output = command.output or command.directory / "figures"
    files.check_writable(output)
    report.terminal.print(table(saved))
    report.say(f"Figures: {', '.join(map(str, draw(saved, output)))}")


if __name__ == "__main__":
    command_line.run(Command, main, "python -m experiments.plot")
