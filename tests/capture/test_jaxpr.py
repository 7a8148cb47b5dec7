"""What _jaxpr.py relies on of JAX's private layouts; run at the oldest and newest supported JAX."""

import chex
import jax
import jax.numpy as jnp
import pytest

from proma_jax.capture import _jaxpr

X = jnp.arange(12.0).reshape(3, 4) / 10
W = jnp.arange(20.0).reshape(4, 5) / 10
STACK = jnp.arange(48.0).reshape(3, 4, 4) / 50


def trace(fn, *args):
    """The last equation of a traced function."""
    return jax.make_jaxpr(fn)(*args).jaxpr.eqns[-1]


@jax.custom_vjp
def doubled_gradient(x):
    return x


doubled_gradient.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))


class Unknown:
    """An equation like another, without one of its params."""

    def __init__(self, eqn, key):
        self.primitive, self.invars, self.outvars = eqn.primitive, eqn.invars, eqn.outvars
        self.params = {k: v for k, v in eqn.params.items() if k != key}


def step(carry, x):
    (h, n), (w, b) = carry, x
    return (jnp.tanh(h @ w @ W.T[:4, :4] + b), n + 1), (h, w.T)


def scanned(w, b, h):
    return jax.lax.scan(step, (h, 0), (w, b), reverse=True, unroll=3)


# Programs inside equations.


@pytest.mark.parametrize(
    ("transform", "kind"),
    [
        (jax.jit, "call"),
        (jax.checkpoint, "remat"),
        (
            lambda fn: jax.checkpoint(fn, policy=jax.checkpoint_policies.dots_saveable),
            "remat",
        ),
    ],
)
def test_program_inside_jit_and_remat(transform, kind):
    constant = jnp.ones(4)
    eqn = trace(transform(lambda w: jnp.sin(w) + constant), jnp.ones(4))
    body = _jaxpr.body(eqn)
    assert body.kind == kind
    assert len(body.jaxpr.invars) == len(eqn.invars)
    assert len(body.jaxpr.constvars) == len(body.consts)
    if kind == "remat":
        assert body.settings == {key: eqn.params[key] for key in ("prevent_cse", "policy")}


def test_program_inside_a_scan_and_the_split_of_its_inputs():
    body = _jaxpr.body(trace(scanned, STACK, STACK[:, 0], X))
    assert body.kind == "scan"
    assert body.num_carry == 2
    assert body.length == 3
    assert body.settings == {"length": 3, "reverse": True, "unroll": 3}
    shapes = [v.aval.shape for v in body.jaxpr.invars[body.num_consts :]]
    assert shapes == [(3, 4), (), (4, 4), (4,)]


def test_split_agrees_with_the_counts_of_jax_that_still_has_them():
    def count(carry, xs):
        return jax.tree.map(jnp.cos, carry), jax.tree.map(jnp.sin, xs)

    for carry, xs in [(X, None), (None, X), ((X, 0.0), (STACK, STACK)), (None, None)]:
        eqn = trace(lambda c, xs: jax.lax.scan(count, c, xs, length=3), carry, xs)
        body = _jaxpr.body(eqn)
        assert body.num_carry == len(jax.tree.leaves(carry))
        for name in eqn.params.keys() & {"num_consts", "num_carry"}:
            assert getattr(body, name) == eqn.params[name]


def test_program_runs_again_as_it_did():
    def run(w, b, h):
        eqn = trace(scanned, w, b, h)
        body = _jaxpr.body(eqn)

        def fn(extra, carried, *args):
            args = *args[:-1], args[-1] + 0 * extra
            return jax.core.eval_jaxpr(body.jaxpr, body.consts, *args), 2 * carried + extra

        consts = [W] * body.num_consts
        args = (h, jnp.int32(0), w, b)
        return _jaxpr.rebuild(body, fn)(jnp.arange(3.0)[:, None], jnp.ones(1), *consts, *args)

    args = (STACK, STACK[:, 0], X)
    results, carried = run(*args)
    chex.assert_trees_all_close(results, jax.tree.leaves(scanned(*args)))
    assert carried == 2 * (2 * (2 * 1 + 2) + 1) + 0  # it runs from the last to the first


