"""What every transformation promises, whatever its solver and the type of the parameters."""

import functools
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import proma_jax as proma
from proma_jax.project.linalg import Orthonormalization
from proma_jax.project.span import Solver
from tests.oracles import assert_close

TOLERANCES = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-5, "float64": 1e-12}
MEMBERS, MICROBATCHES, SEQUENCES = 2, 4, 3


def accumulate(solver, dtype):
    inner = optax.sgd(0.1, momentum=0.9)
    wide = jnp.promote_types(dtype, jnp.float32)
    return proma.accumulate(inner, 2, solver=solver, accumulator_dtype=wide)


def intra(method, dtype):
    del dtype
    return proma.project_intra(2, orthonormalization=method)


def both(dtype):
    return optax.chain(intra("cholesky_qr", dtype), accumulate("ridge", dtype))


TRANSFORMS = {
    **{f"accumulate_{s}": functools.partial(accumulate, s) for s in get_args(Solver)},
    **{f"intra_{o}": functools.partial(intra, o) for o in get_args(Orthonormalization)},
    "both": both,
}


def setup(name, dtype):
    """The update function, the parameters, a fresh state, and an ensemble's microbatches."""
    tx = TRANSFORMS[name](dtype)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=(MEMBERS, MICROBATCHES, *shape)).astype(jnp.dtype(dtype))

    inputs, output_grads = normal(SEQUENCES, 2, 4, 5), normal(SEQUENCES, 2, 4, 4)
    scores = {
        "bias": normal(SEQUENCES, 4),
        "kernel": proma.LayerFactors(inputs, output_grads, num_layer_axes=1),
        "plain": None,
    }
    grads = {"bias": normal(4), "kernel": normal(2, 5, 4), "plain": normal(3)}
    params = jax.tree.map(lambda x: jnp.asarray(x[0, 0]), grads)

    def update(state, microbatch):
        grads, scores = microbatch
        updates, state = tx.update(grads, state, params, scores=scores)
        return state, updates

    return tx.init, update, params, (grads, scores)


def pick(tree, *index):
    return jax.tree.map(lambda x: x[index], tree)


ANY_VERSION = {"accumulate_qr", "accumulate_svd", "intra_qr", "intra_svd", "float16", "float64"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name, dtype, marks=[pytest.mark.any_version] if {name, dtype} & ANY_VERSION else []
        )
        for name in TRANSFORMS
        for dtype in TOLERANCES
    ],
)
def test_one_trace_serves_abstract_and_donated_states_scans_and_ensembles(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        init, update, params, ensemble = setup(name, dtype)
        chex.clear_trace_counter()
        compiled = jax.jit(chex.assert_max_traces(update, n=1), donate_argnums=0)

        abstract = jax.eval_shape(init, params)
        assert abstract == jax.eval_shape(lambda: init(params))
        shapes = abstract, jax.eval_shape(lambda: params)
        assert jax.eval_shape(compiled, abstract, pick(ensemble, 0, 0)) == shapes

        expected = jax.tree.map(jax.typeof, (init(params), params))
        last, emitted = [], []
        for member in range(MEMBERS):
            state = init(params)
            for m in range(MICROBATCHES):
                before, microbatch = jax.tree.map(np.array, state), pick(ensemble, member, m)
                state, updates = compiled(state, microbatch)
                assert jax.tree.map(jax.typeof, (state, updates)) == expected
                emitted.append(updates)
            last.append(state)
        assert_close(update(before, microbatch), (state, updates), TOLERANCES[dtype])

        scan = functools.partial(jax.lax.scan, compiled, init(params))
        states, updates = jax.device_get(jax.jit(jax.vmap(scan))(ensemble))
        scanned = [pick(updates, i, m) for i in range(MEMBERS) for m in range(MICROBATCHES)]
        assert_close(scanned, emitted, TOLERANCES[dtype])
        assert_close([pick(states, i) for i in range(MEMBERS)], last, TOLERANCES[dtype])


def test_sharded_parameters_stay_sharded_and_change_nothing():
    init, update, params, ensemble = setup("both", "float32")
    expected = jax.jit(update)(init(params), pick(ensemble, 0, 0))
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Explicit,))

    def shard(x):
        last = "model" if x.shape[-1] % 2 == 0 else None
        spec = PartitionSpec(*[None] * (x.ndim - 1), last)
        return jax.device_put(x, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        grads, scores = pick(ensemble, 0, 0)
        sharded, grads = jax.tree.map(shard, (params, grads))
        before = init(sharded)
        actual = jax.jit(update)(before, (grads, scores))
        assert jax.tree.map(jax.typeof, actual) == jax.tree.map(jax.typeof, (before, sharded))
    assert_close(actual, expected, TOLERANCES["float32"])


@pytest.mark.any_version
@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "both"])
def test_the_gradient_through_the_updates_is_that_of_finite_differences(name):
    with jax.enable_x64(True):
        init, update, params, ensemble = setup(name, "float64")
        (grads, scores), (direction, _) = (pick(ensemble, i, slice(2)) for i in range(MEMBERS))
        weights = jax.tree.map(np.sin, grads)

        @jax.jit
        @jax.value_and_grad
        def loss(grads):
            _, updates = jax.lax.scan(update, init(params), (grads, scores))
            return optax.tree.vdot(weights, updates)

        value, gradient = loss(grads)
        moved, _ = loss(optax.tree.add(grads, direction))
        assert_close(optax.tree.vdot(gradient, direction), moved - value, 1e-10)
