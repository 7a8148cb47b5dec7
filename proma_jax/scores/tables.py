"""Scores of tables: `LookupFactors`, and `SumScores` of those that are looked up and multiplied.

Example:
  >>> import jax.numpy as jnp
  >>> lookups = LookupFactors(jnp.array([[0, 2], [2, 2]]), jnp.ones((2, 2, 1)), num_embeddings=3)
  >>> lookups.weighted_sum(jnp.array([1.0, 10.0])).tolist()
  [[1.0], [0.0], [21.0]]
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from proma_jax.arithmetic import divide, wide
from proma_jax.scores.leaf import ScoreLeaf, View, gradient_dtype, weighted
from proma_jax.scores.leaves import DenseScores, LayerFactors

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["indices", "output_grads"],
    meta_fields=["num_embeddings", "num_layer_axes", "view", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class LookupFactors(ScoreLeaf):
    """Scores of an embedding table: row indices_t of s_i is the sum of their output gradients.

    Attributes:
      indices: (b, *layers, tokens), integers in [0, num_embeddings).
      output_grads: (b, *layers, tokens, d), the gradient of log π with respect to the rows read.
      num_embeddings: rows of the table.
      num_layer_axes: how many leading axes after b count layers. Default 0: one layer.
      view: how the parameter leaf is read as (*layers, num_embeddings, d). Default: as it is.
      dtype: of the gradients made from the scores. Default: that of `output_grads`.
    """

    indices: Array
    output_grads: Array
    num_embeddings: int
    num_layer_axes: int = 0
    view: View = View()
    dtype: Any = None
    arrays = ("output_grads", "indices")

    def _one_layer_shape(self) -> tuple[int, ...]:
        return self.num_embeddings, self.output_grads.shape[-1]

    def gram(self) -> Array:
        return _gram_by_columns(self)

    def dots(self, layers: Array) -> Array:
        indices, output_grads = self._layers_first("indices"), self._layers_first("output_grads")
        flat = indices.reshape(*self.layer_shape, math.prod(indices.shape[self.num_layer_axes :]))
        rows = jnp.take_along_axis(wide(layers), flat[..., None], axis=-2, mode="promise_in_bounds")
        products = rows.reshape(output_grads.shape) * wide(output_grads)
        return jnp.sum(products, axis=(-2, -1))

    def weighted_sum(self, weights: Array) -> Array:
        rows = weighted(weights, self._layers_first("output_grads"), self.num_layer_axes)
        width = rows.shape[-1]

        def one_layer(indices: Array, rows: Array) -> Array:
            table = jnp.zeros((self.num_embeddings, width), rows.dtype)
            return table.at[indices.reshape(-1)].add(rows.reshape(-1, width))

        for _ in range(self.num_layer_axes):
            one_layer = jax.vmap(one_layer)
        return one_layer(self._layers_first("indices"), rows)

    def dense(self) -> DenseScores:
        return _dense_by_columns(self)

    def rescaled(self) -> tuple[LookupFactors, Array]:
        size = self._max_abs("output_grads")
        return self.times(divide(jnp.ones_like(size), size)), size

    def times(self, factor: Array) -> LookupFactors:
        return dataclasses.replace(self, output_grads=self._scale("output_grads", factor))

    def are_zero(self) -> Array:
        return self._max_abs("output_grads") == 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class SumScores(ScoreLeaf):
    """Scores that are the sum of several score leaves of one parameter, as for a tied embedding.

    Attributes:
      parts: score leaves of one layer each (no layer axes), each with a view of the same leaf.
    """

    parts: tuple[DenseScores | LayerFactors | LookupFactors, ...]
    num_layer_axes = 0
    view = View()

    @property
    def dtype(self) -> Any:
        return gradient_dtype(self.parts[0])

    @property
    def batch_size(self) -> int:
        """b, the number of sequences."""
        return self.parts[0].batch_size

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return ()

    def _one_layer_shape(self) -> tuple[int, ...]:
        return self.parts[0].leaf_shape

    def gram(self) -> Array:
        return _gram_by_columns(self)

    def dots(self, layers: Array) -> Array:
        return functools.reduce(
            jnp.add, [part.dots(part.view.apply(layers)) for part in self.parts]
        )

    def weighted_sum(self, weights: Array) -> Array:
        totals = [part.view.invert(part.weighted_sum(weights)) for part in self.parts]
        return functools.reduce(jnp.add, totals)

    def dense(self) -> DenseScores:
        return _dense_by_columns(self)

    def rescaled(self) -> tuple[SumScores, Array]:
        parts, sizes = zip(*(part.rescaled() for part in self.parts), strict=True)
        size = functools.reduce(jnp.maximum, sizes)
        parts = tuple(
            part.times(divide(part_size, size))
            for part, part_size in zip(parts, sizes, strict=True)
        )
        return SumScores(parts), size

    def times(self, factor: Array) -> SumScores:
        return SumScores(tuple(part.times(factor) for part in self.parts))

    def are_zero(self) -> Array:
        return functools.reduce(jnp.logical_and, [part.are_zero() for part in self.parts])


def _gram_by_columns(scores: LookupFactors | SumScores) -> Array:
    """Inner products from `dots` and `weighted_sum`, one leaf-sized array at a time."""

    def column(one_hot: Array) -> Array:
        return scores.dots(scores.weighted_sum(one_hot))

    return jnp.moveaxis(jax.lax.map(column, jnp.eye(scores.batch_size)), 0, -1)


def _dense_by_columns(scores: LookupFactors | SumScores) -> DenseScores:
    """The scores themselves, from `weighted_sum`."""
    values = jax.vmap(scores.weighted_sum)(jnp.eye(scores.batch_size))
    return DenseScores(values, scores.num_layer_axes, scores.view, scores.dtype)
