"""Matrices: an orthonormal basis of the rows' span, and their dominant subspaces.

A basis is a matrix with orthonormal rows, the transpose of the paper's Q. Both functions are
rank-revealing: a direction that the matrix does not have becomes a zero row of the basis, so that
zero, repeated and dependent rows are harmless, and both give the same at every scale. All
arithmetic is float32 (float64 for a float64 matrix) at full matmul precision. NaN or infinity
anywhere in the matrix makes the whole basis NaN, and reaches no decomposition.

Example:
  >>> import jax, jax.numpy as jnp
  >>> rows = jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [3.0, 0.0, 0.0]])
  >>> start = random_start(jax.random.key(0), 1, 3)
  >>> [directions] = dominant_directions([rows], start, power_iterations=20)
  >>> basis = orthonormal_basis(directions, "cholesky_qr")
  >>> print(jnp.abs(basis).round(3))
  [[1. 0. 0.]]
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike

from proma_jax.arithmetic import contract, divide, wide, wide_dtype

Array = jax.Array
Orthonormalization = Literal["cholesky_qr", "qr", "svd"]

_TILE = 16
"""Matrix units multiply this many rows as fast as one: bases are padded to a multiple of it."""

_RTOL = 4e-6
"""Directions of a product Q Xᵀ X below this much of its largest are float32's rounding."""


def orthonormal_basis(
    rows: jax.Array, method: Orthonormalization, rtol: ArrayLike = _RTOL
) -> jax.Array:
    """An orthonormal basis of the span of a matrix's rows.

    Args:
      rows: (..., r, d), one or several matrices, for "cholesky_qr" with r ≤ d. The rows' lengths do
        not matter: each is first scaled to unit length.
      method: "cholesky_qr" (up to five passes of matrix products and r x r factorisations, the
        fastest on accelerators), "qr" (Householder, then a singular value decomposition of the
        r x r factor) or "svd".
      rtol: "qr" and "svd" leave out directions below `rtol` times the largest singular value.
        Default: 4e-6, about 32 float32 epsilons. "cholesky_qr" has a fixed and coarser measure: it
        may leave out a row whose distance from the span of the others is below about 1e-3.

    Returns:
      (..., min(r, d), d) orthonormal rows, zero where the rank is exhausted.
    """
    if method == "cholesky_qr" and rows.shape[-2] > rows.shape[-1]:
        raise ValueError(f"cholesky_qr needs at most as many rows as columns, got {rows.shape}.")
    rows = _unit_rows(wide(rows))
    finite = jnp.all(jnp.isfinite(rows), axis=(-2, -1), keepdims=True)
    rows = jnp.where(finite, rows, 0)
    if method == "cholesky_qr":
        basis = _cholesky_qr(rows)
    elif method == "qr":
        orthogonal, triangular = jnp.linalg.qr(jnp.matrix_transpose(rows))
        vectors = _right_singular_vectors(jnp.matrix_transpose(triangular), rtol)
        basis = contract("...ij,...dj->...id", vectors, orthogonal)
    else:
        basis = _right_singular_vectors(rows, rtol)
    return jnp.where(finite, basis, jnp.nan)


def random_start(key: jax.Array, rank: int, dimension: int) -> jax.Array:
    """Gaussian directions (rank, dimension) from which `dominant_directions` may start.

    In float32, in float64 where JAX has it enabled.
    """
    return jax.random.normal(key, (rank, dimension))


def dominant_directions(
    matrices: Sequence[jax.Array],
    start: jax.Array,
    *,
    kept: Sequence[jax.Array | None] | None = None,
    power_iterations: int = 2,
) -> jax.Array:
    """Directions that span about the top right singular subspaces of m matrices.

    By subspace iteration; `orthonormal_basis` makes bases of them. It starts from directions in
    the space of features, so neither the order of the rows nor zero rows among them change it.

    The matrices do not influence one another. They are taken together so that the program holds
    the small factorisations once: for a model of 12 unrolled layers it is then a third of the size,
    and compiles in three quarters of the time.

    Args:
      matrices: each X, (*layers, n, d); n may differ.
      start: (r, d), r at most min(n, d): directions to start from, as of `random_start`.
      kept: for each matrix (*layers, n) bool, the rows that count, or None for all. Default: all.
      power_iterations: how many times Q ← (Q Xᵀ) X, at least 1, with one pass of Cholesky QR
        between them. With 2, from a random start, the captured energy ‖X Qᵀ‖² / ‖X‖² of the basis
        Q is at least that of the published scheme, which is 1.5 in this count.

    Returns:
      (m, *layers, r, d), rows of unit length, or zero.
    """
    rank, d = start.shape
    padding = -rank % _TILE if rank + _TILE <= d else 0
    start = jnp.pad(start.astype(wide_dtype(matrices[0].dtype)), ((0, padding), (0, 0)))
    start = _unit_rows(start)
    by_gram = d <= 2 * power_iterations * rank
    products = [
        _product(rows, rows_kept, by_gram)
        for rows, rows_kept in zip(matrices, kept or [None] * len(matrices), strict=True)
    ]

    def iterate(i: jax.Array, bases: jax.Array) -> jax.Array:
        bases = jnp.stack([product(basis) for product, basis in zip(products, bases, strict=True)])
        bases = divide(bases, jnp.linalg.norm(bases, axis=-1, keepdims=True))
        return jax.lax.cond(i < power_iterations - 1, _conditioned, lambda bases: bases, bases)

    shape = (len(matrices), *matrices[0].shape[:-2], *start.shape)
    zeros = jnp.zeros_like(matrices[0], start.dtype, shape=shape)
    starts = zeros + jnp.broadcast_to(start, shape)
    return jax.lax.fori_loop(0, power_iterations, iterate, starts)[..., :rank, :]


