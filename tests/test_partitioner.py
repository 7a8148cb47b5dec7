"""Primitives that XLA may spread over a mesh wrongly where `jax.vmap` maps their gradient.

Each is a part of one function, with a parameter of its own. Eight devices must give what one gives.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import proma_jax as proma
from tests.cases import normal

B, TOKENS, WIDTH = 8, 12, 8
SQUARE = (WIDTH, WIDTH)


def convolution(x, kernel, strides=(1,), padding="SAME", **options):
    axes = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        x[None], kernel, strides, padding, dimension_numbers=axes, **options
    )


def convolution_of_planes(x, kernel):
    return jax.lax.conv_general_dilated(x.reshape(1, 2, 6, WIDTH), kernel, (1, 2), "SAME")


def positions(x):
    """Numbers of tokens that differ from sequence to sequence."""
    return jnp.argsort(x[:, 0])


def positive(matrix):
    return jnp.eye(WIDTH) * 50 + matrix.T @ matrix


# Functions of a parameter and one sequence, and the parameter's shape.
CASES = {
    "convolution": (lambda w, x: convolution(x, w), (3, *SQUARE)),
    "convolution, strided": (lambda w, x: convolution(x, w, (2,)), (3, *SQUARE)),
    "convolution, dilated": (lambda w, x: convolution(x, w, rhs_dilation=(2,)), (3, *SQUARE)),
    "convolution, transposed": (
        lambda w, x: convolution(x, w, padding=((1, 1),), lhs_dilation=(2,)),
        (3, *SQUARE),
    ),
    "convolution, depthwise": (
        lambda w, x: convolution(x, w, feature_group_count=WIDTH),
        (3, 1, WIDTH),
    ),
    "convolution, grouped": (
        lambda w, x: convolution(x, w, feature_group_count=2),
        (3, WIDTH // 2, WIDTH),
    ),
    "convolution, to more": (lambda w, x: convolution(x, w), (3, WIDTH, 2 * WIDTH)),
    "convolution of points": (lambda w, x: convolution(x, w), (1, *SQUARE)),
    "convolution of points, strided": (lambda w, x: convolution(x, w, (2,)), (1, *SQUARE)),
    "convolution of planes": (lambda w, x: convolution_of_planes(x, w), (4, 2, 2, 3)),
    "convolution, computed kernel": (lambda w, x: convolution(x, jnp.tanh(w)), (3, *SQUARE)),
    "convolution of points, computed kernel": (
        lambda w, x: convolution(x, jnp.tanh(w)),
        (1, *SQUARE),
    ),
    "convolution in a scan": (
        lambda w, x: jax.lax.scan(
            jax.checkpoint(lambda h, k: (jnp.tanh(convolution(h, k)[0]), None)), x, w
        )[0],
        (2, 3, *SQUARE),
    ),
    "jnp.convolve": (lambda w, x: jnp.convolve(x[:, 0], w), (WIDTH,)),
    "largest of a window": (
        lambda w, x: jax.lax.reduce_window(x @ w, -jnp.inf, jax.lax.max, (2, 1), (2, 1), "SAME"),
        SQUARE,
    ),
    "mean of a window": (
        lambda w, x: jax.lax.reduce_window(x @ w, 0.0, jax.lax.add, (3, 1), (2, 1), "SAME"),
        SQUARE,
    ),
    "cumulated sum": (lambda w, x: jnp.cumsum(x @ w, axis=0), SQUARE),
    "cumulated product": (lambda w, x: jnp.cumprod(jnp.tanh(x @ w), axis=0), SQUARE),
    "cumulated log-sum-exp": (lambda w, x: jax.lax.cumlogsumexp(x @ w), SQUARE),
    "associative scan": (
        lambda w, x: jax.lax.associative_scan(
            lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (jax.nn.sigmoid(x @ w), x)
        )[1],
        SQUARE,
    ),
    "sort": (lambda w, x: jnp.sort(x @ w, axis=0) * jnp.arange(TOKENS)[:, None], SQUARE),
    "top k": (lambda w, x: jax.lax.top_k(x @ w, 3)[0], SQUARE),
    "lookup": (lambda w, x: w[jnp.argmax(x, axis=1)], SQUARE),
    "kernels by token": (
        lambda w, x: jnp.einsum("ti,tio->to", x, w[jnp.argmax(x[:, :3], axis=1)]),
        (3, *SQUARE),
    ),
    "gather": (lambda w, x: (x @ w)[positions(x)] * x, SQUARE),
    "gather along an axis": (
        lambda w, x: jnp.take_along_axis(x @ w, jnp.argsort(x, axis=1), axis=1) * x,
        SQUARE,
    ),
    "scatter, added": (
        lambda w, x: jnp.zeros_like(x).at[jnp.argmax(x, axis=1)].add(x @ w) * x,
        SQUARE,
    ),
    "scatter": (lambda w, x: jnp.zeros_like(x).at[positions(x)].set(x @ w) * x, SQUARE),
    "sum of segments": (
        lambda w, x: jax.ops.segment_sum(x @ w, jnp.argmax(x, axis=1), num_segments=WIDTH),
        SQUARE,
    ),
    "window": (
        lambda w, x: jax.lax.dynamic_slice_in_dim(x @ w, positions(x)[0] % 4, 5),
        SQUARE,
    ),
    "window of a parameter": (
        lambda w, x: x @ jax.lax.dynamic_slice_in_dim(w, positions(x)[0] % 4, 3).T,
        SQUARE,
    ),
    "window written": (
        lambda w, x: jax.lax.dynamic_update_slice_in_dim(x, x[:3] @ w, positions(x)[0] % 4, 0),
        SQUARE,
    ),
    "Fourier transform": (lambda w, x: jnp.abs(jnp.fft.rfft(x @ w, axis=0)), SQUARE),
    "solve": (lambda w, x: jnp.linalg.solve(positive(x @ w), x.T), SQUARE),
    "Cholesky": (lambda w, x: jnp.linalg.cholesky(positive(x @ w)), SQUARE),
    "QR": (lambda w, x: jnp.linalg.qr(x @ w)[1], SQUARE),
    "singular values": (lambda w, x: jnp.linalg.svd(x @ w, compute_uv=False), SQUARE),
    "batched product": (
        lambda w, x: jnp.einsum("hti,hio->hto", x.reshape(2, 6, WIDTH), w),
        (2, *SQUARE),
    ),
    "attention": (
        lambda w, x: jax.nn.dot_product_attention(
            (x @ w).reshape(TOKENS, 2, -1), *[x.reshape(TOKENS, 2, -1)] * 2, is_causal=True
        ),
        SQUARE,
    ),
    "cond": (
        lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: jnp.cos(x @ w), x),
        SQUARE,
    ),
    "scan": (
        lambda w, x: jax.lax.scan(lambda c, x: (jnp.tanh(c @ w + x), c), jnp.zeros(WIDTH), x)[1],
        SQUARE,
    ),
    "padded, reversed": (lambda w, x: jnp.pad(x @ w, ((1, 2), (0, 0)))[::-1], SQUARE),
}


def parameters():
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)
        for name, (_, shape) in CASES.items()
    }


def logprob_fn(params, x):
    return sum(jnp.sum(jnp.sin(fn(params[name], x))) for name, (fn, _) in CASES.items())


def sequences():
    return normal(1, B, TOKENS, WIDTH)


@functools.cache
def on_one_device():
    return jax.device_get(
        jax.jit(jax.vmap(jax.grad(logprob_fn), (None, 0)))(parameters(), sequences())
    )


def spread(mesh, tree, *spec):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))


def test_scores_of_any_primitive_are_right_on_a_mesh():
    mesh = jax.make_mesh((B,), ("data",), axis_types=(AxisType.Auto,))
    scores_fn = proma.sequence_scores(
        logprob_fn, spmd_axis_name="data", param_specs=PartitionSpec()
    )

    def of_each(params, x):
        _, scores = scores_fn(params, x)
        return jax.lax.map(lambda one_hot: proma.weighted_sum(scores, one_hot), jnp.eye(B))

    with jax.set_mesh(mesh):
        actual = jax.jit(of_each)(spread(mesh, parameters()), spread(mesh, sequences(), "data"))
    for name, expected in on_one_device().items():
        chex.assert_trees_all_close(jax.device_get(actual[name]), expected, atol=1e-3, rtol=1e-3)


def test_the_fused_form_of_any_primitive_is_right_on_a_mesh():
    mesh = jax.make_mesh((B,), ("data",), axis_types=(AxisType.Auto,))
    gradient_fn = proma.accumulated_gradient(
        logprob_fn, spmd_axis_name="data", param_specs=PartitionSpec()
    )
    coefficients = jnp.arange(1.0, 1 + B)[None] / B
    with jax.set_mesh(mesh):
        actual, _ = gradient_fn(
            spread(mesh, parameters()),
            spread(mesh, sequences()[None], None, "data"),
            spread(mesh, coefficients, None, "data"),
            step=0,
        )
    for name, scores in on_one_device().items():
        expected = np.tensordot(coefficients[0], scores, 1)
        chex.assert_trees_all_close(jax.device_get(actual[name]), expected, atol=3e-3, rtol=3e-3)


def test_a_convolution_that_cannot_be_mended_is_refused_on_a_mesh():
    def hidden(w, x):
        return jax.lax.cond(
            x[0, 0] > 0, lambda: jnp.sum(convolution(x, w)), lambda: jnp.sum(x @ w[0])
        )

    w, mesh = jnp.ones((3, *SQUARE)), jax.make_mesh((B,), ("data",), axis_types=(AxisType.Auto,))
    proma.sequence_scores(hidden)(w, sequences())
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"convolution inside of a jax.lax.cond"),
    ):
        proma.sequence_scores(hidden)(w, sequences())
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"take the convolution out"):
        proma.accumulated_gradient(hidden)(w, sequences()[None], jnp.ones((1, B)), 0)