@pytest.mark.parametrize("prevent_cse", [True, False])
def test_program_is_rematerialised_as_it_was(prevent_cse):
    policy = jax.checkpoint_policies.dots_saveable
    eqn = trace(jax.checkpoint(jnp.sin, policy=policy, prevent_cse=prevent_cse), X)
    run = _jaxpr.rebuild(_jaxpr.body(eqn), lambda extra, carried, x: ([jnp.cos(x)], carried))
    again = trace(run, None, {}, X)
    settings = again.primitive, again.params["policy"], again.params["prevent_cse"]
    assert settings == (eqn.primitive, policy, prevent_cse)


def test_other_programs_are_unknown():
    eqns = [
        trace(lambda x: jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x), X),
        trace(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x + 1, x), X),
        trace(doubled_gradient, X),
        trace(jnp.sin, X),
    ]
    assert [_jaxpr.body(eqn) for eqn in eqns] == [None] * 4


@pytest.mark.parametrize(
    ("transform", "key"),
    [
        (jax.jit, "jaxpr"),
        (jax.checkpoint, "jaxpr"),
        (jax.checkpoint, "prevent_cse"),
        (jax.checkpoint, "policy"),
        (lambda fn: lambda x: jax.lax.map(fn, x), "jaxpr"),
        (lambda fn: lambda x: jax.lax.map(fn, x), "length"),
        (lambda fn: lambda x: jax.lax.map(fn, x), "reverse"),
        (lambda fn: lambda x: jax.lax.map(fn, x), "unroll"),
    ],
)
def test_program_with_an_unknown_layout_is_unknown(transform, key):
    eqn = trace(transform(jnp.sin), X)
    assert _jaxpr.body(eqn) is not None
    assert key in eqn.params
    assert _jaxpr.body(Unknown(eqn, key)) is None


def test_scan_whose_inputs_are_in_another_order_is_unknown():
    eqn = trace(lambda c, x: jax.lax.scan(lambda c, x: (c + x, 2 * x), c, x), X[0], X)
    eqn = Unknown(eqn, "")
    assert _jaxpr.body(eqn).num_carry == 1
    eqn.invars = eqn.invars[::-1]
    assert _jaxpr.body(eqn) is None
    eqn.invars, eqn.outvars = eqn.invars[::-1], eqn.outvars[::-1]
    assert _jaxpr.body(eqn) is None


# Single equations.


def test_one_equation_keeps_its_rules_and_context():
    eqn = trace(doubled_gradient, X[0])
    assert eqn.primitive.name == "custom_vjp_call"

    def total(x):
        return jnp.sum(_jaxpr.evaluate(eqn, x)[0])

    chex.assert_trees_all_equal(jax.grad(total)(X[0]), jnp.full(4, 2.0))
    chex.assert_trees_all_equal(jax.jit(jax.vmap(jax.grad(total)))(X), jnp.full((3, 4), 2.0))


def test_one_equation_with_equal_literal_and_dropped_variables():
    square, power = trace(lambda x: x * x, X), trace(lambda x: x * 3.0, X)
    chex.assert_trees_all_equal(_jaxpr.evaluate(square, X, X), [X * X])
    chex.assert_trees_all_equal(_jaxpr.evaluate(power, X, 3.0), [X * 3])
    values, indices = _jaxpr.evaluate(trace(lambda x: jax.lax.top_k(x, 2)[0], X), X)
    chex.assert_shape([values, indices], (3, 2))


def test_one_equation_passes_jax_checks():
    jax.config.update("jax_enable_checks", True)
    try:
        chex.assert_trees_all_equal(_jaxpr.evaluate(trace(jnp.matmul, X, W), X, W), [X @ W])
    finally:
        jax.config.update("jax_enable_checks", False)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float32])
def test_narrow_arithmetic_is_found_inside(dtype):
    def fn(x):
        return jax.lax.scan(jax.checkpoint(lambda c, x: (c, x.astype(dtype))), 0, x)

    assert _jaxpr.is_narrow(jax.make_jaxpr(fn)(X).jaxpr) == (dtype != jnp.float32)
