"""`python -m benchmarks.gpu_machine`: what device and which versions the results are from."""

import importlib.metadata
import platform
import subprocess

import jax

from benchmarks import gpu_rows

_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "optax", "flax", "numpy", "torch", "triton")
_CARD = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm", "--format=csv")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> None:
    """Prints one row."""
    (device, *_) = jax.devices()
    gpu_rows.emit(
        {
            "device": f"{device.platform}: {device.device_kind}",
            "device_memory": (device.memory_stats() or {}).get("bytes_limit"),
            "card": _output(*_CARD),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": {package: _version(package) for package in _PACKAGES},
            "git_commit": _output("git", "rev-parse", "HEAD"),
        }
    )


if __name__ == "__main__":
    main()
