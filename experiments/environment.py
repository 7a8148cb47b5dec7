"""What a run's results may depend on, as JSON beside them: its settings, and where it ran."""

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import jax

from experiments import files

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


def current() -> dict[str, Any]:
    """Where a process runs, and what it runs."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processes": jax.process_count(),
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "versions": {package: _version(package) for package in _PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_status": _git("status", "--porcelain"),
    }


def plain(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def describe(directory: pathlib.Path, settings: Any) -> None:
    """Writes config.json and environment.json into a directory."""
    files.replace(directory / "config.json", json.dumps(plain(settings), indent=2) + "\n")
    files.replace(directory / "environment.json", json.dumps([current()], indent=2) + "\n")
