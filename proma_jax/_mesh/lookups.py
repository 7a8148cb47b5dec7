"""Sums of lookups over a mesh: each device adds up some columns of a table, for all sequences.

It is sent these columns alone of what all tokens add, and then exchanges them for some rows. By
default XLA adds up every device's own sequences to a whole table, and then all these tables.
"""

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, PartitionSpec

from proma_jax._mesh.arrays import spread
from proma_jax._mesh.axes import Spec, mesh_with, num_devices
from proma_jax.scores.leaf import ScoreLeaf
from proma_jax.scores.tables import LookupFactors


def by_column(scores: ScoreLeaf, batch_axes: Sequence[str]) -> ScoreLeaf:
    """Lookups whose weighted sum is spread by columns, if their table can be; other scores as is.

    Args:
      scores: of any leaf.
      batch_axes: the Auto mesh axes over which the sequences are spread.
    """
    if not isinstance(scores, LookupFactors) or not _can_be_shared(scores, batch_axes):
        return scores
    grads = scores.output_grads
    made = spread(grads, PartitionSpec(tuple(batch_axes)))
    columns = spread(made, PartitionSpec(*[None] * (grads.ndim - 1), tuple(batch_axes)))
    return dataclasses.replace(scores, output_grads=columns)


def by_row(table: jax.Array, scores: ScoreLeaf, batch_axes: Sequence[str], spec: Spec) -> jax.Array:
    """The weighted sum of what `by_column` returned, (*layers, rows, d), spread by `spec`."""
    if isinstance(scores, LookupFactors) and _can_be_shared(scores, batch_axes):
        table = spread(table, PartitionSpec(*[None] * (table.ndim - 2), tuple(batch_axes)))
    return spread(table, spec)


def _can_be_shared(scores: LookupFactors, batch_axes: Sequence[str]) -> bool:
    mesh = mesh_with(AxisType.Auto, scores.output_grads)
    if mesh is None or not batch_axes:
        return False
    shared = scores.batch_size, scores.num_embeddings, scores.output_grads.shape[-1]
    return all(size % num_devices(mesh, batch_axes) == 0 for size in shared)
