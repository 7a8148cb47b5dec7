"""Several processes, as on several hosts: a training run of two agrees with that of one."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import proma_jax as proma
from tests.oracles import assert_close

PROCESSES, B, TOKENS, WIDTH = 2, 4, 8, 6


def logprob_fn(params, x):
    return jnp.sum(jax.nn.log_softmax(jnp.tanh(x @ params["w"] + params["b"]))[:, 0])


def train(num_devices):
    """Two optimizer steps of two microbatches each, on a mesh over the devices of all processes."""
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,))
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    tx = optax.chain(proma.project_intra(rank=2), proma.accumulate(inner, 2))

    def spread(tree, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
        )

    def own(x):
        share = len(x) // jax.process_count()
        return spread(x[jax.process_index() * share :][:share], "data")

    @jax.jit
    def step(params, state, x, coefficients):
        _, scores = proma.sequence_scores(logprob_fn, spmd_axis_name="data")(params, x)
        grads = proma.weighted_sum(scores, coefficients)
        updates, state = tx.update(grads, state, params, scores=scores)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    params = {"w": np.float32(rng.normal(size=(WIDTH, WIDTH))), "b": np.zeros(WIDTH, np.float32)}
    with jax.set_mesh(mesh):
        state, params = spread(tx.init(params)), spread(params)
        for _ in range(4):
            x = np.float32(rng.normal(size=(B, TOKENS, WIDTH)))
            coefficients = np.float32(rng.normal(size=B))
            params, state = step(params, state, own(x), own(coefficients))
    return {name: np.asarray(w.addressable_data(0)) for name, w in params.items()}


def test_two_processes_agree_with_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        # With a program from the cache JAX 0.9.1 may run collectives in another order per process.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.test_processes", str(port), str(rank), str(tmp_path)],
            cwd=pathlib.Path(__file__).parents[1],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    expected = train(num_devices=1)
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in processes]
    assert all(code == 0 for _, code in ends), ends
    for rank in range(PROCESSES):
        assert_close(dict(np.load(tmp_path / f"{rank}.npz")), expected)


if __name__ == "__main__":
    port, rank, folder = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", PROCESSES, int(rank))
    assert jax.process_count() == PROCESSES
    np.savez(pathlib.Path(folder) / rank, **train(jax.device_count()))
