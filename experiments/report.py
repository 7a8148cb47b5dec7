"""What the commands print: settings, progress, and the table of results."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean, median, stdev

import jax
from flax import nnx
from rich import box, console, progress, table

from experiments import figures, records, training, warm_start

terminal = console.Console()


def settings(config: training.TrainingConfig, start: warm_start.WarmStartConfig) -> None:
    """Prints the settings that the results hang on."""
    method, shape = config.method, start.decoder
    terminal.print(
        f"[bold]Task[/]     addition of numbers of up to {start.task.digits} digits\n"
        f"[bold]Policy[/]   Qwen3-style decoder: {shape.layers} layers, width {shape.width}, "
        f"{shape.heads} query and {shape.kv_heads} key/value heads of {shape.head_dim}, "
        f"feed-forward {shape.hidden}\n"
        f"[bold]Training[/] {config.steps} optimizer steps, {config.steps_per_batch} per rollout "
        f"batch of {config.prompts} prompts x {config.group_size} responses; "
        f"{config.microbatches} microbatches of {config.microbatch_size} sequences per step\n"
        f"[bold]Methods[/]  AdamW, learning rate {method.learning_rate:g}, clipping "
        f"{method.max_gradient_norm:g}; GRPO: clip {method.clip:g}; PROMA: shrinkage "
        f"{method.shrinkage:g}; accumulation: ridge {method.ridge:g}, relative bound "
        f"{method.relative_bound}, skip fraction {method.skip_fraction:g}; intra: rank "
        f"{method.rank}",
        highlight=False,
    )


@contextlib.contextmanager
def bar(name: str, total: int | None) -> Iterator[Callable[[records.Row], None]]:
    """A progress bar over `total` steps, if known; gives the function to call with every row."""
    columns = (
        progress.TextColumn("{task.description:<28}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[latest]}"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=terminal) as shown:
        task = shown.add_task(name, total=total, latest="")
        latest = {}

        def on_row(row: records.Row) -> None:
            latest.update({k: row[k] for k in ("loss", "reward", "validation") if k in row})
            text = "  ".join(f"{key} {value:.2f}" for key, value in latest.items())
            shown.update(task, completed=row["step"], latest=text)

        yield on_row


def start(
    config: warm_start.WarmStartConfig, directory: pathlib.Path, stopping: Callable[[], bool]
) -> tuple[nnx.GraphDef, nnx.State]:
    """The warm start, with a progress bar while it trains."""

    def on_open(run: records.Run, finished: bool) -> None:
        nonlocal directory
        directory = run.directory
        _tell_passed(run)

    with bar("warm start", None) as on_check:
        graphdef, params = warm_start.warm_start(config, directory, on_check, stopping, on_open)
        last = records.read_metrics(directory)[-1]
        on_check(last)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    terminal.print(
        f"Warm start: {size:,} parameters, greedy validation accuracy {last['validation']:.2f} "
        f"after {last['step']} supervised steps, in {directory}",
        highlight=False,
    )
    return graphdef, params


def train(
    config: training.RunConfig,
    graphdef: nnx.GraphDef,
    params: nnx.State,
    directory: pathlib.Path,
    stopping: Callable[[], bool],
) -> tuple[pathlib.Path, list[records.Row]]:
    """One run, with a progress bar; where it is, and its metrics."""

    def on_open(run: records.Run, finished: bool) -> None:
        nonlocal directory
        directory = run.directory
        _tell_passed(run)
        if finished:
            terminal.print(f"  complete already, taken from {directory}", highlight=False)

    with bar(f"{config.method}, seed {config.seed}", config.training.steps) as show:
        rows = training.train(
            config,
            graphdef,
            params,
            directory,
            on_open=on_open,
            on_row=show,
            stopping=stopping,
        )
        show(rows[-1])
    return directory, rows


def _tell_passed(run: records.Run) -> None:
    for passed in run.passed:
        terminal.print(f"{passed} This one is in {run.directory}.", highlight=False)


# header, decimals, and the number to show of a run's rows
_COLUMNS: list[tuple[str, int, Callable[[Sequence[records.Row]], float]]] = [
    ("best\nscore", 3, lambda rows: max(_values(rows, "validation"))),
    ("last\nscore", 3, lambda rows: _values(rows, "validation")[-1]),
    ("step KL\n/ 1e-3", 2, lambda rows: 1e3 * fmean(_values(rows, "step_kl"))),
    ("start KL\n/ 1e-3", 1, lambda rows: 1e3 * _values(rows, "start_kl")[-1]),
    ("last\nentropy", 3, lambda rows: _values(rows, "entropy")[-1]),
    ("update\nnorm", 4, lambda rows: fmean(_values(rows, "update_norm"))),
    ("projec-\nted", 3, lambda rows: fmean(_values(rows, "projected_fraction"))),
    ("seconds\n/ step", 3, lambda rows: median(_values(rows, "seconds"))),
]


def _values(rows: Sequence[records.Row], key: str) -> list[float]:
    return [row[key] for row in rows if key in row]


def summary(results: figures.Results) -> table.Table:
    """The table of results: means over the seeds and, below them, their standard deviations."""
    seeds = max(len(runs) for runs in results.values())
    shown = table.Table(
        title=f"Results of {seeds} seeds: mean, ± standard deviation" if seeds > 1 else "Results",
        caption="score: greedy validation accuracy; step KL: mean over the steps of KL(before ‖ "
        "after); start KL: KL(last policy ‖ start); KL and entropy in nats per token; update norm, "
        "projected fraction: mean; seconds of an update: median",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    shown.add_column("method", min_width=12)
    for header, *_ in _COLUMNS:
        shown.add_column(header, justify="right")
    for method, runs in results.items():
        cells = []
        for _, decimals, number in _COLUMNS:
            numbers = [number(rows) for rows in runs]
            spread = f"\n±{stdev(numbers):.{decimals}f}" if seeds > 1 else ""
            cells.append(f"{fmean(numbers):.{decimals}f}{spread}")
        shown.add_row(figures.LABELS[method], *cells)
    return shown
