"""A run's directory: its config, environment, metrics and checkpoint, safe to interrupt and resume.

config.json       the settings; a directory never mixes two
environment.json  one entry for each process that worked on the run
metrics.jsonl     one row per optimizer step, none lost or doubled by an interruption
checkpoints/      the latest state (orbax)
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, Self, TypeVar

import jax
import orbax.checkpoint as ocp

Row = Mapping[str, float]
State = TypeVar("State")

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "proma_jax")


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


class Run:
    """One run's directory, opened to start the run or to go on with it.

    Args:
        directory: made if it is not there.
        config: the run's settings, a dataclass of plain values.

    Raises:
        ValueError: the directory holds a run with other settings.
    """

    def __init__(self, directory: pathlib.Path, config: Any):
        self.directory = directory.absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        path = self.directory / "config.json"
        if path.exists():
            differences = _differences(json.loads(path.read_text()), settings)
            if differences:
                raise ValueError(
                    f"{directory} holds a run with other settings ({'; '.join(differences)}). "
                    "Choose another directory, or delete this one."
                )
        else:
            _replace(path, json.dumps(settings, indent=2) + "\n")
        self._manager = ocp.CheckpointManager(
            self.directory / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=1)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self._manager.close()

    @property
    def step(self) -> int | None:
        """The step of the checkpoint, None if there is none yet."""
        return self._manager.latest_step()

    def restore(self, state: State) -> State:
        """The checkpointed state, or `state` if there is none; drops metrics of later steps.

        Args:
            state: the state to start from; also says the structure, dtypes and shardings.
        """
        step = self.step
        kept = [
            json.dumps(row) + "\n"
            for row in read_metrics(self.directory)
            if step is not None and row["step"] <= step
        ]
        _replace(self.directory / "metrics.jsonl", "".join(kept))
        if step is None:
            return state
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return self._manager.restore(step, args=ocp.args.StandardRestore(target))

    def begin(self) -> None:
        """Records the environment of a process that is about to work on the run."""
        path = self.directory / "environment.json"
        earlier = json.loads(path.read_text()) if path.exists() else []
        _replace(path, json.dumps([*earlier, environment()], indent=2) + "\n")

    def log(self, row: Row) -> None:
        """Appends a row, which has a "step", to the metrics."""
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, step: int, state: Any) -> None:
        """Checkpoints the state after `step`, in the background."""
        self._manager.save(step, args=ocp.args.StandardSave(state))
