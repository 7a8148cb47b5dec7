"""Orthonormal bases and dominant subspaces, against float64 NumPy and by their promises."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from proma_jax.project.linalg import _inverse, dominant_directions, orthonormal_basis, random_start
from tests import oracles
from tests.cases import normal

pytestmark = pytest.mark.any_version

METHODS = ("cholesky_qr", "qr", "svd")
basis_of = jax.jit(orthonormal_basis, static_argnames=("method", "rtol"))
KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnames=("rank", "power_iterations", "orthonormalization"))
def subspace_of(rows, rank, key, kept=None, power_iterations=2, orthonormalization="cholesky_qr"):
    """A basis of the dominant subspace of one matrix."""
    start = random_start(key, rank, rows.shape[-1])
    [directions] = dominant_directions(
        [rows], start, kept=[kept], power_iterations=power_iterations
    )
    return orthonormal_basis(directions, orthonormalization)


def matrix(rng, m, r, rank, condition):
    """(m, r) with `rank` singular values from 1 down to 1 / condition."""
    u, _ = np.linalg.qr(rng.normal(size=(m, rank)))
    v, _ = np.linalg.qr(rng.normal(size=(r, rank)))
    return (u * np.geomspace(1, 1 / condition, rank)) @ v.T


def assert_orthonormal_or_zero(basis, tolerance=5e-6):
    basis = np.float64(basis)
    present = np.linalg.norm(basis, axis=1) > 0.5
    np.testing.assert_allclose(basis @ basis.T, np.diag(present), atol=tolerance)


def projector(basis):
    """The projection on the span of a basis' rows."""
    return np.float64(basis).T @ np.float64(basis)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 4), (4, 4), (8, 16), (10, 96), (40, 200), (7, 3)]),
    rank=st.floats(0, 1),
    condition=st.sampled_from([1.0, 1e2, 1e4, 1e6]),
    method=st.sampled_from(METHODS),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    duplicates=st.booleans(),
)
def test_bases_are_orthonormal_and_span_the_rows(
    seed, shape, rank, condition, method, scale, duplicates
):
    assume(method != "cholesky_qr" or shape[0] <= shape[1])
    rng = np.random.default_rng(seed)
    r, d = shape
    rows = matrix(rng, r, d, round(rank * min(r, d)), condition)
    if duplicates:
        rows = rows[rng.integers(0, r, r)]
    rows = jnp.asarray(rows * scale, jnp.float32)
    basis = basis_of(rows, method)
    chex.assert_shape(basis, (min(r, d), d))
    assert_orthonormal_or_zero(basis)
    unit = oracles.unit_rows(rows)
    missed = np.linalg.norm(unit - unit @ projector(basis), axis=1)
    assert missed.max(initial=0) < (2e-3 if method == "cholesky_qr" else 5e-5)


