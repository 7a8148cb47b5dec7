"""What the commands print: settings, progress, and the table of results."""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from statistics import fmean, median, stdev
from typing import Protocol, Self

import jax
from flax import nnx
from rich import box, console, progress, table, text

from experiments import (
    configs,
    loggers,
    meshes,
    methods,
    records,
    sampling,
    starts,
    training,
    warm_start,
)
from experiments.models import lora
from experiments.models.settings import ModelConfig
from experiments.tasks.settings import TaskConfig

terminal = console.Console()
SECONDS_BETWEEN_LINES = 10.0
"""Of progress, where there is no terminal."""


class Settings(Protocol):
    """What the settings of a run and of a comparison have in common."""

    @property
    def task(self) -> TaskConfig: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def start(self) -> warm_start.WarmStartConfig: ...
    @property
    def training(self) -> configs.TrainingConfig: ...


def settings(
    of: Settings,
    learning_rates: Sequence[float] = (),
    mesh: jax.sharding.Mesh | None = None,
) -> None:
    """Prints the settings that the results hang on, with a sweep's learning rates; the devices."""
    config, method, shape = (
        of.training,
        of.training.method,
        starts.decoder_config(of.task, of.model, of.start),
    )
    rates = ", ".join(f"{rate:g}" for rate in learning_rates or [method.learning_rate])
    task, options = of.task.made, "".join(f", {option}" for option in of.task.task_options)
    terminal.print(
        f"[bold]Task[/]     {of.task.name}{options}: {len(task.training):,} training problems, "
        f"{len(task.validation):,} held out\n"
        f"[bold]Policy[/]   {of.model.model or 'small decoder'}: {shape.layers} layers, width "
        f"{shape.width}, {shape.heads} query and {shape.kv_heads} key/value heads of "
        f"{shape.head_dim}, feed-forward {shape.hidden}\n"
        f"[bold]Training[/] {config.steps} optimizer steps, {config.steps_per_batch} per rollout "
        f"batch of {config.prompts} prompts x {config.group_size} responses; "
        f"{config.microbatches} microbatches of {config.microbatch_size} sequences per step\n"
        f"[bold]Methods[/]  AdamW, learning rate {rates}, clipping "
        f"{method.max_gradient_norm:g}; GRPO: clip {method.clip:g}; PROMA: shrinkage "
        f"{method.shrinkage:g}; accumulation: ridge {method.ridge:g}, relative bound "
        f"{method.relative_bound}, skip fraction {method.skip_fraction:g}; intra: rank "
        f"{method.rank}\n"
        f"[bold]Devices[/]  {meshes.described(mesh)}: "
        f"{meshes.share(mesh, config.microbatch_size)} sequences of a microbatch "
        "on each",
        highlight=False,
    )


class _Pace(progress.ProgressColumn):
    """Seconds per step, and the time left if the number of steps is known."""

    def render(self, task: progress.Task) -> text.Text:
        if not task.speed:
            return text.Text()
        left = f", {timedelta(seconds=task.time_remaining)} left" if task.time_remaining else ""
        return text.Text(f"{1 / task.speed:.2f} s/step{left}")


class _Shown:
    """A run's progress while it goes on: a bar in a terminal, elsewhere a line now and then.

    Args:
        name: of the run.
        total: its steps, if known.

    Attributes:
        directory: where the run is, once it is opened.
    """

    directory: pathlib.Path

    def __init__(self, name: str, total: int | None):
        self._columns = (
            progress.TextColumn("{task.description}"),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[latest]}"),
            _Pace(),
        )
        self._bar = progress.Progress(
            progress.BarColumn(bar_width=8),
            *self._columns,
            console=terminal,
            disable=not terminal.is_terminal,
            speed_estimate_period=math.inf,
        )
        self._name = name
        self._task = self._bar.add_task(name, total=total, latest="compiling")
        self._latest: dict[str, float] = {}
        self._is_compiled = False
        self._is_told = False
        self._next_line = -math.inf

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def opened(self, run: records.Run, finished: bool) -> None:
        """Says where the run is, and where it begins."""
        self.directory = run.directory
        for passed in run.passed:
            say(f"{passed} This one goes beside it.")
        how = f"resumed from step {run.step}" if run.step else "begun"
        say(f"{self._name}: {'complete already' if finished else how}, in {run.directory}")
        self._bar.update(self._task, completed=run.step or 0, visible=not finished)
        if not finished:
            self._line()

    def row(self, row: records.Row) -> None:
        """Shows a step's row; the first step, which compiles, is left out of the pace."""
        names = {"loss": "loss", "validation": "score"}  # with more, 80 columns are too few
        self._latest |= {name: row[key] for key, name in names.items() if key in row}
        if row["step"] == 0:
            return
        latest = "  ".join(f"{key} {value:.2f}" for key, value in self._latest.items())
        step = int(row["step"])
        if self._is_compiled:
            self._bar.update(self._task, completed=step, latest=latest)
        else:
            self._bar.reset(self._task, completed=step, latest=latest)
            self._bar.advance(self._task, 0)
            self._is_compiled = True
        self._line()

    def compiled(self, update: jax.stages.Compiled) -> None:
        """Says once what memory the update takes, if the compiler counts it."""
        memory, self._is_told = None if self._is_told else update.memory_analysis(), True
        if memory is not None:
            peak, arguments = memory.peak_memory_in_bytes, memory.argument_size_in_bytes
            say(
                f"{self._name}: the update takes {in_words(peak)} on each device, "
                f"{in_words(arguments)} of them for parameters, optimizer state and batch"
            )

    def _line(self) -> None:
        [task] = self._bar.tasks
        now = self._bar.get_time()
        if self._bar.disable and (now >= self._next_line or task.finished):
            self._next_line = now + SECONDS_BETWEEN_LINES
            cells = (str(column(task)).strip() for column in self._columns)
            say("  ".join(filter(None, cells)))


