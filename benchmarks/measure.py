"""Compiles steps one by one, runs them in interleaved rounds, and sums up what was measured.

A machine's speed drifts by more than the methods differ. So every round runs each step once, in a
random order, and a step is compared with the baseline of the same round: what is reported is the
median and the quartiles of these ratios, or differences, over the rounds. The first round warms up
and is dropped.
"""

import dataclasses
import json
import pathlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import console, progress

terminal = console.Console()

_MEMORY = ("temp", "output", "argument", "alias", "generated_code")


@dataclasses.dataclass
class Measurement:
    """What compiling and running one step took.

    Attributes:
        trace_seconds: tracing and lowering, with all of JAX's caches cleared.
        compile_seconds: XLA's compilation.
        memory: bytes by kind, as the compiler counts them: "temp", "output", "argument", "alias",
            "generated_code", and "peak" where it says so; "device_peak", the most bytes the device
            had in use until the step's first run, where it counts them. Steps warm up in the order
            of their temporary memory, so that this is the step's own.
        seconds: of each round's run.
        error: why there are no numbers, or no seconds.
    """

    trace_seconds: float = float("nan")
    compile_seconds: float = float("nan")
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: list[float] = dataclasses.field(default_factory=list)
    error: str | None = None


class Quartiles(NamedTuple):
    """Median and quartiles."""

    median: float
    lower: float
    upper: float


def save(file: pathlib.Path, command: Any, environment: Mapping[str, Any], **results: Any) -> None:
    """Writes a benchmark's settings, its environment and its results as JSON."""
    content = {"command": dataclasses.asdict(command), "environment": environment, **results}
    file.write_text(json.dumps(content, indent=2, default=str) + "\n")


def say_where(results: pathlib.Path, figure: pathlib.Path, began: float) -> None:
    """Says where a command's results are, and how long it took since `began`."""
    terminal.print(
        f"Settings, environment, all times: {results}\n"
        f"Figure: {figure}\n"
        f"Done in {(time.monotonic() - began) / 60:.1f} minutes.",
        highlight=False,
    )


def quartiles(values: Sequence[float] | np.ndarray) -> Quartiles:
    """Of at least one value."""
    lower, median, upper = np.quantile(np.asarray(values), [0.25, 0.5, 0.75]).tolist()
    return Quartiles(median, lower, upper)


def fastest(measured: Mapping[str, Measurement], names: Sequence[str]) -> str:
    """The name with the least median seconds.

    Raises:
        RuntimeError: none of them ran.
    """
    ran = {name: measured[name] for name in names if name in measured and measured[name].seconds}
    if not ran:
        errors = [f"{name}: {measured[name].error}" for name in names if name in measured]
        raise RuntimeError(f"no baseline ran: {'; '.join(errors)}")
    return min(ran, key=lambda name: quartiles(ran[name].seconds).median)


def ratios(of: Measurement, to: Measurement) -> np.ndarray:
    """(rounds,) seconds relative to those of the same round."""
    return np.asarray(of.seconds) / np.asarray(to.seconds)


def extra_seconds(of: Measurement, to: Measurement) -> np.ndarray:
    """(rounds,) seconds beyond those of the same round."""
    return np.asarray(of.seconds) - np.asarray(to.seconds)


def _bytes(compiled: Any) -> dict[str, int]:
    analysis = compiled.memory_analysis()
    found = {kind: getattr(analysis, f"{kind}_size_in_bytes", None) for kind in _MEMORY}
    found["peak"] = getattr(analysis, "peak_memory_in_bytes", None)
    return {kind: size for kind, size in found.items() if size is not None}


def _compile(step: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, Measurement]:
    jax.clear_caches()
    began = time.perf_counter()
    lowered = jax.jit(step).lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    return compiled, Measurement(traced - began, done - traced, _bytes(compiled))


def _run(compiled: Any, arguments: Sequence[Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - began


def measure(
    steps: Mapping[str, Callable[..., Any]],
    arguments: Sequence[Any],
    *,
    rounds: int,
    seed: int,
    title: str = "",
) -> dict[str, Measurement]:
    """Compiles and times every step on the same arguments, showing the progress.

    Args:
        steps: functions to be jitted, by name.
        arguments: of each of them.
        rounds: timed runs of each step.
        seed: of the order within the rounds.
        title: shown with the progress.

    Returns:
        A measurement for each name. A step that XLA cannot compile or run, out of memory for one,
        has an `error` instead of seconds.
    """
    columns = (
        progress.TextColumn("{task.description:<44}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    )
    measured: dict[str, Measurement] = {}
    programs: dict[str, Any] = {}
    jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(()))())  # starts the backend
    with progress.Progress(
        *columns, console=terminal, transient=True, disable=not terminal.is_terminal
    ) as shown:
        task = shown.add_task("", total=len(steps) * (2 + rounds))

        def show(doing: str, name: str) -> None:
            shown.update(task, description=" ".join(filter(None, (title, doing, name))))

        def give_up(name: str, error: Exception) -> None:
            measured.setdefault(name, Measurement()).error = str(error).splitlines()[0]
            measured[name].seconds.clear()
            programs.pop(name, None)

        for name, step in steps.items():
            show("compile", name)
            try:
                programs[name], measured[name] = _compile(step, arguments)
            except jax.errors.JaxRuntimeError as error:
                give_up(name, error)
            shown.advance(task)
        for name in sorted(programs, key=lambda name: measured[name].memory.get("temp", 0)):
            show("warm up", name)
            try:
                _run(programs[name], arguments)
            except jax.errors.JaxRuntimeError as error:
                give_up(name, error)
                continue
            finally:
                shown.advance(task)
            statistics = jax.devices()[0].memory_stats() or {}
            if "peak_bytes_in_use" in statistics:
                measured[name].memory["device_peak"] = statistics["peak_bytes_in_use"]
        shuffled = random.Random(seed)
        for number in range(1, rounds + 1):
            for name in shuffled.sample(sorted(programs), len(programs)):
                show(f"round {number}", name)
                measured[name].seconds.append(_run(programs[name], arguments))
                shown.advance(task)
    return measured
