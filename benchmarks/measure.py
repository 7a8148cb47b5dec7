"""Compiles steps one by one, runs them in interleaved rounds, and sums up what was measured.

A machine's speed drifts by more than the methods differ. So every round runs each step once, in a
random order, and a step is compared with the baseline of the same round: what is reported is the
median and the quartiles of these ratios, or differences, over the rounds. The first round warms up
and is dropped.

Only jax, optax and NumPy are needed: what is shown on the terminal is in `screen`.
"""

import dataclasses
import json
import pathlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

_MEMORY = ("temp", "output", "argument", "alias", "generated_code")


@dataclasses.dataclass
class Measurement:
    """What compiling and running one step took.

    Attributes:
        trace_seconds: tracing and lowering, with all of JAX's caches cleared.
        compile_seconds: XLA's compilation.
        memory: bytes by kind, as the compiler counts them: "temp", "output", "argument", "alias",
            "generated_code", and "peak" where it says so. Where the device counts, also
            "device_peak", the most bytes that it ever had in use when the step had run once, and
            "device_peak_before" it ran. Where these are equal, the step's own peak is at most that.
            Steps warm up in the order of their temporary memory, so that they seldom are.
        norm: of the first run's result, taken as one vector.
        seconds: of each round's run.
        error: why there are no numbers, or no seconds.
    """

    trace_seconds: float = float("nan")
    compile_seconds: float = float("nan")
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    norm: float = float("nan")
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


def _device_peak() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


@jax.jit
def _norm(result: Any) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), result))


def _warm_up(compiled: Any, arguments: Sequence[Any], measurement: Measurement) -> None:
    before = _device_peak()
    result = jax.block_until_ready(compiled(*arguments))
    after = _device_peak()
    if before is not None and after is not None:
        measurement.memory |= {"device_peak_before": before, "device_peak": after}
    measurement.norm = float(_norm(result))


def measure(
    steps: Mapping[str, Callable[..., Any]],
    arguments: Sequence[Any],
    *,
    rounds: int,
    seed: int,
    stop_after: float = float("inf"),
    show: Callable[[str], None] = lambda doing: None,
) -> dict[str, Measurement]:
    """Compiles and times every step on the same arguments.

    Args:
        steps: functions to be jitted, by name.
        arguments: of each of them.
        rounds: timed runs of each step.
        seed: of the order within the rounds.
        stop_after: no second or later round begins when this many seconds have passed.
        show: told what is done next, before each step's compilation, first run and timed runs.

    Returns:
        A measurement for each name. A step that XLA cannot compile or run, out of memory for one,
        has an `error` instead of seconds.
    """
    began = time.monotonic()
    measured: dict[str, Measurement] = {}
    programs: dict[str, Any] = {}
    jax.block_until_ready(jax.jit(lambda: jnp.zeros(()))())  # starts the backend

    def give_up(name: str, error: Exception) -> None:
        measured.setdefault(name, Measurement()).error = str(error).splitlines()[0]
        measured[name].seconds.clear()
        programs.pop(name, None)

    for name, step in steps.items():
        show(f"compile {name}")
        try:
            programs[name], measured[name] = _compile(step, arguments)
        except jax.errors.JaxRuntimeError as error:
            give_up(name, error)
    for name in sorted(programs, key=lambda name: measured[name].memory.get("temp", 0)):
        show(f"warm up {name}")
        try:
            _warm_up(programs[name], arguments, measured[name])
        except jax.errors.JaxRuntimeError as error:
            give_up(name, error)
    shuffled = random.Random(seed)
    for number in range(1, rounds + 1):
        if number > 1 and time.monotonic() - began > stop_after:
            break
        for name in shuffled.sample(sorted(programs), len(programs)):
            show(f"round {number} {name}")
            measured[name].seconds.append(_run(programs[name], arguments))
    return measured
