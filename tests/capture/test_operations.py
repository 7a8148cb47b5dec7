"""Matrix products, lookups and convolutions, as _operations.py reads and evaluates them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proma_jax.capture import _jaxpr, _operations
from tests.cases import normal

X = jnp.arange(12.0).reshape(3, 4) / 10
W = jnp.arange(20.0).reshape(4, 5) / 10


def trace(fn, *args):
    """The last equation of a traced function."""
    return jax.make_jaxpr(fn)(*args).jaxpr.eqns[-1]


def without(eqn, key):
    return eqn.replace(params={k: v for k, v in eqn.params.items() if k != key})


def find(name, fn, *args):
    """The only equation of this name, with the variables that go into its program."""

    def search(jaxpr):
        for eqn in jaxpr.eqns:
            body = _jaxpr.body(eqn)
            yield from [(eqn, jaxpr.invars)] if body is None else search(body.jaxpr)

    (found,) = (x for x in search(jax.make_jaxpr(fn)(*args).jaxpr) if x[0].primitive.name == name)
    return found


@pytest.mark.parametrize(
    ("subscripts", "kernel", "shapes"),
    [
        ("ti,io->to", 1, [(3, 4), (4, 5)]),
        ("io,ti->to", 0, [(4, 5), (3, 4)]),
        ("bti,bio->bto", 1, [(2, 3, 4), (2, 4, 5)]),
        ("thd,hdo->to", 1, [(3, 2, 4), (2, 4, 5)]),
        ("ti,ihd->thd", 1, [(3, 4), (4, 2, 5)]),
        ("stbi,bio->bsto", 1, [(6, 3, 2, 4), (2, 4, 5)]),
    ],
)
def test_axes_of_a_matmul(subscripts, kernel, shapes):
    """XᵀD, from the axes read, is the kernel's gradient in (batch, in, out) layout."""
    operands = [jnp.sin(jnp.arange(jnp.prod(jnp.array(s)))).reshape(s) for s in shapes]
    eqn, invars = find("dot_general", lambda *args: jnp.einsum(subscripts, *args), *operands)
    swapped = eqn.invars[0] is invars[1]
    operands = operands[::-1] if swapped else operands
    kernel = 1 - kernel if swapped else kernel
    use = _operations.matmul(eqn, kernel)

    def product(*operands):
        return jnp.sin(_jaxpr.evaluate(eqn, *operands)[0])

    out, pullback = jax.vjp(product, *operands)
    output_grad = jnp.cos(_jaxpr.evaluate(eqn, *operands)[0])

    def arrange(x, axes):
        sizes = [[x.shape[i] for i in group] for group in axes]
        products = [int(jnp.prod(jnp.array(size, int))) for size in sizes]
        return x.transpose([i for group in axes for i in group]).reshape(products)

    x = arrange(operands[1 - kernel], use.input_axes)
    d = arrange(output_grad, use.output_axes)
    expected = arrange(pullback(jnp.ones_like(out))[kernel], use.kernel_axes)
    chex.assert_trees_all_close(jnp.einsum("bti,bto->bio", x, d), expected, rtol=1e-5, atol=1e-5)


def test_matmul_with_unknown_params_is_unknown():
    eqn = trace(jnp.matmul, X, W)
    assert eqn.params.keys() >= {"dimension_numbers", "precision", "preferred_element_type"}
    assert _operations.matmul(eqn, 1) is not None
    assert _operations.matmul(without(eqn, "dimension_numbers"), 1) is None


TABLE = jnp.arange(42.0).reshape(7, 2, 3)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda t, i: t.at[i].get(mode="clip"), (0, 7, 1, 0, (None, None, 1, 2), "clip")),
        (lambda t, i: t.at[i].get(mode="fill"), (0, 7, 1, 0, (None, None, 1, 2), "drop")),
        (
            lambda t, i: t.at[i].get(mode="promise_in_bounds"),
            (0, 7, 1, 0, (None, None, 1, 2), "drop"),
        ),
        (lambda t, i: jnp.take(t, i, axis=1), (1, 2, 1, 0, (0, None, None, 2), "drop")),
        (
            lambda t, i: jax.vmap(lambda i: t[:, :, i])(i[0]),
            (2, 3, 1, 2, (None, 0, 1, 2), "clip"),
        ),
        (lambda t, i: t[:1].at[i].get(mode="fill"), (0, 1, 1, 0, (None, None, 1, 2), "drop")),
    ],
)
def test_lookups_by_gather(fn, expected):
    eqn, _ = find("gather", fn, TABLE, jnp.zeros((4, 5), jnp.int32))
    assert _operations.lookup(eqn) == _operations.Lookup(*expected)
    for key in ("dimension_numbers", "slice_sizes", "mode"):
        assert _operations.lookup(without(eqn, key)) is None