def in_words(size: float) -> str:
    """Bytes in the largest unit that there is one of.

    Example:
        >>> in_words(1500)
        '1.465 KiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def say(line: str) -> None:
    """Prints plain text as it is."""
    terminal.print(line, highlight=False, markup=False, soft_wrap=True)


def _size(params: nnx.State) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def start(
    of: Settings,
    directory: pathlib.Path,
    stopping: Callable[[], bool],
    mesh: jax.sharding.Mesh | None = None,
    before_training: Callable[[], None] = lambda: None,
) -> tuple[sampling.Policy, nnx.State]:
    """The start, with the progress of a warm start while it trains on one device.

    `before_training` is called before a warm start trains, and not if it is trained already.
    """
    if of.model.model is not None:
        policy, params = starts.pretrained(of.model, mesh)
        how = f"as it is in {of.model.model}"
    else:
        with _Shown("warm start", None) as shown:

            def on_open(run, finished):
                shown.opened(run, finished)
                if not finished:
                    before_training()

            policy, params = warm_start.warm_start(
                warm_start.StartConfig(of.task, of.start),
                directory,
                shown.row,
                stopping,
                on_open,
            )
        last = records.read_metrics(shown.directory)[-1]
        how = (
            f"greedy validation reward {last['validation']:.2f} after {last['step']} supervised "
            "steps"
        )
        policy, params = starts.adapted(policy._replace(mesh=mesh), params, of.model)
    params = meshes.spread(mesh, params)
    size, trained = (_size(state) for state in (params, lora.split(params)[0]))
    adapters = f", {trained:,} of them in adapters, which are trained" if trained < size else ""
    held = in_words(meshes.bytes_held(params))
    say(f"Start: {size:,} parameters{adapters}, {held} on each device, {how}")
    return policy, params


def train(
    config: configs.RunConfig,
    policy: sampling.Policy,
    params: nnx.State,
    directory: pathlib.Path,
    stopping: Callable[[], bool],
    to: loggers.LoggersConfig = loggers.NONE,
) -> tuple[pathlib.Path, list[records.Row]]:
    """One run, with its progress and its loggers; where it is, and its metrics."""
    with (
        _Shown(f"{config.method}, seed {config.seed}", config.training.steps) as shown,
        loggers.Loggers(to, config) as logged,
    ):

        def on_open(run, finished):
            shown.opened(run, finished)
            logged.opened(run, finished)

        def on_row(row):
            shown.row(row)
            logged.send()

        rows = training.train(
            config,
            policy,
            params,
            directory,
            on_open=on_open,
            on_row=on_row,
            on_compiled=shown.compiled,
            stopping=stopping,
        )
    return shown.directory, rows


# header, decimals, and the number to show of a run's rows
_COLUMNS: list[tuple[str, int, Callable[[Sequence[records.Row]], float]]] = [
    ("best\nscore", 3, lambda rows: max(_values(rows, "validation"))),
    ("last\nscore", 3, lambda rows: _values(rows, "validation")[-1]),
    ("step KL\n/ 1e-3", 2, lambda rows: 1e3 * fmean(_values(rows, "step_kl"))),
    ("start KL\n/ 1e-3", 1, lambda rows: 1e3 * _values(rows, "start_kl")[-1]),
    ("last\nentropy", 3, lambda rows: _values(rows, "entropy")[-1]),
    ("update\nnorm", 4, lambda rows: fmean(_values(rows, "update_norm"))),
    ("re-\nmoved", 3, lambda rows: sum(fmean(_values(rows, f)) for f in methods.FRACTIONS)),
    ("seconds\n/ step", 3, lambda rows: median(_values(rows, "seconds"))),
]


def _values(rows: Sequence[records.Row], key: str) -> list[float]:
    return [row[key] for row in rows if key in row]


def summary(results: Mapping[str, list[list[records.Row]]], processes: int = 1) -> table.Table:
    """The table of results: means over the seeds and, below them, their standard deviations.

    Args:
        results: by the name to show, the metrics of runs, one per seed.
        processes: how many runs went on at a time.
    """
    seeds = max(len(runs) for runs in results.values())
    timed = f", timed while {processes} runs went on side by side" if processes > 1 else ""
    shown = table.Table(
        title=f"Results of {seeds} seeds: mean, ± standard deviation" if seeds > 1 else "Results",
        caption="score: mean greedy reward on held-out problems; step KL: mean over the steps of "
        "KL(before ‖ after); start KL: KL(last policy ‖ start); KL and entropy in nats per token; "
        f"update norm, removed fraction: mean; seconds of an update: median{timed}",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    shown.add_column("method", min_width=12)
    for header, *_ in _COLUMNS:
        shown.add_column(header, justify="right")
    for name, runs in results.items():
        cells = []
        for _, decimals, number in _COLUMNS:
            numbers = [number(rows) for rows in runs]
            spread = f"\n±{stdev(numbers):.{decimals}f}" if len(numbers) > 1 else ""
            cells.append(f"{fmean(numbers):.{decimals}f}{spread}" if numbers else "")
        shown.add_row(name, *cells)
    return shown
