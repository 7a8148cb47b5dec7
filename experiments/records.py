"""A run's directory: its config, environment, metrics and checkpoint, safe to interrupt and resume.

config.json       the settings; a directory never mixes two
environment.json  one entry for each process that worked on the run
metrics.jsonl     one row per optimizer step, none lost or doubled by an interruption
checkpoints/      the latest state (orbax), in a folder named after its step
lock              held by the one process that may work on the run; another waits for it

A checkpoint holds what the next step needs and nothing else can give: the warm start's
(`warm_start.State`) the parameters, the optimizer's state and the last validation accuracy; a
run's (`training.State`) the parameters, the optimizer's state with what a method adds to it (a
running gradient, a PRNG key, the version of its format), the cumulative KL, and the rollouts of the
batch in progress. Prompts, sampling keys, shuffles, rewards and advantages follow from these, the
settings and the step.

It is written beside the one before, synced to the disk with the metrics so far, put in place by a
rename, and only then is the one before deleted: whatever ends a process, a whole checkpoint and all
rows up to its step are there. `Run.restore` goes on from it; `Run.begin` drops the later rows,
whose steps are done again.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, Self, TextIO, TypeVar

import jax
import orbax.checkpoint as ocp

import proma_jax as proma

Row = Mapping[str, float]
State = TypeVar("State")

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "proma_jax")


class Failure(Exception):
    """What a user can mend: its message, of one or two lines, says what is wrong and what to do."""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    source = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=source, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    """What results may depend on beyond the settings."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "versions": {package: _version(package) for package in _PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_status": _git("status", "--porcelain"),
    }


def read_metrics(directory: pathlib.Path) -> list[Row]:
    """The rows of a run's metrics; a last line cut off by an interruption is left out."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _replace(path: pathlib.Path, text: str) -> None:
    """Writes a whole file, or, if interrupted, nothing."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line
            for key in keys
            for line in _differences(old.get(key), new.get(key), f"{name}.{key}".strip("."))
        ]
    return [] if old == new else [f"{name}: {old} there, {new} now"]


@contextlib.contextmanager
def _writing(directory: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failure(
            f"{directory} cannot be written: {error}. Make it writable or choose another directory."
        ) from error


def check_writable(*directories: pathlib.Path) -> None:
    """Makes sure, without leaving a trace, that files can be made in directories yet to be made.

    Raises:
        Failure: one cannot be made or written.
    """
    for directory in directories:
        with _writing(directory):
            here = directory.absolute()
            existing = next(path for path in (here, *here.parents) if path.exists())
            tempfile.TemporaryFile(dir=existing).close()


def _try_lock(file: TextIO) -> bool:
    """Locks a file, unless another process has; says whether it did."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _alone(directory: pathlib.Path, stopping: Callable[[], bool]) -> Iterator[None]:
    """Waits until no other process is in here; one that is killed leaves as well."""
    with (directory / "lock").open("w") as file:
        if not _try_lock(file):
            logging.getLogger(__name__).warning(
                "%s: waiting for another process that works on it", directory
            )
            while not _try_lock(file):
                if stopping():
                    raise Preempted(f"Preempted while another process worked on {directory}.")
                time.sleep(0.1)
        yield


class Preempted(Exception):
    """A run stopped because it was asked to, with all it did saved."""


class Run:
    """One run's directory, opened to start the run or to go on with it, by one process at a time.

    Args:
        directory: made if it is not there.
        config: the run's settings, a dataclass of plain values.
        stopping: called while another process works on the run; True ends the waiting.

    Raises:
        Preempted: `stopping` said so.
        Failure: the directory holds a run with other settings, or cannot be written.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        config: Any,
        stopping: Callable[[], bool] = lambda: False,
    ):
        self.directory = directory.absolute()
        settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        path = self.directory / "config.json"
        with contextlib.ExitStack() as opened, _writing(directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            opened.enter_context(_alone(self.directory, stopping))
            if not path.exists():
                _replace(path, json.dumps(settings, indent=2) + "\n")
            differences = _differences(json.loads(path.read_text()), settings)
            if differences:
                raise Failure(
                    f"{directory} holds a run with other settings ({'; '.join(differences)}). "
                    "Choose another directory, or delete this one."
                )
            self._manager = ocp.CheckpointManager(
                self.directory / "checkpoints",
                item_handlers=ocp.StandardCheckpointHandler(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=1,
                    cleanup_tmp_directories=True,
                    async_options=ocp.options.AsyncOptions(post_finalization_callback=os.sync),
                ),
            )
            opened.callback(self._manager.close)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self._opened.close()

    @property
    def step(self) -> int | None:
        """The step of the checkpoint, None if there is none yet."""
        return self._manager.latest_step()

    def restore(self, state: State) -> State:
        """The checkpointed state, or `state` if there is none.

        Args:
            state: the state to start from; also says the structure, dtypes and shardings.

        Raises:
            Failure: the checkpoint does not fit `state`.
        """
        step = self.step
        if step is None:
            return state
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        try:
            proma.check_restorable(self._manager.item_metadata(step).tree, state)
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(target))
            proma.check_restorable(restored, state)
        except ValueError as error:
            raise Failure(
                f"{self.directory / 'checkpoints' / str(step)} cannot be restored: {error}. Start "
                "in another directory, or go on with the git_commit that "
                f"{self.directory / 'environment.json'} names."
            ) from error
        return restored

    def begin(self, state: Any) -> None:
        """Makes ready to work on the run: records the environment, drops metrics of later steps.

        Args:
            state: what checkpoints will hold.

        Raises:
            Failure: the directory cannot be written, or has no room for the checkpoints.
        """
        step = self.step
        copies = 2 if step is None else 1  # an old and a new checkpoint exist at a time
        needed = copies * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise Failure(
                f"{self.directory} has no room for checkpoints: {needed:,} bytes needed, {free:,} "
                "free. Free some space or choose another directory."
            )
        path = self.directory / "environment.json"
        earlier = json.loads(path.read_text()) if path.exists() else []
        kept = [
            json.dumps(row) + "\n"
            for row in read_metrics(self.directory)
            if step is not None and row["step"] <= step
        ]
        with _writing(self.directory):
            _replace(path, json.dumps([*earlier, environment()], indent=2) + "\n")
            _replace(self.directory / "metrics.jsonl", "".join(kept))

    def log(self, row: Row) -> None:
        """Appends a row, which has a "step", to the metrics."""
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, step: int, state: Any) -> None:
        """Checkpoints the state after `step` in the background, unless that was done already.

        An error in the background is raised by the next `save`, or when the run is closed.
        """
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def stop(self, step: int, state: Any) -> NoReturn:
        """Checkpoints the state after `step` and ends the run's work for now."""
        self.save(step, state)
        raise Preempted(
            f"Preempted after step {step}, checkpoint in {self.directory / 'checkpoints'}. "
            "The same command goes on from there."
        )