def _product(
    rows: jax.Array, kept: jax.Array | None, by_gram: bool
) -> Callable[[jax.Array], jax.Array]:
    """The function Q ↦ Q Xᵀ X / max|X|², of a Q with unit rows."""
    counts = True if kept is None else kept[..., None]
    magnitudes = jnp.where(counts, jnp.abs(wide(rows)), 0)
    size = jnp.max(magnitudes, axis=(-2, -1), keepdims=True, initial=0)
    to_moderate = 1 / jnp.where(size == 0, 1, size)
    if by_gram:
        moderate = wide(rows) * to_moderate
        counted = moderate if kept is None else jnp.where(kept[..., None], moderate, 0)
        gram = contract("...nd,...ne->...de", counted, counted)
        return lambda basis: contract("...rd,...de->...re", basis, gram)

    def product(basis: jax.Array) -> jax.Array:
        products = contract("...rd,...nd->...rn", basis * to_moderate, rows)
        if kept is not None:
            products = jnp.where(kept[..., None, :], products, 0)
        return contract("...rn,...nd->...rd", products, rows) * to_moderate

    return product


def _unit_rows(rows: jax.Array) -> jax.Array:
    """Rows of unit length at any scale; zero rows stay zero."""
    size = jnp.max(jnp.abs(rows), axis=-1, keepdims=True, initial=0)
    moderate = divide(rows, size)
    return divide(moderate, jnp.linalg.norm(moderate, axis=-1, keepdims=True))


def _right_singular_vectors(matrix: jax.Array, rtol: ArrayLike) -> jax.Array:
    _, values, vectors = jnp.linalg.svd(matrix, full_matrices=False)
    return jnp.where((values > rtol * values[..., :1])[..., None], vectors, 0)


def _cholesky_qr(rows: jax.Array) -> jax.Array:
    """Shifted Cholesky QR: passes that condition and drop rows, one that orthonormalises.

    After L⁻¹ a row falls short of unit length by its share of the shift. Where these shares sum to
    less than 1/2, the rows' Gram matrix is at least I/2, and the last pass may follow.
    """

    def one_pass(state: tuple[Array, Array], constants: tuple[Array, ...]) -> tuple[Any, None]:
        least_length, shift, is_last = constants

        def condition(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            conditioned = _cholesky_pass(rows, shift)
            lengths = jnp.linalg.norm(conditioned, axis=-1, keepdims=True)
            independent = lengths > least_length
            missing = jnp.sum(jnp.where(lengths > 0, 1 - lengths**2, 0), axis=(-2, -1))
            kept = jnp.where(independent, conditioned / jnp.where(independent, lengths, 1), 0)
            return kept, jnp.all(missing < 0.5)

        rows, is_ready = state
        keep = is_ready & ~is_last
        return jax.lax.cond(keep, lambda rows: (rows, is_ready), condition, rows), None

    shift = 4.0 * rows.shape[-2]
    constants = (
        jnp.array([0.01, 0.1, 0.5, 0.5, 0.5], rows.dtype),
        jnp.array([shift, shift, shift, shift, 1], rows.dtype),
        jnp.arange(5) == 4,
    )
    is_ready = jnp.zeros_like(rows, bool, shape=())
    return jax.lax.scan(one_pass, (rows, is_ready), constants)[0][0]


def _conditioned(rows: jax.Array) -> jax.Array:
    """The same span of unit rows, in rows of a condition number of at most about 1e3."""
    return _cholesky_pass(rows, 4 * rows.shape[-2])


def _cholesky_pass(rows: jax.Array, shift: ArrayLike) -> jax.Array:
    """L⁻¹ times the rows, where L Lᵀ is their Gram matrix plus shift · epsilon · I."""
    gram = contract("...id,...jd->...ij", rows, rows)
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    added = jnp.where(diagonal == 0, 1, shift * jnp.finfo(gram.dtype).eps)
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    shifted = gram + added[..., None] * identity
    factor = jnp.linalg.cholesky(shifted, symmetrize_input=False)
    return contract("...ij,...jd->...id", _inverse(factor), rows)


def _inverse(factor: jax.Array) -> jax.Array:
    """Of a lower triangular matrix: of its diagonal tiles, then of blocks of twice the size.

    Matrix products do most of the work, where a triangular solve is slow on accelerators, and on a
    CPU stalls when its library's threads and XLA's wait for each other.
    """
    n, size = factor.shape[-1], _TILE
    blocks = 1 << (max(0, n - 1) // size).bit_length()
    padding = [(0, 0)] * (factor.ndim - 2) + [(0, blocks * size - n)] * 2
    padded = jnp.pad(factor, padding)
    outside = jnp.diag((jnp.arange(blocks * size) >= n).astype(factor.dtype))
    padded = padded + jnp.broadcast_to(outside, padded.shape)

    def tiles(row: int, column: int, size: int, every: int) -> jax.Array:
        """(..., tiles, size, size): at (row, column) and every so many tiles down the diagonal."""
        shape = (*factor.shape[:-2], blocks // every, every, size, blocks // every, every, size)
        split = padded.reshape(shape)[..., row, :, :, column, :]
        return jnp.moveaxis(jnp.diagonal(split, axis1=-4, axis2=-2), -1, -3)

    identity = jnp.eye(size, dtype=factor.dtype)
    diagonal = tiles(0, 0, size, 1)
    inverse = solve_triangular(diagonal, jnp.broadcast_to(identity, diagonal.shape), lower=True)
    while blocks > 1:
        below = tiles(1, 0, size, 2)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -contract("...ij,...jk,...kl->...il", second, below, first)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        blocks, size = blocks // 2, 2 * size
    return inverse[..., 0, :n, :n]
