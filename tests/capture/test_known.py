"""Numbers that are known while a program is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from proma_jax.capture import _jaxpr, _numbers
from proma_jax.capture.known import Scope

TABLE = jnp.array([3, 1, 2])
COMPUTED = {
    "arithmetic": lambda: (7 - jnp.arange(3) * 2) % 3,
    "quotients": lambda: jnp.array([7, -7]) // 2 + jax.lax.div(jnp.array([7, -7]), 2),
    "comparisons": lambda: jnp.where(jnp.arange(4) >= 2, jnp.arange(4), -1).astype(jnp.int32),
    "a table": lambda: TABLE[jnp.arange(2)[1]],
    "shapes": lambda: jnp.concatenate([jnp.ones((2, 1), int), jnp.zeros((1, 1), int)]).reshape(-1),
    "windows": lambda: jax.lax.dynamic_slice_in_dim(TABLE, 1, 2),
    "bounds": lambda: jnp.clip(jnp.arange(5), 1, 3)[::2],
    "in a jit": lambda: jax.jit(lambda n: jnp.minimum(n, 2))(jnp.int32(5)),
}


def scope_of(fn, *args):
    closed = jax.make_jaxpr(fn)(*args)
    return Scope(closed.jaxpr, closed.consts)


@pytest.mark.parametrize("name", COMPUTED)
def test_numbers_are_computed_as_jax_does(name):
    scope = scope_of(COMPUTED[name])
    np.testing.assert_array_equal(scope.everywhere(scope.results[0]), COMPUTED[name]())


@pytest.mark.parametrize("name", ["a table", "arithmetic"])
def test_without_rules_nothing_is_known(name, monkeypatch):
    monkeypatch.setattr(_numbers, "_ARITHMETIC", {})
    monkeypatch.setattr(_numbers, "_SHAPING", {})
    scope = scope_of(COMPUTED[name])
    assert scope.everywhere(scope.results[0]) is None


def inner(fn, *args):
    """The scope of the program in the only scan, or that of a remat in there."""
    closed = jax.make_jaxpr(fn)(*args)
    scope, jaxpr = Scope(closed.jaxpr, closed.consts), closed.jaxpr
    while (eqn := next((e for e in jaxpr.eqns if _jaxpr.body(e)), None)) is not None:
        body = _jaxpr.body(eqn)
        scope, jaxpr = scope.inside(eqn, body), body.jaxpr
    return scope


@pytest.mark.parametrize("reverse", [False, True])
def test_counters_of_loops_are_known_in_every_iteration(reverse):
    def fn(x):
        def step(carry, slices):
            total, i = carry
            n, scanned = slices
            return (total + x, i + 2), (i, n, x, scanned)

        xs = (jnp.arange(3) ** 2, jnp.ones(3) * x)
        return jax.lax.scan(jax.checkpoint(step), (x, 10), xs, reverse=reverse)

    scope = inner(fn, 1.0)
    _, following, counter, number, data, scanned = scope.results
    turns = [2, 1, 0] if reverse else [0, 1, 2]
    np.testing.assert_array_equal(scope.everywhere(following), 12 + 2 * np.array(turns))
    np.testing.assert_array_equal(scope.everywhere(counter), 10 + 2 * np.array(turns))
    assert scope.everywhere(number) is None  # squares are computed by a rule that is not here
    assert scope.everywhere(data) is scope.everywhere(scanned) is None


def test_loops_in_loops_have_a_number_for_each_pair():
    def fn(x):
        def outer(c, i):
            return jax.lax.scan(lambda c, j: (c + x, (i, i * 10 + j, 5)), c, jnp.arange(3))

        return jax.lax.scan(outer, x, jnp.arange(2))

    scope = inner(fn, 1.0)
    _, row, both, constant = scope.results
    np.testing.assert_array_equal(scope.everywhere(row), [[0], [1]])
    np.testing.assert_array_equal(scope.everywhere(both), [[0, 1, 2], [10, 11, 12]])
    np.testing.assert_array_equal(scope.everywhere(constant), [[5]])


def test_what_depends_on_data_or_is_large_is_not_known():
    def fn(x, n):
        return n + 1, jnp.arange(5000), x[jnp.arange(2)], jnp.sin(1.0), jax.random.key(0)

    scope = scope_of(fn, jnp.ones(3), 1)
    assert [scope.everywhere(result) for result in scope.results] == [None] * 5
    assert isinstance(scope.results[0], core.Var)
