"""One matrix: an orthonormal basis of its rows' span, and their dominant subspace.

A basis is a matrix with orthonormal rows, the transpose of the paper's Q. Both functions are
rank-revealing: a direction that the matrix does not have becomes a zero row of the basis, so that
zero, repeated and dependent rows are harmless, and both give the same at every scale. All
arithmetic is float32 (float64 for a float64 matrix) at full matmul precision. NaN or infinity
anywhere in the matrix makes the whole basis NaN, and reaches no decomposition.

Example:
  >>> import jax, jax.numpy as jnp
  >>> rows = jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [3.0, 0.0, 0.0]])
  >>> basis = dominant_subspace(rows, 1, jax.random.key(0), power_iterations=20)
  >>> print(jnp.abs(basis).round(3))
  [[1. 0. 0.]]
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from proma_jax.scores import contract, divide, wide, wide_dtype

Orthonormalization = Literal["cholesky_qr", "qr", "svd"]

_RTOL = 4e-6
"""Directions of a product Q Xᵀ X below this much of its largest are float32's rounding."""


def orthonormal_basis(
    rows: jax.Array, method: Orthonormalization, rtol: float = _RTOL
) -> jax.Array:
    """An orthonormal basis of the span of a matrix's rows.

    Args:
      rows: (r, d), for "cholesky_qr" with r ≤ d. Their lengths do not matter: each is first scaled
        to unit length.
      method: "cholesky_qr" (five passes of matrix products and r x r factorisations, the fastest on
        accelerators), "qr" (Householder, then a singular value decomposition of the r x r factor)
        or "svd".
      rtol: "qr" and "svd" leave out directions below `rtol` times the largest singular value.
        Default: 4e-6, about 32 float32 epsilons. "cholesky_qr" has a fixed and coarser measure: it
        may leave out a row whose distance from the span of the others is below about 1e-3.

    Returns:
      (min(r, d), d) orthonormal rows, zero where the rank is exhausted.
    """
    if method == "cholesky_qr" and rows.shape[0] > rows.shape[1]:
        raise ValueError(f"cholesky_qr needs at most as many rows as columns, got {rows.shape}.")
    scaled = _unit_rows(wide(rows))
    finite = jnp.all(jnp.isfinite(scaled))
    scaled = jnp.where(finite, scaled, 0)
    if method == "cholesky_qr":
        basis = _cholesky_qr(scaled)
    elif method == "qr":
        orthogonal, triangular = jnp.linalg.qr(scaled.T)
        vectors = _right_singular_vectors(triangular.T, rtol)
        basis = contract("ij,dj->id", vectors, orthogonal)
    else:
        basis = _right_singular_vectors(scaled, rtol)
    return jnp.where(finite, basis, jnp.nan)


def dominant_subspace(
    rows: jax.Array,
    rank: int,
    key: jax.Array,
    *,
    kept: jax.Array | None = None,
    power_iterations: int = 2,
    orthonormalization: Orthonormalization = "cholesky_qr",
) -> jax.Array:
    """A basis of about the top right singular subspace of a matrix, by subspace iteration.

    It starts from random directions in the space of features, so neither the order of the rows nor
    zero rows among them change it.

    Args:
      rows: X, (n, d).
      rank: dimension r of the subspace, at most min(n, d).
      key: of the Gaussian start, (r, d).
      kept: (n,) bool, the rows that count. Default: all.
      power_iterations: how many times Q ← (Q Xᵀ) X, at least 1, with one pass of Cholesky QR
        between them. With 2 the captured energy ‖X Qᵀ‖² / ‖X‖² is at least that of the published
        scheme, which is 1.5 in this count.
      orthonormalization: of the result, as `method` of `orthonormal_basis`.

    Returns:
      Q, (r, d), with orthonormal rows, zero where X has fewer than r directions.
    """
    basis = jax.random.normal(key, (rank, rows.shape[1]), wide_dtype(rows.dtype))
    for remaining in reversed(range(power_iterations)):
        products = contract("rd,nd->rn", basis, rows)
        if kept is not None:
            products = jnp.where(kept, products, 0)
        basis = contract("rn,nd->rd", _unit_rows(products), rows)
        if remaining:
            basis = _conditioned(_unit_rows(basis))
    return orthonormal_basis(basis, orthonormalization)


def _unit_rows(rows: jax.Array) -> jax.Array:
    """Rows of unit length at any scale; zero rows stay zero."""
    size = jnp.max(jnp.abs(rows), axis=1, keepdims=True, initial=0)
    moderate = divide(rows, size)
    norms = jnp.linalg.norm(moderate, axis=1, keepdims=True)
    return divide(moderate, norms)


def _right_singular_vectors(matrix: jax.Array, rtol: float) -> jax.Array:
    _, values, vectors = jnp.linalg.svd(matrix, full_matrices=False)
    return jnp.where((values > rtol * values[:1])[:, None], vectors, 0)


def _cholesky_qr(rows: jax.Array) -> jax.Array:
    """Shifted Cholesky QR: passes that condition and drop rows, one that orthonormalises."""
    for least_length in (0.01, 0.1, 0.5, 0.5):
        conditioned = _conditioned(rows)
        lengths = jnp.linalg.norm(conditioned, axis=1, keepdims=True)
        independent = lengths > least_length
        rows = jnp.where(independent, conditioned / jnp.where(independent, lengths, 1), 0)
    return _cholesky_pass(rows, shift=1)


def _conditioned(rows: jax.Array) -> jax.Array:
    """The same span of unit rows, in rows of a condition number of at most about 1e3."""
    return _cholesky_pass(rows, shift=4 * rows.shape[0])


def _cholesky_pass(rows: jax.Array, shift: int) -> jax.Array:
    """L⁻¹ times the rows, where L Lᵀ is their Gram matrix plus shift · epsilon · I."""
    gram = contract("id,jd->ij", rows, rows)
    absent = jnp.diagonal(gram) == 0
    diagonal = shift * jnp.finfo(gram.dtype).eps + absent.astype(gram.dtype)
    factor = jnp.linalg.cholesky(gram + jnp.diag(diagonal))
    return solve_triangular(factor, rows, lower=True)
