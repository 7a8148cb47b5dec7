"""Runs worked on side by side, by processes that are started anew, so that no two share a JAX.

Each is an ordinary run in a folder of its own, which `training.train` goes on with or, if it is
finished, takes as it is: that is all there is to resuming. The processes end with the one that
started them, however that ends. They share the CPU's cores evenly, and keep compiled programs for
each other, in `programs` of the folder that the runs are in. One compiles while a warm start is
trained.
"""

import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import pathlib
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from multiprocessing import forkserver, sharedctypes, synchronize
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
from flax import nnx

from experiments import (
    files,
    loggers,
    records,
    report,
    sampling,
    starts,
    training,
    warm_start,
)
from experiments.configs import RunConfig

Result = TypeVar("Result")
_CONTEXT = multiprocessing.get_context("forkserver")


class Command(report.Settings, Protocol):
    """What runs have in common: the settings of their start, and where things go."""

    @property
    def processes(self) -> int: ...
    @property
    def directory(self) -> pathlib.Path: ...
    @property
    def start_directory(self) -> pathlib.Path: ...
    def __hash__(self) -> int: ...


class Cell(NamedTuple):
    """One run, what to call it, and the loggers that its metrics go to."""

    name: str
    directory: pathlib.Path
    config: RunConfig
    to: loggers.LoggersConfig = loggers.NONE


class Outcome(NamedTuple):
    """What a process says of a cell.

    Attributes:
        directory: where the run is.
        seconds: that this process worked on it; 0 if it was complete already.
        not_finite: why the run ended before its last step, if it did.
    """

    directory: pathlib.Path
    seconds: float
    not_finite: records.NotFinite | None


def prepare(command: Command) -> None:
    """Has the processes' imports done while this one makes the start, and its programs kept."""
    forkserver.set_forkserver_preload(["experiments.plot", "experiments.training"])
    forkserver.ensure_running()
    _keep_programs(command)


def outcomes(
    command: Command,
    cells: list[Cell],
    start: Callable[[Callable[[], None]], object],
    stopping: Callable[[], bool],
) -> Iterator[tuple[Cell, Outcome]]:
    """Each cell when it is done, worked on by processes that are asked to stop if this one is.

    Args:
        command: what the cells have in common, and how many are worked on at a time.
        cells: taken from its beginning. More may be added after any outcome.
        start: makes what they start from, in this process. If that takes training, it first calls
            what it is given, and a process compiles what the first cell needs meanwhile.
        stopping: True stops the work.

    Raises:
        files.Failure: a cell cannot be worked on; or a process ended by itself.
        records.Preempted: `stopping` said so; what was done is saved.
    """
    stop, is_started, begun = _CONTEXT.Event(), _CONTEXT.Event(), _CONTEXT.Value("i", 0)
    arguments = command, stop, is_started, begun
    done = 0
    work: dict[futures.Future[Outcome], Cell] = {}
    with futures.ProcessPoolExecutor(command.processes, _CONTEXT, _begin, arguments) as pool:

        def submit():
            cell = cells.pop(0)
            work[pool.submit(_run, command, cell)] = cell

        try:
            start(submit)
            is_started.set()
            while cells or work:
                while cells and len(work) < command.processes:
                    submit()
                ended, _ = futures.wait(work, 0.2, futures.FIRST_COMPLETED)
                if stopping():
                    raise records.Preempted(
                        f"Preempted with {done} runs complete. The same command goes on from there."
                    )
                for future in ended:
                    done += 1
                    yield work.pop(future), future.result()
        except futures.BrokenExecutor as error:
            raise files.Failure(
                "A process was killed, perhaps since memory ran out. The same command goes on from "
                "the checkpoints; --processes says how many runs go on at a time."
            ) from error
        finally:
            stop.set()
            is_started.set()  # one may be waiting for it
            pool.shutdown(cancel_futures=True)


def each(command: Command, work: Callable[..., Result], *items: Iterable[Any]) -> list[Result]:
    """What `map` gives, of a function that the processes call side by side."""
    with futures.ProcessPoolExecutor(command.processes, _CONTEXT, _serve) as pool:
        return list(pool.map(work, *items))


_stop: synchronize.Event
_is_started: synchronize.Event


def _begin(
    command: Command,
    stop: synchronize.Event,
    is_started: synchronize.Event,
    begun: "sharedctypes.Synchronized[int]",
) -> None:
    """Makes a process ready to work on cells, and adds it to those that have begun."""
    global _stop, _is_started
    _stop, _is_started = stop, is_started
    with begun.get_lock():
        _keep_to_share(begun.value, command.processes)
        begun.value += 1
    _serve()
    report.terminal.quiet = True
    logging.disable()
    # A program that another process is just writing into the cache is compiled here as well.
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
    _keep_programs(command)


def _serve() -> None:
    """Has this process end with the one that started it, which alone says when to stop."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _keep_to_share(number: int, count: int) -> None:
    """Has this process use its share of the CPU's cores alone, where the system allows that.

    JAX then starts no more threads than there are cores for, which would wait for each other.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) >= count:
            os.sched_setaffinity(0, cores[number::count])


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _keep_programs(command: Command) -> None:
    """Has this process keep what it compiles, unless the user says where that goes."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        programs = command.directory.absolute() / "programs"
        jax.config.update("jax_compilation_cache_dir", str(programs))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@functools.cache
def _start(command: Command) -> tuple[sampling.Policy, nnx.State]:
    """What all cells start from, read once by each process."""
    return report.start(command, command.start_directory, _stop.is_set)


def _run(command: Command, cell: Cell) -> Outcome:
    """Works on a cell until its run is finished or has numbers that are not finite."""
    if not _is_started.is_set():
        _compile(cell.config)
    _is_started.wait()
    if _stop.is_set():
        raise records.Preempted
    began = time.monotonic()
    policy, params = _start(command)
    opened: list[tuple[pathlib.Path, bool]] = []
    not_finite = None
    with loggers.Loggers(cell.to, cell.config) as logged:

        def on_open(run, finished):
            opened.append((run.directory, finished))
            logged.opened(run, finished)

        try:
            training.train(
                cell.config,
                policy,
                params,
                cell.directory,
                on_open=on_open,
                on_row=lambda row: logged.send(),
                stopping=_stop.is_set,
            )
        except records.NotFinite as error:
            not_finite = error
    [(directory, is_finished)] = opened
    return Outcome(directory, 0.0 if is_finished else time.monotonic() - began, not_finite)


def _compile(config: RunConfig) -> None:
    """Compiles what a run needs, by its first batch from a decoder that is not trained."""
    settings = dataclasses.replace(config.training, steps=config.training.steps_per_batch)
    first = dataclasses.replace(config, training=settings)
    untrained = warm_start.StartConfig(config.task, config.start).untrained()
    policy, params = starts.adapted(*untrained, config.model)
    stopped = contextlib.suppress(files.Failure, records.Preempted)  # the run itself tells of it
    with stopped, tempfile.TemporaryDirectory() as folder:
        training.train(first, policy, params, pathlib.Path(folder), stopping=_stop.is_set)
