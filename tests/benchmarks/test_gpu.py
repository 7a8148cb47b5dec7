"""`benchmarks/gpu.sh` rehearsed without a GPU: what it runs, keeps and says, whatever fails."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from benchmarks import gpu, gpu_rows, gpu_table, methods
from benchmarks.cases import SIZES

pytestmark = pytest.mark.any_version

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PARTS = ["device", "torch", "compiled", "jax", "rounds"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def cells(table, method):
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {method} |"))
    return dict(zip(gpu_table._HEADERS, (c.strip() for c in line.split("|")[1:-1]), strict=True))


def test_a_rehearsal_runs_every_part(tmp_path):
    """All but the smoke part, whose tests run here anyway."""
    names = ["plain_batched", "accumulation_fused"]
    done = subprocess.run(
        [SCRIPT, "--size", "micro", "--device", "cpu", "--parts", *PARTS, "--methods", *names],
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()
    rows = read(tmp_path / "results.jsonl")
    has_torch = importlib.util.find_spec("torch") is not None
    expected = {"device": "ok", "rounds": "ok", **{f"jax {name}": "ok" for name in names}}
    expected |= dict.fromkeys(["torch", "compiled"], "ok" if has_torch else "skipped")
    assert {row["part"]: row["status"] for row in rows if "status" in row} == expected
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    assert ("torch: not installed, skipped" in done.stdout) != has_torch
    for name in names:
        found = cells(table, name)
        assert float(found["seconds"]) > 0
        assert found["quartiles"]
        assert re.fullmatch(r"[\d.]+ \+ [\d.]+", found["trace + compile s"])
        assert found["failed"] == ""
    assert cells(table, "plain_batched")["x plain"] == "1.000"
    together = [row for row in rows if row["part"] == "rounds" and "method" in row]
    assert [len(row["seconds"]) for row in together] == [7, 7]
    assert any("jax" in row.get("versions", ()) for row in rows)
    if has_torch:
        assert set(gpu.TORCH_METHODS) <= {row.get("method") for row in rows}


ROW = {"method": "plain_fused", "seconds": [1.0], "memory": {}, "norm": 1.0, "error": None}
PRINT_IT = f"from benchmarks import gpu_rows; gpu_rows.emit({ROW!r}); "
HANG = "gpu_rows.say('compile it'); import time; time.sleep(600)"


@pytest.mark.parametrize(
    ("program", "needs", "status", "said"),
    [
        (PRINT_IT, ["json"], "ok", ""),
        ("print('18 passed')", [], "ok", "18 passed"),
        (PRINT_IT + "raise SystemExit('out of memory')", [], "failed", "out of memory"),
        (PRINT_IT + "import os; os.abort()", [], "failed", ""),
        (PRINT_IT + HANG, [], "failed", "stopped after 5 s, its limit, at: [0-9:]* compile it"),
        (PRINT_IT, ["no_such_package"], "skipped", "no_such_package: not installed, skipped"),
    ],
)
def test_whatever_becomes_of_a_part_what_it_printed_is_kept(program, needs, status, said, tmp_path):
    benchmark = gpu.Benchmark(tmp_path, time.monotonic() + 300)
    benchmark.run("jax plain_fused", ["-c", program], 5, {}, needs)
    (outcome,) = benchmark.outcomes
    assert outcome["status"] == status
    assert re.fullmatch(said, outcome["said"])
    *rows, last = read(tmp_path / "results.jsonl")
    assert last == outcome
    assert rows == benchmark.rows
    assert len(rows) == (PRINT_IT in program and status != "skipped")
    assert benchmark.ran("plain_fused") == bool(rows)


def test_nothing_runs_past_the_deadline(tmp_path):
    began = time.monotonic()
    benchmark = gpu.Benchmark(tmp_path, began + 8)
    for part in ("torch", "rounds"):
        benchmark.run(part, ["-c", "import time; time.sleep(600)"], 600, {}, [])
    first, second = (outcome["said"] for outcome in benchmark.outcomes)
    assert "its limit" in first
    assert second == "no time was left for it"
    assert time.monotonic() - began < 120


def test_the_table_says_whose_figures_they_are_and_what_failed():
    alone, rounds = {"norm": 1.0, "error": None}, {"part": "rounds", "norm": 1.0, "error": None}
    gib = 2**30
    compiled = {"trace_seconds": 1.0, "compile_seconds": 20.0}
    exact = {"temp": gib, "argument": gib, "output": 0, "device_peak": 3 * gib}
    exact["device_peak_before"] = gib
    bound = {"device_peak": 5 * gib, "device_peak_before": 5 * gib}
    rows = [
        {"method": "torch_plain", "part": "torch", "seconds": [4.0, 4.0], "memory": {}, **alone},
        {
            "method": "torch_intra_10",
            "part": "torch",
            "seconds": [8.0, 16.0],
            "memory": {},
            **alone,
        },
        {"method": "plain_fused", "part": "jax plain_fused", "seconds": [9.0], "memory": exact}
        | alone
        | compiled,
        {"method": "plain_fused", "seconds": [2.0, 4.0], "memory": bound, **rounds},
        {"method": "grpo", "part": "jax grpo", "seconds": [18.0], "memory": bound, **alone},
        {"method": "grpo", "seconds": [], "memory": {}, **rounds, "error": "out of memory"},
        {"method": "intra_10", "seconds": [1.0, 4.0], "memory": {}, **rounds},
    ]
    outcomes = [
        {"part": "jax both_10_fused", "status": "failed", "said": "stopped after 75 s"},
        {"part": "smoke", "status": "skipped", "said": "pytest: not installed, skipped"},
    ]
    table = gpu_table.table(rows, outcomes, "micro", "cpu")
    plain = cells(table, "plain_fused")
    assert (plain["seconds"], plain["x plain"]) == ("3.0000", "1.000")
    assert plain["trace + compile s"] == "1.0 + 20.0"
    assert (plain["compiler's peak GiB"], plain["allocator's peak GiB"]) == ("2.00", "3.00")
    grpo = cells(table, "grpo")
    assert (grpo["seconds"], grpo["x plain"]) == ("18.0000 (alone)", "2.000")
    assert (grpo["allocator's peak GiB"], grpo["failed"]) == ("<= 5.00", "out of memory")
    assert cells(table, "intra_10")["x plain"] == "0.750"
    demonstration = cells(table, "torch_intra_10")
    assert (demonstration["x plain"], demonstration["x fastest plain"]) == ("3.000", "4.000")
    assert cells(table, "both_10_fused")["failed"] == "failed: stopped after 75 s"
    assert "smoke skipped: pytest: not installed, skipped" in table


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, 0),
        ({"norm": float("inf")}, "plain_fused: its result is not finite"),
        ({"error": "out of memory", "norm": float("nan")}, "plain_fused: out of memory"),
    ],
)
def test_a_method_that_failed_fails_its_part(change, said, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_rows.finish([ROW | change])
    assert ended.value.code == said
    printed = gpu_rows.parse(capsys.readouterr().out)
    assert f"plain_fused: {printed['error']}" == said or printed == ROW


def test_rows_are_strict_json():
    row = {"norm": float("nan"), "memory": {"temp": 1}, "seconds": [0.5], "error": None}
    assert gpu_rows.parse(gpu_rows.line(row)) == row | {"norm": None}
    assert gpu_rows.parse("{not a row") is gpu_rows.parse("18 passed") is None


def test_the_script_names_limits_tests_and_methods_that_exist():
    explained = re.findall(r"^#     (\w+) +(\d+)  ", SCRIPT.read_text(), re.M)
    assert {name: int(limit) for name, limit in explained} == gpu.LIMITS
    assert tuple(gpu.LIMITS) == gpu.PARTS
    for name in gpu.METHODS:
        methods.make_step(name, SIZES["micro"])
    for test in gpu.SMOKE_TESTS:
        path, name = test.split("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), test
