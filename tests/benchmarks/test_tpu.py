"""What is read off a compiled program is what runs; libtpu, where it is there, compiles a step."""

import doctest
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import decoder, hlo, tpu

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


# A TPU's compiler writes a collective that runs beside other work where it starts, beside what it
# runs, and where it ends.
ASYNCHRONOUS = """
HloModule jit_step, is_scheduled=true, num_partitions=16

%start (x: bf16[4,8]) -> (bf16[4,8], bf16[32,8]) {
  %x = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[32,8]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=9, replica_groups=\
mesh['axis_0'=2,'axis_1'=8], device_ids=([8,2]T(1,0)) {'axis_1'}, dimensions={0}, \
frontend_attributes={chain_id="4"}
  ROOT %custom-call.1 = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, bf16[32,8]{1,0:T(8,128)(2,1)S(1)}) \
custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (x.1: bf16[4,8], y: bf16[16,2,8], z: bf16[2,8,4]) -> (f32[16,2,4], bf16[4,8], bf16[32,8]) {
  %x.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %y = bf16[16,2,8]{1,0:T(8,128)(2,1)} parameter(1)
  %z = bf16[2,8,4]{1,0:T(8,128)(2,1)} parameter(2)
  %all-gather.2 = bf16[32,8]{1,0:T(8,128)(2,1)} all-gather(%x.1), channel_id=9, replica_groups=\
mesh['axis_0'=2,'axis_1'=8], device_ids=([8,2]T(1,0)) {'axis_1'}, dimensions={0}, \
frontend_attributes={chain_id="4"}
  %convolution.1 = f32[16,2,4]{1,0:T(8,128)} convolution(%y, %z), window={size=2 pad=0_0 \
lhs_dilate=2}, dim_labels=b0f_0io->b0f
  ROOT %tuple = (f32[16,2,4]{1,0:T(8,128)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, bf16[32,8]{1,0:T(8,\
128)(2,1)S(1)}) tuple(%convolution.1, %x.1, %all-gather.2)
}

%all-reduce-scatter.6.clone (input: f32[64]) -> f32[8] {
  %input = f32[64]{0:T(64)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %all-reduce.1 = f32[64]{0:T(64)} all-reduce(%input), replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %dynamic-slice.1 = f32[8]{0:T(8)} dynamic-slice(%all-reduce.1, %zero)
}

ENTRY %main (x.2: bf16[4,8], y.2: bf16[16,2,8], z.2: bf16[2,8,4], w: f32[64]) -> f32[8] {
  %x.2 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %y.2 = bf16[16,2,8]{1,0:T(8,128)(2,1)} parameter(1)
  %z.2 = bf16[2,8,4]{1,0:T(8,128)(2,1)} parameter(2)
  %w = f32[64]{0:T(64)} parameter(3)
  %fusion.1 = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, bf16[32,8]{1,0:T(8,128)(2,1)S(1)}) \
fusion(%x.2), kind=kCustom, calls=%start
  %fusion.2 = (f32[16,2,4]{1,0:T(8,128)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, bf16[32,8]{1,0:T(8,\
128)(2,1)S(1)}) fusion(%x.2, %y.2, %z.2), kind=kOutput, calls=%beside
  ROOT %fusion.3 = f32[8]{0:T(8)} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.6.clone
}
"""


