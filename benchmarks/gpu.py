"""`benchmarks/gpu.sh`: runs the parts of the GPU benchmark one by one, each in its own time limit.

A part is a process that prints rows (`gpu_rows`). Whatever becomes of it, its rows are kept, the
next part runs, and the table and the exit status say what failed. Nothing but the standard library
is needed here.
"""

import argparse
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import gpu_rows, gpu_table

PARTS = ("device", "smoke", "torch", "compiled", "jax", "rounds")
METHODS = (
    "plain_fused",
    "accumulation_fused",
    "plain_batched",
    "intra_10_fused",
    "both_10_fused",
    "grpo",
    "intra_100_fused",
    "accumulation",
    "intra_10",
)
"""Of `benchmarks.methods`, the most important first."""
TORCH_METHODS = ("torch_plain", "torch_accumulation", "torch_intra_10", "torch_intra_100")
SMOKE_TESTS = (
    "tests/project/test_linalg.py::test_well_conditioned_rows_are_spanned_to_rounding",
    "tests/project/test_linalg.py::test_the_inverse_of_a_triangular_matrix[100]",
    "tests/project/test_linalg.py::test_vmap_and_bfloat16_rows",
    "tests/project/test_span.py::test_exact_solvers_leave_nothing_in_large_leaves",
    "tests/project/test_span.py::test_a_rank_deficient_span_is_that_of_its_distinct_scores",
    "tests/test_accumulation.py::test_earlier_microbatches_keep_nothing_along_the_latest_scores",
    "tests/test_accumulation.py::test_bfloat16_gradients_are_summed_in_float32",
    "tests/test_intra.py::test_projecting_twice_changes_nothing",
    "tests/test_intra.py::test_both_variants_compose",
    "tests/test_fused.py::test_scales_of_scores_do_not_matter",
    "tests/test_fused.py::test_an_unrolled_model_gives_what_its_scanned_twin_gives",
    "tests/test_policy_gradient.py::test_token_logprobs_match_float64",
)
"""What is quick, needs one device, and solves, decomposes or scans on it."""
LIMITS = {"device": 30, "smoke": 70, "torch": 75, "compiled": 80, "jax": 75, "rounds": 120}
"""Seconds at most for each part, of "jax" for each method; `gpu.sh` explains them."""
_AFTER_THE_LAST_PART = 5
_KILL_AFTER = 5
_LAST_ROUND = 30


