"""Float64 NumPy versions of both transformations that form every matrix, one layer at a time."""

import jax
import numpy as np


def assert_close(actual, expected, tolerance=1e-5):
    """Relative to each leaf's norm; there must be leaves."""
    pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    assert pairs
    for a, e in pairs:
        a, e = np.float64(a), np.float64(e)
        assert np.linalg.norm(a - e) <= tolerance * max(np.linalg.norm(e), 1e-300)


def score(inputs, output_grads):
    """X_iᵀ D_i of one sequence, as a sum of outer products over its tokens."""
    return sum(
        np.outer(x, d) for x, d in zip(np.float64(inputs), np.float64(output_grads), strict=True)
    )


def lookup_score(indices, output_grads, num_embeddings):
    """The score of a table from one sequence's lookups, row by row."""
    table = np.zeros((num_embeddings, output_grads.shape[-1]))
    for index, row in zip(indices, np.float64(output_grads), strict=True):
        table[index] += row
    return table


def unit_rows(scores):
    """(b, n): each score flattened and divided by its norm; zero stays zero."""
    rows = np.float64(scores).reshape(len(scores), -1)
    size = np.abs(rows).max(axis=1, keepdims=True)
    rows = rows / np.where(size == 0, 1, size)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms == 0, 1, norms)


def projection(gradient, scores, solver="qr", ridge=1e-2, rtol=1e-6):
    """P_S(G) for one layer: S spanned by `scores` (b, *shape), G of that shape."""
    rows, flat = unit_rows(scores), np.float64(gradient).ravel()
    if solver == "ridge":
        system = rows @ rows.T + ridge * np.eye(len(rows))
        projected = rows.T @ np.linalg.solve(system, rows @ flat)
    else:
        _, values, directions = np.linalg.svd(rows, full_matrices=False)
        kept = directions[values > rtol * values.max()]
        projected = kept.T @ (kept @ flat)
    return projected.reshape(np.shape(gradient))


def removed(gradient, update, scores, *, shrinkage=1.0, relative_bound=None, **options):
    """What accumulation removes from one layer's G at a microbatch with gradient `update`."""
    projected = projection(gradient, scores, **options)
    if relative_bound is not None:
        length, limit = np.linalg.norm(projected), relative_bound * np.linalg.norm(update)
        if length > limit:
            projected = projected * (limit / length)
    return shrinkage * projected


def accumulate(updates, scores, *, skip_fraction=0.0, **options):
    """G of one layer after the microbatches' gradients (k, *shape), with scores (k, b, *shape)."""
    total = np.zeros(updates[0].shape)
    for m, (update, microbatch_scores) in enumerate(zip(updates, scores, strict=True)):
        if m >= skip_fraction * len(updates):
            total = total - removed(total, update, microbatch_scores, **options)
        total = total + np.float64(update)
    return total


def subspace(rows, start, power_iterations):
    """An orthonormal basis (r, d) after subspace iteration on XᵀX from `start` (r, d)."""
    basis, rows = np.float64(start), np.float64(rows)
    for _ in range(power_iterations):
        basis = range_of((basis @ rows.T) @ rows)
    return basis


def range_of(rows, rtol=1e-6):
    """An orthonormal basis of the span of a matrix's rows, scaled to unit length."""
    _, values, vectors = np.linalg.svd(unit_rows(rows), full_matrices=False)
    return vectors[values > rtol * values.max(initial=0)]


def project_intra(update, inputs, output_grads, starts, power_iterations, shrinkage=1.0):
    """One layer's gradient (d_in, d_out) without its part in the subspaces of X and D (n, d)."""
    in_loss = np.any(np.float64(output_grads) != 0, axis=-1)
    q_x = subspace(inputs[in_loss], starts[0], power_iterations)
    q_d = subspace(output_grads[in_loss], starts[1], power_iterations)
    removed = q_x.T @ (q_x @ np.float64(update) @ q_d.T) @ q_d
    return np.float64(update) - shrinkage * removed
