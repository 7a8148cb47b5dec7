"""What a variable is said to hold of the parameters, against what it does hold."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name

from proma_jax.capture import _jaxpr, _moves
from proma_jax.capture.known import Scope
from proma_jax.capture.pieces import ABSENT, outer_sum, split, whole

W = jnp.arange(1.0, 21.0).reshape(4, 5)
V = -jnp.arange(1.0, 21.0).reshape(4, 5)
STACK = jnp.arange(1.0, 61.0).reshape(3, 4, 5)


def held(fn, *leaves):
    """The pieces that the result of a function holds of its arguments, None if not known."""
    closed = jax.make_jaxpr(fn)(*leaves)

    def walk(jaxpr, origins, scope):
        known = dict(zip(jaxpr.invars, origins, strict=True))

        def of(atom):
            return known.get(atom) if isinstance(atom, jax.extend.core.Var) else None

        for eqn in jaxpr.eqns:
            operands = [of(atom) for atom in eqn.invars]
            body = _jaxpr.body(eqn)
            if body is not None:
                results = walk(body.jaxpr, operands, scope.inside(eqn, body))
            elif any(operands):
                values = functools.partial(lambda eqn, i: scope.everywhere(eqn.invars[i]), eqn)
                results = _moves.moved(eqn, operands, values)
                if results is None:
                    return None
            else:
                results = [None] * len(eqn.outvars)
            known |= dict(zip(eqn.outvars, results, strict=True))
        return [of(atom) for atom in jaxpr.outvars]

    origins = [(whole(i, leaf.shape),) for i, leaf in enumerate(leaves)]
    results = walk(closed.jaxpr, origins, Scope(closed.jaxpr, closed.consts))
    return None if results is None else results[0] or ()


def rebuilt(pieces, shape, *leaves):
    """A variable of this shape from what it holds of the leaves, zero elsewhere."""
    total = np.zeros(math.prod(shape))
    for piece in pieces:
        places = functools.reduce(outer_sum, piece.axes, piece.offsets.ravel())
        flat = np.asarray(leaves[piece.leaf], np.float64).ravel()
        total += np.where(places == ABSENT, 0, piece.scale * flat[places])
    return total.reshape(shape)


MOVES = {
    "transposed": lambda w: w.T,
    "reshaped": lambda w: w.reshape(2, 10),
    "reshaped across axes": lambda w: w[:, :4].reshape(2, 2, 2, 2).transpose(2, 0, 3, 1),
    "with new axes": lambda w: w[None, :, None],
    "squeezed": lambda w: jnp.squeeze(w.reshape(1, 4, 1, 5), (0, 2)),
    "cast": lambda w: w.astype(jnp.bfloat16),
    "named": lambda w: checkpoint_name(w, "name"),
    "copied": lambda w: jnp.copy(w),
    "behind a barrier": lambda w: jax.lax.optimization_barrier((w, 1))[0],
    "of less precision": lambda w: jax.lax.reduce_precision(w, 8, 20),
    "sliced": lambda w: w[1:, ::2],
    "indexed": lambda w: w[2],
    "indexed by arrays": lambda w: w[jnp.array([2, 0, -1])],
    "columns by arrays": lambda w: w[:, jnp.array([[4, 0]])],
    "clipped": lambda w: jnp.take(w, jnp.array([9, -9]), axis=0, mode="clip"),
    "computed index": lambda w: jax.lax.dynamic_index_in_dim(w, jnp.arange(9)[7] // 2 % 3),
    "window": lambda w: jax.lax.dynamic_slice(w, (jnp.int32(9), jnp.int32(1)), (2, 3)),
    "reversed": lambda w: w[::-1, ::-1],
    "broadcast": lambda w: jnp.broadcast_to(w, (2, 4, 5)),
    "repeated rows": lambda w: jnp.broadcast_to(w[:1], (3, 5)),
    "padded": lambda w: jax.lax.pad(w, 0.0, ((1, 2, 1), (-1, -2, 0))),
    "concatenated": lambda w: jnp.concatenate([w, jnp.zeros((4, 1)), w[:, :2]], axis=1),
    "stacked": lambda w: jnp.stack([w, jnp.zeros((4, 5)), w], axis=1),
    "unstacked": lambda w: jnp.unstack(w, axis=1)[3],
    "split": lambda w: jnp.split(w, [1, 3], axis=1)[1],
    "scaled": lambda w: -(0.5 * w) / 4,
    "doubled": lambda w: w + w,
    "in a jit": lambda w: jax.jit(lambda w, i: jax.jit(jnp.transpose)(w)[i])(w, 1),
    "sheared": lambda w: jnp.roll(w, 1, axis=0),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_are_followed(name):
    pieces = held(MOVES[name], W)
    result = MOVES[name](W)
    assert pieces
    np.testing.assert_allclose(rebuilt(pieces, result.shape, W), np.float64(result))


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, v: jnp.concatenate([w, v], axis=1)[:, 3:7],
        lambda w, v: jnp.stack([w, v])[:, 1],
        lambda w, v: w - 2 * v,
        lambda w, v: w.reshape(5, 4).T + v,
    ],
)
def test_several_parameters_are_followed(fn):
    pieces = held(fn, W, V)
    assert {piece.leaf for piece in pieces} == {0, 1}
    np.testing.assert_allclose(rebuilt(pieces, fn(W, V).shape, W, V), np.float64(fn(W, V)))


def test_what_is_cut_away_is_not_held():
    assert held(lambda w, v: jnp.concatenate([w, v])[:4], W, V)[0].leaf == 0
    assert len(held(lambda w, v: jnp.concatenate([w, v])[:4], W, V)) == 1
    assert held(jax.lax.stop_gradient, W) == ()


@pytest.mark.parametrize(
    "fn",
    [
        lambda w: w * w,
        lambda w: w * jnp.arange(5.0),
        lambda w: 1 / w,
        lambda w: w + 1,
        lambda w: jnp.sum(w, axis=0),
        lambda w: w.astype(jnp.int32),
        lambda w: w[jnp.array([0, 9])],
        lambda w: jax.lax.pad(jnp.ones(3), w[0, 0], ((1, 1, 0),)),
        lambda w: w[:, :4].reshape(-1)[1:].reshape(3, 5),
        lambda w: w[jnp.array([0, 1]), jnp.array([1, 0])],
        lambda w: jnp.where(w > 3, w, 0),
    ],
)
def test_what_changes_more_than_places_is_not(fn):
    assert held(fn, W) is None


@pytest.mark.parametrize(
    ("fn", "key"),
    [
        (jnp.transpose, "permutation"),
        (lambda w: w[None], "broadcast_dimensions"),
        (lambda w: w[1:], "start_indices"),
        (lambda w: w[::-1], "dimensions"),
        (lambda w: jnp.split(w, 2)[0], "axis"),
        (lambda w: jnp.concatenate([w, w]), "dimension"),
        (lambda w: jax.lax.pad(w, 0.0, ((1, 1, 0),) * 2), "padding_config"),
    ],
)
def test_a_move_with_unknown_params_is_not(fn, key):
    eqn = next(e for e in jax.make_jaxpr(fn)(W).jaxpr.eqns[::-1] if key in e.params)
    origins = [(whole(0, W.shape),)] * len(eqn.invars)
    origins = origins[: 1 + (key == "dimension")] + [None] * (len(eqn.invars) - 1)
    eqn = eqn.replace(params={k: v for k, v in eqn.params.items() if k != key})
    assert _moves.moved(eqn, origins[: len(eqn.invars)], lambda i: None) is None


def draw_move(draw, shape):
    """A function that moves the entries of an array of this shape, and the result's shape."""
    kind = draw(
        st.sampled_from(
            ["transpose", "reshape", "slice", "reverse", "pad", "repeat", "take", "join", "index"]
        )
    )
    axis = draw(st.integers(0, len(shape) - 1))
    length = shape[axis]
    match kind:
        case "transpose":
            order = draw(st.permutations(range(len(shape))))
            return lambda x: x.transpose(order)
        case "reshape":
            size = math.prod(shape)
            first = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
            return lambda x: x.reshape(first, size // first)
        case "slice":
            start = draw(st.integers(0, length - 1))
            stop = draw(st.integers(start + 1, length))
            step = draw(st.integers(1, 2))
            return lambda x: jax.lax.slice_in_dim(x, start, stop, step, axis)
        case "reverse":
            return lambda x: jnp.flip(x, axis)
        case "pad":
            low, high = draw(st.tuples(*[st.integers(0, 2)] * 2))
            config = [(low, high, 0) if i == axis else (0, 0, 0) for i in range(len(shape))]
            return lambda x: jax.lax.pad(x, 0.0, config)
        case "repeat":
            return lambda x: jnp.broadcast_to(x, (2, *x.shape))
        case "take":
            indices = draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=3))
            return lambda x: jnp.take(x, jnp.asarray(indices), axis=axis)
        case "join":
            return lambda x: jnp.concatenate([jnp.zeros_like(x), x, -x], axis)
        case "index":
            index = draw(st.integers(0, length - 1))
            return lambda x: jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=x.ndim == 1)


