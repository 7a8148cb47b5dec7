"""A run's directory: its config, environment, metrics and checkpoint, safe to interrupt and resume.

config.json       the settings; a directory never mixes two, and a run with others goes beside it
environment.json  one entry for each process that worked on the run
metrics.jsonl     one row per optimizer step, none lost or doubled by an interruption; strict JSON,
                  with null for a number that is not finite, which ends the run
checkpoints/      the latest state (orbax), in a folder named after its step
tensorboard/, wandb/, wandb_id
                  the rows once more, if they are asked for there (`loggers`)
lock              held by the one process that may work on the run; another waits for it

Of several processes that work on the run together (`processes`) the first reads and writes all of
this but the checkpoints.

A checkpoint holds what the next step needs and nothing else can give: the warm start's
(`warm_start.State`) the parameters, the optimizer's state and the last validation accuracy; a
run's (`training.State`) the parameters, the optimizer's state with what a method adds to it (a
running gradient, a PRNG key, the version of its format), the cumulative KL, and the rollouts of the
batch in progress. Prompts, sampling keys, shuffles, rewards and advantages follow from these, the
settings and the step.

It is written beside the one before, synced to the disk with the metrics so far, put in place by a
rename, and only then is the one before deleted: whatever ends a process, a whole checkpoint and all
rows up to its step are there. `Run.restore` goes on from it; `Run.begin` drops the later rows,
whose steps are done again. A checkpoint knows how many rows there were, so that a file that was
damaged or shortened since is seen, and named.
"""

import contextlib
import json
import math
import os
import pathlib
import shutil
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

import proma_jax as proma
from experiments import environment, files, processes

Row = Mapping[str, float]
State = TypeVar("State")


class OtherSettings(files.Failure):
    """A directory holds a run with other settings."""


class NotFinite(files.Failure):
    """A run gave numbers that are not finite, and ended there."""


def read_metrics(directory: pathlib.Path) -> list[Row]:
    """The rows of a run's metrics; a last line cut off by an interruption is left out.

    Raises:
        files.Failure: another line is no row.
    """
    path = directory / "metrics.jsonl"
    with files.using(directory):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n"):
            cure = "Delete that line and those after it, or put back a copy of the file."
            rows.append(files.parse(line, dict, f"{path}, line {number},", cure, keys=["step"]))
    return rows


