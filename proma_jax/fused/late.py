"""Leaves that no node makes: what they add comes of their scores, after the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from proma_jax._mesh.layout import Layout
from proma_jax._mesh.scores import with_layout
from proma_jax.capture.program import Program
from proma_jax.capture.search import Path
from proma_jax.scores.leaf import ScoreLeaf
from proma_jax.scores.leaves import DenseScores

Array = jax.Array


def late_scores(
    program: Program,
    dense: dict[int, Array],
    found: dict[Path, Any],
    dtypes: dict[int, Any],
) -> dict[int, ScoreLeaf]:
    """The scores of the leaves that no node makes, by their numbers.

    Args:
      program: the traced function.
      dense: of each leaf with dense scores, these.
      found: what the taps of the others' uses reported.
      dtypes: of the others.
    """
    scores: dict[int, ScoreLeaf] = {
        i: jax.vmap(functools.partial(program.dense_leaf, i))(gradient)
        for i, gradient in dense.items()
    }
    if dtypes:
        factored = jax.vmap(
            lambda found: program.factored(
                list(dtypes), program.reports(found), list(dtypes.values())
            )
        )(found)
        scores |= zip(dtypes, factored, strict=True)
    return scores


class Group(NamedTuple):
    """Leaves that are projected as one.

    Attributes:
      leaves: their numbers.
      total: their total, with an axis of leaves in front where there are several.
      scores: their scores, of which several leaves are the layers.
    """

    leaves: list[int]
    total: Array
    scores: ScoreLeaf


def stacked_vectors(
    scores: dict[int, ScoreLeaf],
    totals: Sequence[Array],
    kinds: Sequence[Any],
    layouts: dict[int, Layout | None],
) -> list[Group]:
    """Puts the many vectors of one size that a model has, as in its norms, into one group each.

    A program of 12 unrolled layers is a quarter smaller with them, and takes 15 % less time to
    compile.

    Args:
      scores: of some leaves, by their numbers.
      totals: of all leaves.
      kinds: for each of the scores what keeps it apart from others.
      layouts: how the scores are spread over a mesh.

    Returns:
      Groups of vectors of one size and kind; every other leaf is a group of its own, whose scores
      know their layout.
    """
    alike: dict[Any, list[int]] = {}
    for (i, leaf), kind in zip(scores.items(), kinds, strict=True):
        key: Any = i
        if isinstance(leaf, DenseScores) and leaf.values.ndim == 2 and not leaf.layer_shape:
            key = leaf.values.shape, leaf.values.dtype, kind
        alike.setdefault(key, []).append(i)

    def group(leaves: list[int]) -> Group:
        if len(leaves) == 1:
            leaf = leaves[0]
            return Group(leaves, totals[leaf], with_layout(scores[leaf], layouts[leaf]))
        values = jnp.stack([scores[i].dense().values for i in leaves], axis=1)
        total = jnp.stack([totals[i] for i in leaves])
        return Group(leaves, total, DenseScores(values, num_layer_axes=1))

    return [group(leaves) for leaves in alike.values()]
