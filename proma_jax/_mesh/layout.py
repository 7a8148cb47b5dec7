"""How what belongs to a parameter leaf is spread over a mesh, which the arithmetic cannot see.

With it the products of all pairs of sequences need no sequence's dense scores anywhere but in
parts: they are exchanged so that each device holds the same part of every sequence's score, where
by default XLA would bring all scores whole to every device.

XLA exchanges over several mesh axes at once only if these come in the same order before, at the
sequences, and after, at the features. There the order is that of the parameter leaf. So sequences
are first numbered anew, in that order, for which no device sends anything.

Example:
  >>> numbering = Numbering((2, 3), (1, 0))  # of 6 sequences on 2 × 3 devices
  >>> numbering.forth(jax.numpy.arange(6)).tolist()
  [0, 3, 1, 4, 2, 5]
  >>> numbering.back(numbering.forth(jax.numpy.arange(6))).tolist()
  [0, 1, 2, 3, 4, 5]
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from proma_jax._mesh.arrays import spec_within, spread
from proma_jax._mesh.axes import (
    Spec,
    axis_names,
    explicit_batch_axes,
    mesh_with,
    names_in,
    num_devices,
    spec_of,
    without,
    without_leading,
)


@dataclasses.dataclass(frozen=True)
class Numbering:
    """Two ways to number sequences that are spread over mesh axes: by the axes in either order.

    Attributes:
      sizes: of the mesh axes, as the sequences' own numbers go through them, the slowest first.
      order: the same axes, by their places in `sizes`, as the other numbers go through them.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]

    def forth(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """An array with the sequences along an axis, in the other numbering."""
        return self._moved(x, axis, self.sizes, self.order, range(len(self.order)))

    def back(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """Undoes `forth`."""
        sizes = [self.sizes[i] for i in self.order]
        return self._moved(x, axis, sizes, range(len(self.order)), self.order)

    def _moved(
        self,
        x: jax.Array,
        axis: int,
        sizes: Sequence[int],
        from_places: Sequence[int],
        to_places: Sequence[int],
    ) -> jax.Array:
        if self.order == tuple(sorted(self.order)):
            return x
        axis %= x.ndim
        each = x.shape[axis] // math.prod(sizes)
        split = x.reshape(*x.shape[:axis], *sizes, each, *x.shape[axis + 1 :])
        places = ([axis + i for i in of] for of in (from_places, to_places))
        return jnp.moveaxis(split, *places).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays that belong to a parameter leaf are spread over a mesh.

    Attributes:
      gradient: the parameter leaf and its gradients; None if that is not known.
      by_sequence: its dense scores (b, *layers, ...) as they are made, every sequence's where its
        factors are; None if that is not known.
      numbering: how sequences are numbered anew before they are exchanged.
      renumbered: `by_sequence` in these numbers, where the same scores are on the same devices.
      by_feature: its dense scores as they are used, the same part of all; None likewise.
    """

    gradient: Spec
    by_sequence: Spec = None
    numbering: Numbering = Numbering((), ())
    renumbered: Spec = None
    by_feature: Spec = None


def layout_of(
    leaf: Any,
    sequences: jax.Array,
    in_layout: Callable[[jax.Array], jax.Array],
    num_layer_axes: int,
    batch_axes: Sequence[str] = (),
    spec: Spec = None,
) -> Layout | None:
    """The layout for a parameter leaf's scores, None if there is nothing to say.

    Under Explicit axes all is known from the arrays, under Auto axes what `batch_axes` and `spec`
    tell.

    Args:
      leaf: the parameter leaf, or an array spread like it.
      sequences: an array whose first axis is the sequences, spread as they are.
      in_layout: reads the leaf as (*layers, ...).
      num_layer_axes: how many axes of that are layers.
      batch_axes: the mesh axes over which the sequences are spread, under Auto axes.
      spec: how the leaf is spread over Auto axes, None if that is not known.
    """
    mesh = mesh_with(AxisType.Explicit, (leaf, sequences))
    if mesh is not None:
        batch_axes, spec = explicit_batch_axes(sequences), spec_of(leaf)
    else:
        mesh = mesh_with(AxisType.Auto, (leaf, sequences))
        if mesh is None or spec is None:
            return None
    within = spec_within(leaf, in_layout, spec)
    if within is None or not batch_axes:
        return Layout(spec)
    shape = jax.eval_shape(in_layout, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)).shape
    features = [*within, *[None] * len(shape)][: len(shape)]
    if sequences.shape[0] % num_devices(mesh, batch_axes):
        return Layout(spec)
    own = without(features, batch_axes)
    free = tuple(name for name in batch_axes if name not in names_in(features))
    if free:
        most_spread_first = sorted(
            range(num_layer_axes, len(shape)), key=lambda i: -len(axis_names(features[i]))
        )
        for i in most_spread_first:
            joined = (*axis_names(features[i]), *free)
            if set(joined) <= set(batch_axes) and shape[i] % num_devices(mesh, joined) == 0:
                features[i] = joined
                break
        else:
            return Layout(spec)
    in_features = [name for name in names_in(features) if name in batch_axes]
    sizes = tuple(mesh.shape[name] for name in batch_axes)
    return Layout(
        spec,
        by_sequence=PartitionSpec(tuple(batch_axes), *own),
        numbering=Numbering(sizes, tuple(list(batch_axes).index(name) for name in in_features)),
        renumbered=PartitionSpec(tuple(in_features), *own),
        by_feature=PartitionSpec(None, *features),
    )


def by_feature(layers: jax.Array, layout: Layout) -> jax.Array:
    """An array (*layers, ...) spread like one of a leaf's dense scores, as they are used."""
    if layout.by_feature is None:
        return layers
    return spread(layers, without_leading(layout.by_feature, 1))