def _line(row: Row) -> str:
    finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def differences(old: Any, new: Any, grows: Collection[str] = (), name: str = "") -> list[str]:
    """How settings differ, but for those named in `grows` where the new goes on from the old."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), grows, f"{name}.{key}".strip("."))
        ]
    if name in grows and type(old) is type(new):
        new_part = new[: len(old)] if isinstance(new, list) else min(old, new)
    else:
        new_part = new
    if old == new_part:
        return []
    there, now = (textwrap.shorten(str(value), 40) for value in (old, new))
    return [f"{name}: {there} there, {now} now"]


@contextlib.contextmanager
def _reading(checkpoint: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # orbax documents none, and raises many
        raise files.Failure(
            f"{checkpoint} is damaged, or of another version of orbax or this program ("
            f"{textwrap.shorten(str(error), 100)}). Put back a copy of it, or delete it: the run "
            "goes on from the checkpoint before it or, if there is none, begins anew."
        ) from error


def _read_through(checkpoint: pathlib.Path) -> None:
    """Reads a checkpoint's arrays one by one; a Failure if one is damaged.

    orbax reads them side by side, and where it finds damage its threads print tracebacks.
    """
    folder = {"driver": "file", "path": f"{checkpoint}/default/"}
    with _reading(checkpoint):
        arrays = tensorstore.KvStore.open({"driver": "ocdbt", "base": folder}).result()
        for name in arrays.list().result():
            arrays.read(name).result()


@contextlib.contextmanager
def _saving(checkpoints: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())[-150:]  # orbax says it last
        raise files.Failure(
            f"{checkpoints} cannot be written: {cause}. Make room for it; the same command goes on "
            "from the last checkpoint there."
        ) from error


@jax.jit
def _are_finite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays])


class Preempted(Exception):
    """A run stopped because it was asked to, with all it did saved."""


class Run:
    """One run's directory, opened to start the run or to go on with it, by one process at a time.

    Args:
        directory: made if it is not there.
        config: the run's settings, a dataclass of plain values.
        stopping: called while another process works on the run; True ends the waiting.
        grows: settings that may be larger than when the run was last worked on, named like
            "training.steps"; of a list, what was there then is the beginning.

    Raises:
        Preempted: `stopping` said so.
        OtherSettings: the directory holds a run with other settings.
        files.Failure: the directory is damaged, or cannot be used.

    Attributes:
        directory: where it is, absolute.
        passed: what was in the directories that `beside` passed by.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        config: Any,
        stopping: Callable[[], bool] = lambda: False,
        grows: Collection[str] = (),
    ):
        self.directory = directory.absolute()
        self.passed: list[str] = []
        self._checkpoints = self.directory / "checkpoints"
        self._config = self.directory / "config.json"
        self._row_count = 0
        self._settings = environment.plain(config)
        self._grows = grows

        def while_waiting():
            self._check_settings()
            if stopping():
                raise Preempted(f"Preempted while another process worked on {self.directory}.")

        opened = contextlib.ExitStack()

        def enter():
            self.directory.mkdir(parents=True, exist_ok=True)
            opened.enter_context(files.alone(self.directory, while_waiting))
            if self._is_begun():
                self._check_settings()
            self._checkpoints.mkdir(exist_ok=True)

        with opened, files.using(directory):
            processes.by_first(enter)
            self._manager = ocp.CheckpointManager(
                self._checkpoints,
                item_handlers=ocp.StandardCheckpointHandler(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=1,
                    cleanup_tmp_directories=True,
                    async_options=ocp.options.AsyncOptions(post_finalization_callback=os.sync),
                ),
            )
            opened.callback(self._manager.close)
            if self.step is not None:
                checkpoint = self._checkpoints / str(self.step)
                processes.by_first(lambda: _read_through(checkpoint))
            self._opened = opened.pop_all()

    @classmethod
    def beside(cls, directory: pathlib.Path, *arguments: Any, **settings: Any) -> Self:
        """The run in a directory or, if a run with other settings is there, beside it.

        That is in the first of <directory>-2, <directory>-3 and so on that is free or holds a run
        with these settings. The arguments are those of the class.
        """
        first = directory.absolute()
        candidate, passed = first, []
        while True:
            try:
                run = cls(candidate, *arguments, **settings)
            except OtherSettings as other:
                passed.append(str(other))
                candidate = first.with_name(f"{first.name}-{len(passed) + 1}")
            else:
                run.passed = passed
                return run

    def _is_begun(self) -> bool:
        """Whether there is more here than what a start that failed leaves."""
        has_checkpoint = any(path.name.isdigit() for path in self._checkpoints.glob("*"))
        return has_checkpoint or any(row["step"] > 0 for row in read_metrics(self.directory))

    def _check_settings(self) -> None:
        if not (self._config.exists() or self._is_begun()):
            return
        cure = "Put back a copy of it, or choose another directory."
        content = self._config.read_bytes() if self._config.exists() else b""
        old = files.parse(content, dict, str(self._config), cure)
        found = differences(old, self._settings, self._grows)
        if found:
            raise OtherSettings(
                f"{self.directory} holds a run with other settings ({'; '.join(found)})."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        with _saving(self._checkpoints):
            self._opened.close()

    @property
    def step(self) -> int | None:
        """The step of the checkpoint, None if there is none yet."""
        return self._manager.latest_step()

    def restore(self, state: State) -> State:
        """The checkpointed state, or `state` if there is none.

        A restored array is committed to its devices, and a new one is not: for a mixture of both
        `jax.jit` would compile once, and again for its own results, which are all committed.

        Args:
            state: the state to start from; also says the structure, the dtypes and on which devices
                each array goes: those that it is committed to, by default the first.

        Raises:
            files.Failure: the checkpoint is damaged or does not fit `state`.
        """
        step = self.step
        first = jax.devices()[0]
        state = jax.tree.map(
            lambda x: x if getattr(x, "committed", False) else jax.device_put(x, first), state
        )
        if step is None:
            return state
        checkpoint = self._checkpoints / str(step)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)

        def check(saved):
            try:
                proma.check_restorable(saved, state)
            except ValueError as error:
                raise files.Failure(
                    f"{checkpoint} cannot be restored: {error}. Start in another directory, or go "
                    f"on with the git_commit that {self.directory / 'environment.json'} names."
                ) from error

        with _reading(checkpoint):
            described = self._manager.item_metadata(step).tree
        check(described)
        with _reading(checkpoint):
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        check(restored)
        return restored

    def all_rows(self) -> list[Row]:
        """The metrics, as `read_metrics` reads them."""
        return processes.by_first(lambda: read_metrics(self.directory))

    def rows(self) -> list[Row]:
        """The metrics up to the checkpoint.

        Raises:
            files.Failure: they are not all there.
        """
        step = self.step
        if step is None:
            return []
        checkpoint = self._checkpoints / str(step)
        with _reading(checkpoint):
            expected = self._manager.metadata(step).custom_metadata["rows"]
        rows = [row for row in self.all_rows() if row["step"] <= step]
        if len(rows) != expected:
            raise files.Failure(
                f"{self.directory / 'metrics.jsonl'} is damaged: {len(rows)} rows up to step "
                f"{step}, but {expected} when {checkpoint} was saved. Put back a copy of the file, "
                "or choose another directory."
            )
        return rows

    def begin(self, state: Any, rows: Sequence[Row] | None = None) -> None:
        """Makes ready to work on the run: records settings and environment, drops later rows.

        Args:
            state: what checkpoints will hold.
            rows: the metrics up to the checkpoint, by default as they are.

        Raises:
            files.Failure: the directory is damaged, cannot be used, or has no room for the
                checkpoints.
        """
        rows = self.rows() if rows is None else rows
        self._row_count = len(rows)
        processes.by_first(lambda: self._begin(state, rows))

    def _begin(self, state: Any, rows: Sequence[Row]) -> None:
        copies = 2 if self.step is None else 1  # an old and a new checkpoint exist at a time
        needed = copies * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise files.Failure(
                f"{self.directory} has no room for checkpoints: {needed:,} bytes needed, {free:,} "
                "free. Free some space or choose another directory."
            )
        path = self.directory / "environment.json"
        cure = (
            "Put back a copy of it, or delete it: only what it says of earlier processes is lost."
        )
        earlier = files.parse(path.read_bytes(), list, str(path), cure) if path.exists() else []
        with files.using(self.directory):
            files.replace(self._config, json.dumps(self._settings, indent=2) + "\n")
            files.replace(path, json.dumps([*earlier, environment.current()], indent=2) + "\n")
            files.replace(self.directory / "metrics.jsonl", "".join(map(_line, rows)))

    def log(self, row: Row) -> None:
        """Appends a row, which has a "step", to the metrics."""

        def append():
            with files.using(self.directory), (self.directory / "metrics.jsonl").open("a") as file:
                file.write(_line(row))

        processes.by_first(append)
        self._row_count += 1

    def check_finite(self, row: Row, state: Any) -> None:
        """Ends the run if its latest row, or its state after it, has a number that is not finite.

        Raises:
            NotFinite: it has.
        """
        leaves = jax.tree_util.tree_leaves_with_path(state)
        floats = {path: x for path, x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)}
        are_finite = np.asarray(_are_finite(list(floats.values())))
        found = [f"{name} {x}" for name, x in row.items() if not math.isfinite(x)] + [
            jax.tree_util.keystr(path)
            for path, is_finite in zip(floats, are_finite, strict=True)
            if not is_finite
        ]
        if found:
            with _saving(self._checkpoints):
                self._manager.wait_until_finished()
            kept = "no checkpoint yet" if self.step is None else f"checkpoint {self.step} in it"
            raise NotFinite(
                f"Step {row['step']} gave numbers that are not finite: "
                f"{textwrap.shorten(', '.join(found), 100)}. The run in {self.directory} stops "
                f"there, unfinished, with {kept}.\nThe same command stops there again; a run with "
                "other settings, such as a lower learning rate, goes beside it."
            )

    def save(self, step: int, state: Any) -> None:
        """Checkpoints the state after `step` in the background, unless that was done already.

        An error in the background is raised by the next `save`, or when the run is closed.

        Raises:
            files.Failure: a checkpoint could not be written.
        """
        with _saving(self._checkpoints):
            self._manager.save(
                step,
                args=ocp.args.StandardSave(state),
                custom_metadata={"rows": self._row_count},
            )

    def stop(self, step: int, state: Any) -> NoReturn:
        """Checkpoints the state after `step` and ends the run's work for now."""
        self.save(step, state)
        raise Preempted(
            f"Preempted after step {step}, checkpoint in {self._checkpoints}. The same command "
            "goes on from there."
        )
