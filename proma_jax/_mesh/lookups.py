"""Sums of lookups over a mesh: each device adds up some columns of a table, for all sequences.

A device is sent these columns of every token's gradient, and no others. When they are added up, it
exchanges its columns for some rows. By default XLA makes a whole table of every device's own
sequences, and then adds up all these tables.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, PartitionSpec

from proma_jax._mesh.arrays import spread
from proma_jax._mesh.axes import mesh_with, num_devices
from proma_jax.scores.leaf import ScoreLeaf
from proma_jax.scores.tables import LookupFactors


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["indices", "output_grads"],
    meta_fields=["num_embeddings", "num_layer_axes", "view", "dtype", "batch_axes"],
)
@dataclasses.dataclass(frozen=True)
class SharedLookups(LookupFactors):
    """Lookups whose weighted sum all devices share.

    Attributes:
      batch_axes: the Auto mesh axes over which the sequences are spread.
    """

    batch_axes: tuple[str, ...] = ()

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        """As of any scores; each device has some rows of it."""
        made = spread(self.output_grads, PartitionSpec(self.batch_axes))
        columns = spread(made, PartitionSpec(*[None] * (made.ndim - 1), self.batch_axes))
        table = LookupFactors.weighted_sum(dataclasses.replace(self, output_grads=columns), weights)
        return spread(table, PartitionSpec(*[None] * self.num_layer_axes, self.batch_axes))


def shared(scores: ScoreLeaf, batch_axes: Sequence[str]) -> ScoreLeaf:
    """Lookups as `SharedLookups`, if devices can share them evenly; any other scores as they are.

    Args:
      scores: of a leaf.
      batch_axes: the Auto mesh axes over which the sequences are spread.
    """
    if not isinstance(scores, LookupFactors) or not batch_axes:
        return scores
    mesh = mesh_with(AxisType.Auto, scores.output_grads)
    sizes = scores.batch_size, scores.num_embeddings, scores.output_grads.shape[-1]
    if mesh is None or any(size % num_devices(mesh, batch_axes) for size in sizes):
        return scores
    fields = {field.name: getattr(scores, field.name) for field in dataclasses.fields(scores)}
    return SharedLookups(**fields, batch_axes=tuple(batch_axes))