def test_collectives_count_as_often_as_they_run():
    mesh = jax.make_mesh((2, 4), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)

    def program(x):  # (8, 4) on a device, 128 bytes
        def inner(x, _):
            return x + jax.lax.psum(jnp.sin(x), "columns"), None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=5)[0], None

        x = jax.lax.scan(outer, x, length=3)[0]
        x = jax.lax.psum_scatter(jnp.sin(x), "columns", tiled=True)  # (2, 4)
        x = jnp.sin(jax.lax.all_gather(x, ("rows", "columns"), tiled=True))  # (16, 4)
        x = jax.lax.all_to_all(x, "rows", 0, 1, tiled=True)
        return jax.lax.ppermute(jnp.sin(x), "columns", [(i, (i + 1) % 4) for i in range(4)])

    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"), check_vma=False
    )
    text = jax.jit(mapped).lower(jnp.ones((16, 4))).compile().as_text()
    assert hlo.Program(text).collectives() == {
        "all-gather": hlo.Traffic(runs=1, bytes=7 * 32),
        "all-reduce": hlo.Traffic(runs=15, bytes=15 * 2 * 3 * 32),
        "all-to-all": hlo.Traffic(runs=1, bytes=128),
        "collective-permute": hlo.Traffic(runs=1, bytes=256),
        "reduce-scatter": hlo.Traffic(runs=1, bytes=3 * 32),
    }
    assert doctest.testmod(hlo).failed == 0


def test_collectives_beside_other_work_count_once():
    program = hlo.Program(ASYNCHRONOUS)
    assert program.collectives() == {
        "all-gather": hlo.Traffic(runs=1, bytes=7 * 64),
        "reduce-scatter": hlo.Traffic(runs=1, bytes=7 * 32),
    }
    assert program.operations() == 2 * 2 * 16 * 8 * 4
    assert program.bytes() == 2 * (16 * 2 * 8 + 2 * 8 * 4) + 4 * (16 * 2 * 4) + 4 * (64 + 8)


def test_operations_and_bytes_of_a_program_without_loops_are_those_that_xla_counts():
    config = decoder.DecoderConfig(
        vocab=64, width=64, layers=1, heads=2, kv_heads=1, head_dim=32, hidden=192
    )
    params = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    gradient = jax.grad(lambda params, tokens: decoder.logprob(config, params, tokens))
    tokens = jax.ShapeDtypeStruct((64,), jnp.int32)
    compiled = jax.jit(gradient).lower(params, tokens).compile()
    program = hlo.Program(compiled.as_text())
    assert program.operations() == decoder.gradient_flops(config, 64)
    assert program.bytes() == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.02)


def test_operations_and_bytes_grow_with_the_iterations_of_a_loop():
    def counted(layers):
        def program(x, kernels):
            return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel),) * 2, x, kernels)

        shapes = jnp.ones((64, 64)), jnp.ones((layers, 64, 64))
        program = hlo.Program(jax.jit(program).lower(*shapes).compile().as_text())
        return np.array([program.operations(), program.bytes()])

    one_layer = counted(3) - counted(2)
    np.testing.assert_array_equal(counted(9) - counted(2), 7 * one_layer)
    assert one_layer[0] == 2 * 64**3
    assert 5 <= one_layer[1] / (4 * 64**2) < 12  # at least what is read, multiplied and written


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


@needs_libtpu
def test_a_known_program_on_eight_chips_counts_as_by_hand():
    """Kernels spread over all chips reach each chip for three products, and need not otherwise."""
    layers, width, tokens = 5, 2048, 1024
    mesh = tpu.mesh_of(tpu.Command(topology="v5e:2x4", fsdp=8))

    def loss(kernels, x):
        x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def placed(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    kernels = placed((layers, width, width), P(None, "fsdp"))
    x = placed((8 * tokens, width), P("fsdp"))
    gradient = jax.jit(jax.grad(loss), out_shardings=kernels.sharding)
    with jax.set_mesh(mesh):
        program = hlo.Program(gradient.lower(kernels, x).compile().as_text())
    assert program.operations() == 3 * layers * 2 * tokens * width**2
    received = sum(traffic.bytes for traffic in program.collectives().values())
    assert 7 / 8 <= received / (3 * 2 * layers * width**2) <= 9 / 8


def test_a_report_names_the_largest_arrays():
    assert tpu.largest_arrays(REPORT) == ["64.00MiB: bf16[8,4], f32[2,2]", "32.00MiB: f32[8,4]"]
    with pytest.raises(ValueError, match=r"self\.data=0"):
        tpu.Command(data=0)
