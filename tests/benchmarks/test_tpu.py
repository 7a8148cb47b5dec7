"""What is read off a compiled program is what runs; libtpu, where it is there, compiles a step."""

import doctest
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks import hlo, tpu

REPORT = """
Memory Space: default (color=0)
Total bytes: 96 (96B)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    64.00MiB( 67%);   64.00MiB;            0;                2; bf16[8,4], f32[2,2]
    96.00MiB(100%);   32.00MiB;           64;                1; f32[8,4]

Memory Space: other (color=1)
  ------------------------------------------------------------
    16.00MiB(100%);   16.00MiB;            0;                1; f32[4]
"""


def test_collectives_count_as_often_as_they_run():
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))

    def program(x):
        def inner(x, _):
            return x + jax.lax.psum(jnp.sin(x), "devices"), None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=5)[0], None

        return jnp.sin(jax.lax.all_gather(jax.lax.scan(outer, x, length=3)[0], "devices")[0])

    mapped = jax.shard_map(program, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"))
    text = jax.jit(mapped).lower(jnp.ones((8, 4))).compile().as_text()
    assert hlo.collectives(text) == {
        "all-gather": hlo.Traffic(runs=1, bytes=8 * 4 * 4),
        "all-reduce": hlo.Traffic(runs=15, bytes=15 * 4 * 4),
    }
    assert doctest.testmod(hlo).failed == 0


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make bench-tpu"
)


@needs_libtpu
def test_the_smallest_case_compiles_for_a_chip(tmp_path):
    arguments = ["--size", "micro", "--methods", "plain_batched", "both_2_fused"]
    command = [sys.executable, "-m", "benchmarks.tpu", *arguments, "--directory", str(tmp_path)]
    subprocess.run(command, check=True)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert all(row["beyond_arguments_bytes"] > 0 for row in results.values())
    assert all(row["largest_arrays"] for row in results.values())


def test_a_report_names_the_largest_arrays():
    assert tpu.largest_arrays(REPORT) == ["64.00MiB: bf16[8,4], f32[2,2]", "32.00MiB: f32[8,4]"]
    with pytest.raises(ValueError, match=r"self\.data=0"):
        tpu.Command(data=0)
