"""A run saved by orbax in the middle of an accumulation, and gone on with, on any mesh."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import proma_jax as proma
from tests.oracles import assert_close

K, B, MICROBATCHES, SAVED_AFTER = 3, 8, 9, 4
TX = optax.chain(
    proma.project_intra(rank=2),
    proma.accumulate(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), K),
)


def logprob_fn(params, x):
    return jnp.sum(jax.nn.log_softmax(jnp.tanh(x @ params["w"]) @ params["v"] + params["b"])[:, 0])


class Run:
    """A training run on a mesh of some devices, its parameters spread over them."""

    def __init__(self, num_devices):
        self.mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,))
        rng = np.random.default_rng(0)
        params = {
            "w": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
            "v": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
            "b": jnp.zeros(8),
        }
        key = jax.random.key(1)
        self.state = self.spread((params, TX.init(params), key))
        self.position, self.metrics = 0, []

    def sharding(self, x):
        is_spread = x.ndim > 0 and x.shape[0] % 8 == 0
        return NamedSharding(self.mesh, PartitionSpec("data") if is_spread else PartitionSpec())

    def spread(self, tree):
        return jax.tree.map(lambda x: jax.device_put(x, self.sharding(x)), tree)

    @functools.cached_property
    def step(self):
        def step(state, x):
            params, opt_state, key = state
            key, of_step = jax.random.split(key)
            coefficients = jax.random.normal(of_step, (B,))
            logprobs, scores = proma.sequence_scores(logprob_fn)(params, x)
            grads = proma.weighted_sum(scores, coefficients)
            updates, opt_state = TX.update(grads, opt_state, params, scores=scores)
            return (optax.apply_updates(params, updates), opt_state, key), jnp.mean(logprobs)

        return jax.jit(step, out_shardings=(jax.tree.map(self.sharding, self.state), None))

    def train(self, until):
        with jax.set_mesh(self.mesh):
            while self.position < until:
                rng = np.random.default_rng([7, self.position])
                x = self.spread(jnp.asarray(rng.normal(size=(B, 4, 8)), jnp.float32))
                self.state, logprob = self.step(self.state, x)
                self.metrics.append(float(logprob))
                self.position += 1

    def save(self, manager):
        run = {"position": self.position, "metrics": self.metrics}
        arguments = {"state": ocp.args.StandardSave(self.state), "run": ocp.args.JsonSave(run)}
        manager.save(self.position, args=ocp.args.Composite(**arguments))
        manager.wait_until_finished()

    def restore(self, manager):
        proma.check_restorable(manager.item_metadata(SAVED_AFTER).state.tree, self.state)
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state
        )
        arguments = {"state": ocp.args.StandardRestore(wanted), "run": ocp.args.JsonRestore()}
        restored = manager.restore(SAVED_AFTER, args=ocp.args.Composite(**arguments))
        proma.check_restorable(restored.state, self.state)
        self.state, self.position = restored.state, restored.run["position"]
        self.metrics = restored.run["metrics"]


@pytest.fixture(scope="module")
def uninterrupted():
    run = Run(8)
    run.train(MICROBATCHES)
    return run


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """Of a run on eight devices that was saved in the middle of an accumulation."""
    with ocp.CheckpointManager(tmp_path_factory.mktemp("checkpoints")) as manager:
        run = Run(8)
        run.train(SAVED_AFTER)
        assert run.state[1][1].mini_step == SAVED_AFTER % K > 0
        run.save(manager)
        yield manager


@pytest.mark.parametrize("num_devices", [8, 4, 2, 1])
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(num_devices, uninterrupted, manager):
    run = Run(num_devices)
    run.restore(manager)
    shardings = jax.tree.map(lambda x: x.sharding, run.state)
    run.train(MICROBATCHES)
    assert jax.tree.map(lambda x: x.sharding, run.state) == shardings
    ours, expected = (
        jax.device_get((r.state[:2], jax.random.key_data(r.state[2]), r.metrics))
        for r in (run, uninterrupted)
    )
    if num_devices == 8:
        chex.assert_trees_all_equal(ours, expected)
    else:
        assert_close(ours, expected, 1e-4)