@pytest.mark.parametrize("method", METHODS)
def test_well_conditioned_rows_are_spanned_to_rounding(method):
    rows = jnp.asarray(matrix(np.random.default_rng(0), 20, 300, 20, 100.0), jnp.float32)
    expected = oracles.range_of(rows)
    np.testing.assert_allclose(projector(basis_of(rows, method)), projector(expected), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_absent_directions_are_zero_rows(method):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(matrix(rng, 10, 96, 3, 1.0), jnp.float32)
    assert jnp.sum(jnp.linalg.norm(basis_of(rows, method), axis=1) > 0.5) == 3
    chex.assert_trees_all_equal(basis_of(jnp.zeros((3, 8)), method), jnp.zeros((3, 8)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_gives_nan(method, poison):
    rows = jnp.ones((3, 8)).at[2, 1].set(poison)
    assert jnp.isnan(basis_of(rows, method)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_subspace_iteration_matches_float64(method, iterations):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(50, 12)) * np.geomspace(1, 0.05, 12), jnp.float32)
    basis = subspace_of(rows, 4, KEY, power_iterations=iterations, orthonormalization=method)
    expected = oracles.subspace(rows, jax.random.normal(KEY, (4, 12)), iterations)
    np.testing.assert_allclose(projector(basis), projector(expected), atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_many_iterations_converge_to_the_exact_subspace(method, scale):
    rng = np.random.default_rng(0)
    rows = matrix(rng, 60, 24, 24, 1e5)
    exact = np.linalg.svd(rows)[2][:6]
    rows = jnp.asarray(rows * scale, jnp.float32)
    basis = subspace_of(rows, 6, KEY, power_iterations=20, orthonormalization=method)
    np.testing.assert_allclose(projector(basis), projector(exact), atol=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_beyond_the_matrix_gives_its_whole_row_space(method):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(matrix(rng, 30, 12, 3, 2.0), jnp.float32)
    basis = subspace_of(rows, 8, KEY, orthonormalization=method)
    assert_orthonormal_or_zero(basis)
    np.testing.assert_allclose(np.float64(rows) @ projector(basis), rows, atol=1e-5)
    nothing = subspace_of(jnp.zeros((5, 4)), 2, KEY, orthonormalization=method)
    chex.assert_trees_all_equal(nothing, jnp.zeros((2, 4)))


def test_more_rows_than_columns_are_refused_by_cholesky_qr():
    with pytest.raises(ValueError, match=r"cholesky_qr needs at most.*\(3, 2\)"):
        basis_of(jnp.ones((3, 2)), "cholesky_qr")


def test_neither_the_order_of_tokens_nor_padding_change_the_subspace():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 16)) * np.geomspace(1, 0.1, 16)
    expected = projector(subspace_of(jnp.float32(rows), 5, KEY))
    padded = np.concatenate([rows[rng.permutation(40)], np.zeros((9, 16))])
    left_out = np.concatenate([rows, 100 * rng.normal(size=(9, 16))])
    for basis in (
        subspace_of(jnp.float32(padded), 5, KEY),
        subspace_of(jnp.float32(left_out), 5, KEY, kept=jnp.arange(49) < 40),
    ):
        np.testing.assert_allclose(projector(basis), expected, atol=3e-6)


def test_matrices_together_give_what_each_gives_alone():
    """Of 12 columns, where X is multiplied, and of 96, where its Gram matrix is; in two layers."""
    rng = np.random.default_rng(0)
    for d, rank in ((12, 2), (96, 30)):
        matrices = [normal(rng, 2, n, d) for n in (40, 50)]
        kept = [None, jnp.arange(100).reshape(2, 50) % 3 > 0]
        start = random_start(KEY, rank, d)
        together = dominant_directions(matrices, start, kept=kept)
        chex.assert_shape(together, (2, 2, rank, d))
        for rows, rows_kept, directions in zip(matrices, kept, together, strict=True):
            for layer in range(2):
                of_layer = None if rows_kept is None else rows_kept[layer]
                expected = subspace_of(rows[layer], rank, KEY, kept=of_layer)
                actual = orthonormal_basis(directions, "cholesky_qr")[layer]
                np.testing.assert_allclose(projector(actual), projector(expected), atol=2e-5)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 40, 100])
def test_the_inverse_of_a_triangular_matrix(n):
    matrix = np.random.default_rng(n).normal(size=(3, n, n))
    factor = np.linalg.cholesky(matrix @ matrix.swapaxes(-1, -2) / n + np.eye(n))
    inverse = np.float64(_inverse(jnp.float32(factor)))
    np.testing.assert_allclose(
        inverse @ factor, np.broadcast_to(np.eye(n), factor.shape), atol=1e-5
    )


@pytest.mark.parametrize("decay", [0.25, 0.5, 1.0, 2.0])
def test_two_iterations_capture_the_energy_of_the_published_scheme(decay):
    """The author's: Ω over tokens, Y = XᵀΩ, one Y ← Xᵀ(X Y), QR. Ours starts over features."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(256, 64)) @ np.linalg.qr(rng.normal(size=(64, 64)))[0]
    rows = rows * np.arange(1.0, 65.0) ** -decay

    def energy(basis):
        return np.linalg.norm(rows @ np.float64(basis).T) ** 2 / np.linalg.norm(rows) ** 2

    ours, published = [], []
    for seed in range(20):
        ours.append(energy(subspace_of(jnp.float32(rows), 10, jax.random.key(seed))))
        start = rows.T @ rng.normal(size=(256, 10))
        published.append(energy(np.linalg.qr(rows.T @ (rows @ start))[0].T))
    assert np.mean(ours) >= np.mean(published)


def test_vmap_and_bfloat16_rows():
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(3, 20, 8)), jnp.bfloat16)
    together = jax.vmap(lambda x: subspace_of(x, 3, KEY))(rows)
    assert together.dtype == jnp.float32
    for x, basis in zip(rows, together, strict=True):
        expected = oracles.subspace(x, jax.random.normal(KEY, (3, 8)), 2)
        np.testing.assert_allclose(projector(basis), projector(expected), atol=1e-4)
