"""What the benchmarks' commands show on the terminal: progress, and where the results are."""

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import console, progress

from benchmarks import measure

terminal = console.Console()


def measure_shown(
    steps: Mapping[str, Callable[..., Any]],
    arguments: Sequence[Any],
    *,
    rounds: int,
    seed: int,
    title: str = "",
) -> dict[str, measure.Measurement]:
    """`measure.measure` with its progress on the terminal, after `title`."""
    columns = (
        progress.TextColumn("{task.description:<44}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(
        *columns, console=terminal, transient=True, disable=not terminal.is_terminal
    ) as shown:
        task = shown.add_task("", total=len(steps) * (2 + rounds))

        def show(doing: str) -> None:
            shown.update(task, advance=1, description=" ".join(filter(None, (title, doing))))

        return measure.measure(steps, arguments, rounds=rounds, seed=seed, show=show)


def say_where(results: pathlib.Path, figure: pathlib.Path, began: float) -> None:
    """Says where a command's results are, and how long it took since `began`."""
    terminal.print(
        f"Settings, environment, all times: {results}\n"
        f"Figure: {figure}\n"
        f"Done in {(time.monotonic() - began) / 60:.1f} minutes.",
        highlight=False,
    )