class Benchmark:
    """Runs parts and keeps what they find.

    Args:
        directory: where the results go, written as each part ends.
        deadline: of `time.monotonic`; what has no time left before it fails.

    Attributes:
        rows: what the parts printed, each with the "part" that did.
        outcomes: a row for each part: "part", "status" (ok, failed or skipped), "seconds", and its
            last words, "said".
    """

    def __init__(self, directory: pathlib.Path, deadline: float):
        directory.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        self.outcomes: list[dict[str, Any]] = []
        self._deadline = deadline
        self._results = directory / "results.jsonl"
        self._log = directory / "log.txt"
        for file in (self._results, self._log):
            file.write_text("")

    def seconds_left(self) -> float:
        """For parts, until the deadline."""
        return self._deadline - time.monotonic() - _AFTER_THE_LAST_PART

    def _end(self, part: str, status: str, seconds: float, said: str) -> None:
        row = {"part": part, "status": status, "seconds": seconds, "said": said}
        self.outcomes.append(row)
        self._keep(row)
        print(f"{part}: {status} after {seconds:.0f} s" + f": {said}" * bool(said), flush=True)

    def _keep(self, row: dict[str, Any]) -> None:
        with self._results.open("a") as file:
            file.write(gpu_rows.line(row) + "\n")

    def run(
        self,
        part: str,
        command: Sequence[str],
        limit: float,
        environment: Mapping[str, str],
        needs: Sequence[str],
    ) -> None:
        """Runs Python with a command's arguments, for `limit` seconds at most.

        Args:
            part: its name in the results.
            command: arguments of Python.
            limit: seconds.
            environment: variables, beside this process's.
            needs: packages without which the part is skipped.
        """
        missing = [name for name in needs if importlib.util.find_spec(name) is None]
        if missing:
            self._end(part, "skipped", 0, f"{', '.join(missing)}: not installed, skipped")
            return
        limit = min(limit, self.seconds_left())
        if limit < 1:
            self._end(part, "failed", 0, "no time was left for it")
            return
        began = time.monotonic()
        with self._log.open("a+") as log:
            log.write(f"=== {part}\n")
            log.flush()
            start = log.tell()
            status = subprocess.run(
                ["timeout", f"--kill-after={_KILL_AFTER}", str(limit), sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            ).returncode
            log.seek(start)
            lines = log.read().splitlines()
        said = ""
        for line in lines:
            row = gpu_rows.parse(line)
            if row is not None:
                self.rows.append({"part": part, **row})
                self._keep(self.rows[-1])
                print(f"    {gpu_table.brief(row)}")
            elif line.strip():
                said = line.strip()
        if not status and self.rows and self.rows[-1]["part"] == part:
            said = ""
        if status in (124, 137):
            said = f"stopped after {limit:.0f} s, its limit, at: {said}"
        self._end(part, "failed" if status else "ok", time.monotonic() - began, said)

    def ran(self, method: str) -> bool:
        """Whether a method of the part "jax" ran by itself."""
        return any(
            row["part"] == f"jax {method}" and row["seconds"] and not row["error"]
            for row in self.rows
        )


def _jax_environment(device: str, cache: str) -> dict[str, str]:
    """Programs are kept from part to part, but nothing that makes compiling others quicker."""
    variables = {
        "JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
        "JAX_TRACEBACK_FILTERING": "off",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
    }
    if device == "cpu":  # a rehearsal: compile quickly
        flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    return variables


def _run_parts(settings: argparse.Namespace, benchmark: Benchmark, cache: str) -> None:
    parts, limits = settings.parts, LIMITS
    jax_environment = _jax_environment(settings.device, cache)
    python = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}

    def measure(part: str, module: str, methods: Sequence[str], limit: float, rounds: int) -> None:
        command = ["-m", f"benchmarks.{module}", "--size", settings.size]
        command += ["--rounds", str(rounds), "--stop-after", str(limit - _LAST_ROUND)]
        if module == "gpu_torch":
            command += ["--device", "cpu" if settings.device == "cpu" else "cuda"]
            if settings.device == "cpu":  # a rehearsal: trace it, but generate no code
                command += ["--backend", "aot_eager"]
            environment, needs = {}, ["torch", "jax"]
        else:
            environment, needs = jax_environment, ["jax", "optax"]
        command += ["--methods", *methods]
        benchmark.run(part, command, limit, {**python, **environment}, needs)

    if "device" in parts:
        small = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **python}
        command = ["-m", "benchmarks.gpu_machine"]
        benchmark.run("device", command, limits["device"], {**jax_environment, **small}, ["jax"])
    if "smoke" in parts:
        exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", **python}
        command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", *SMOKE_TESTS]
        needs = ["pytest", "hypothesis", "flax", "chex", "jax", "optax"]
        benchmark.run("smoke", command, limits["smoke"], {**jax_environment, **exact}, needs)
    if "torch" in parts:
        measure("torch", "gpu_torch", TORCH_METHODS, limits["torch"], 5)
    if "compiled" in parts:
        names = ["torch_plain", "torch_plain_compiled"]
        measure("compiled", "gpu_torch", names, limits["compiled"], 5)
    if "jax" in parts:
        reserved = limits["rounds"] if "rounds" in parts else 0
        for name in settings.methods:
            limit = min(limits["jax"], benchmark.seconds_left() - reserved)
            measure(f"jax {name}", "gpu_jax", [name], limit, 1)
    if "rounds" in parts:
        names = [name for name in settings.methods if "jax" not in parts or benchmark.ran(name)]
        limit = min(limits["rounds"], benchmark.seconds_left())
        measure("rounds", "gpu_jax", names, limit, 7)


def main() -> None:
    """Runs what the command line names."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--size", default="qwen3-0.6b", help="of the decoder; micro to rehearse")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--methods", nargs="+", help="of jax and rounds")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument(
        "--directory", help="default: $OUT, else results/gpu or, rehearsed, runs/gpu"
    )
    settings = parser.parse_args()
    settings.methods = (
        settings.methods or METHODS[: len(METHODS) if settings.device == "gpu" else 3]
    )

    default = "results/gpu" if settings.device == "gpu" else "runs/gpu"
    directory = pathlib.Path(settings.directory or os.environ.get("OUT") or default)
    benchmark = Benchmark(directory, began + 60 * settings.minutes)
    with tempfile.TemporaryDirectory() as cache:
        _run_parts(settings, benchmark, cache)
    shown = gpu_table.table(benchmark.rows, benchmark.outcomes, settings.size, settings.device)
    (directory / "table.md").write_text(shown)
    print(f"\n{shown}\n{directory}: results.jsonl, log.txt, table.md", flush=True)
    print(f"Done in {(time.monotonic() - began) / 60:.1f} minutes.")
    sys.exit(any(outcome["status"] == "failed" for outcome in benchmark.outcomes))


if __name__ == "__main__":
    main()
