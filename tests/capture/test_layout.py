"""Kernels made of a parameter in any way: their scores are those of `jax.grad`, layer by layer."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

import proma_jax as proma
from tests.capture.test_moves import chains
from tests.cases import normal

pytestmark = pytest.mark.any_version

B, TOKENS = 2, 3


def dense_scores(logprob_fn, params, microbatch):
    """From the library, in the layout of the parameter, and from JAX."""
    _, scores = jax.jit(proma.sequence_scores(logprob_fn))(params, microbatch)
    rows = [proma.weighted_sum(scores, one_hot) for one_hot in np.eye(B, dtype=np.float32)]
    expected = jax.jit(jax.vmap(jax.grad(logprob_fn), (None, 0)))(params, microbatch)
    return jax.tree.map(lambda *x: jnp.stack(x), *rows), expected, scores


@given(chain=chains(), data=st.data())
def test_one_product_with_a_kernel_made_by_moves(chain, data):
    leaf, moves = chain

    def kernel(w):
        return functools.reduce(lambda x, move: move(x), moves, w)

    shape = jax.eval_shape(kernel, leaf).shape
    contracted = data.draw(st.sets(st.integers(0, len(shape) - 1))) if shape else set()
    x = normal(0, B, TOKENS, *(shape[i] for i in sorted(contracted)))

    def logprob_fn(w, x):
        axes = (tuple(range(1, x.ndim)), tuple(sorted(contracted)))
        product = jnp.tensordot(x, kernel(w), axes)
        return jnp.sum(
            jnp.sin(product / 10) * (1 + jnp.arange(product.size).reshape(product.shape))
        )

    ours, expected, scores = dense_scores(logprob_fn, leaf, x)
    event(type(scores).__name__)
    chex.assert_trees_all_close(ours, expected, atol=1e-4 * float(jnp.abs(expected).max() + 0.1))


@given(
    shape=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    merged=st.booleans(),
    reverse=st.booleans(),
    has_one_input=st.booleans(),
)
def test_scans_over_any_axis_of_a_stack_in_any_layout(shape, order, merged, reverse, has_one_input):
    """The scanned axis may be any axis of the leaf, and be merged with the next in the leaf."""
    sizes = [shape[i] for i in order]
    leaf = normal(1, *((shape[0] * shape[1], shape[2]) if merged else shape))
    x = normal(2, B, TOKENS, sizes[1])

    def logprob_fn(w, x):
        stack = w.reshape(shape).transpose(order)

        def step(total, k):
            seen = x if has_one_input else x * (1 + total[:1, :1])
            return jnp.tanh(total + seen @ k), None

        return jnp.sum(jax.lax.scan(step, jnp.zeros((TOKENS, sizes[2])), stack, reverse=reverse)[0])

    ours, expected, scores = dense_scores(logprob_fn, leaf, x)
    event(type(scores).__name__)
    chex.assert_trees_all_close(ours, expected, atol=1e-5)


def test_layers_are_those_of_the_stack_however_it_is_read():
    """The same function, whose kernels are read in four ways: the same scores in all parts."""
    stack, x = normal(0, 3, 4, 4), normal(1, B, TOKENS, 4)

    def scanned(w, h):
        return jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), h, w)[0]

    def unrolled(w, h):
        for i in range(3):
            h = jnp.tanh(h @ w[i])
        return h

    def looped(w, h):
        return jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w[i]), h)

    def restacked(w, h):
        return scanned(jnp.stack([w[0], w[1], w[2]]), h)

    found = []
    for fn in (scanned, unrolled, looped, restacked):
        logprob_fn = lambda w, x, fn=fn: jnp.sum(fn(w, x))  # noqa: E731
        _, scores = jax.jit(proma.sequence_scores(logprob_fn))(stack, x)
        found.append((scores.inputs, scores.output_grads, scores.in_loss, scores.num_layer_axes))
    for other in found[1:]:
        chex.assert_trees_all_close(other, found[0], atol=1e-6)


def test_columns_of_one_input_are_one_layer():
    """A head in chunks, scanned or not, and a split kernel: factors are those of the whole."""
    head, x = normal(0, 4, 12), normal(1, B, TOKENS, 4)

    def whole(w, h):
        return jnp.sin(h @ w)

    def chunked(w, h):
        chunks = w.reshape(4, 3, 4).transpose(1, 0, 2)
        parts = jax.lax.map(jax.checkpoint(lambda k: jnp.sin(h @ k)), chunks)
        return parts.transpose(1, 0, 2).reshape(TOKENS, 12)

    def split(w, h):
        return jnp.concatenate([jnp.sin(h @ k) for k in jnp.split(w, [2, 7], axis=1)], axis=1)

    weights = normal(2, TOKENS, 12)
    found = []
    for fn in (whole, chunked, split):
        logprob_fn = lambda w, x, fn=fn: jnp.sum(weights * fn(w, x))  # noqa: E731
        found.append(jax.jit(proma.sequence_scores(logprob_fn))(head, x)[1])
        assert math.prod(found[-1].inputs.shape) == B * TOKENS * 4
    for other in found[1:]:
        chex.assert_trees_all_close(other, found[0], atol=1e-6)


def test_inputs_are_shared_by_all_kernels_that_read_them():
    """Unrolled stacks, chunks and a product inside of a remat that read one variable."""

    def logprob_fn(p, x):
        h = jnp.tanh(x)
        total = jnp.sum(jnp.sin(h @ p["q"]) * jnp.cos(h @ p["k"]))
        total += jnp.sum(jax.checkpoint(lambda h: jnp.sin(h @ p["v"]))(h))
        return total + jnp.sum(jnp.sin(h @ p["alone"].T[:3].T))

    params = {name: normal(i, 4, 4) for i, name in enumerate("qkv")} | {"alone": normal(3, 4, 5)}
    _, scores = jax.jit(proma.sequence_scores(logprob_fn))(params, normal(4, B, TOKENS, 4))
    assert {leaf.input_group for leaf in scores.values()} == {0}