@st.composite
def chains(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    leaf = jnp.arange(1.0, 1 + math.prod(shape)).reshape(shape)
    moves = []
    for _ in range(draw(st.integers(1, 5))):
        current = jax.eval_shape(lambda x: functools.reduce(lambda x, f: f(x), moves, x), leaf)
        moves.append(draw_move(draw, current.shape))
    return leaf, moves


@pytest.mark.any_version
@given(chain=chains())
def test_chains_of_moves_are_followed(chain):
    leaf, moves = chain

    def fn(x):
        return functools.reduce(lambda x, f: f(x), moves, x)

    pieces = held(fn, leaf)
    assume(pieces is not None)
    np.testing.assert_array_equal(rebuilt(pieces, fn(leaf).shape, leaf), np.float64(fn(leaf)))


def test_numbers_are_split_into_sums_where_they_are_such():
    rows, columns = np.array([0, 10, ABSENT, 30]), np.array([2, ABSENT, 0])
    grid = outer_sum(rows, columns)
    again = split(grid, [4, 3])
    np.testing.assert_array_equal(outer_sum(*again), grid)
    grid[0] += 1
    assert split(grid, [4, 3]) is None
    absent = split(np.full(6, ABSENT), [2, 3])
    np.testing.assert_array_equal(outer_sum(*absent), np.full(6, ABSENT))