def test_a_lookup_by_dynamic_slice():
    eqn, _ = find("dynamic_slice", lambda t, i: t[:, i], TABLE, jnp.int32(1))
    assert _operations.lookup(eqn) == _operations.Lookup(1, 2, 2, None, (0, 1, 2), "clip")
    assert _operations.lookup(without(eqn, "slice_sizes")) is None


@pytest.mark.parametrize(
    "fn",
    [
        lambda table, i: table[i, i],
        lambda table, i: jax.lax.gather(
            table,
            i[:, None],
            jax.lax.GatherDimensionNumbers((1,), (0,), (0,)),
            (1, 2),
            mode="clip",
        ),
        lambda table, i: jax.lax.gather(
            table,
            jnp.stack([i, i], axis=1),
            jax.lax.GatherDimensionNumbers((1,), (0,), (0, 1)),
            (1, 3),
            mode="fill",
        ),
        lambda table, i: jax.vmap(lambda row, j: row[j])(table, i),
    ],
)
def test_other_gathers_are_not_lookups(fn):
    eqn, _ = find("gather", fn, jnp.ones((3, 3)), jnp.arange(3))
    assert _operations.lookup(eqn) is None


def test_a_window_of_a_table_is_no_lookup():
    fn = lambda t, i: jax.lax.dynamic_slice_in_dim(t, i, 2)  # noqa: E731
    assert _operations.lookup(find("dynamic_slice", fn, TABLE, jnp.int32(1))[0]) is None


# Convolutions. Numbers of axes: (images, kernel, result).

CONVOLUTIONS = {
    "plain": (((2, 7, 3), (3, 3, 4)), {"dimension_numbers": ("NWC", "WIO", "NWC")}),
    "of planes": (((2, 3, 6, 5), (4, 3, 2, 3)), {}),
    "strided, dilated, padded": (
        ((6, 5, 2, 3), (2, 2, 4, 3)),
        {
            "window_strides": (2, 1),
            "padding": ((1, 2), (0, 1)),
            "lhs_dilation": (1, 2),
            "rhs_dilation": (2, 1),
            "dimension_numbers": ("HWNC", "HWOI", "CWHN"),
        },
    ),
    "of points": (((2, 6, 3), (1, 3, 4)), {"dimension_numbers": ("NWC", "WIO", "NCW")}),
    "of points of planes": (
        ((6, 2, 3, 5), (3, 1, 1, 4)),
        {"dimension_numbers": ("HNCW", "IHWO", "WHCN")},
    ),
}


def convolution(name):
    (shapes, options) = CONVOLUTIONS[name]
    rng = np.random.default_rng(0)
    operands = [normal(rng, *shape) for shape in shapes]
    options = {"window_strides": (1,) * (len(shapes[0]) - 2), "padding": "VALID", **options}
    fn = lambda x, k: jax.lax.conv_general_dilated(x, k, **options)  # noqa: E731
    return trace(fn, *operands), fn, operands


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_has_its_value_and_gradients(name):
    eqn, fn, operands = convolution(name)
    assert _operations.is_convolution(eqn)
    assert (_operations.matmul(eqn, 1) is not None) == name.startswith("of points")
    ours, expected = (
        jax.value_and_grad(lambda x, k, fn=fn: jnp.sum(jnp.sin(fn(x, k))), (0, 1))(*operands)
        for fn in (lambda x, k: _operations.convolve(eqn, x, k), fn)
    )
    chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_convolutions_are_found_inside():
    eqn, fn, operands = convolution("plain")
    hidden = trace(lambda x, k: jax.lax.cond(x[0, 0, 0] > 0, fn, fn, x, k), *operands)
    grouped = trace(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=3
        ),
        operands[0],
        jnp.ones((3, 1, 3)),
    )
    assert _operations.contains_convolution(eqn)
    assert _operations.contains_convolution(hidden)
    assert not _operations.is_convolution(hidden)
    assert not _operations.contains_convolution(grouped)
    assert _operations.matmul(grouped, 1) is None
