"""Scores of a parameter leaf that is spread over a mesh, or whose sequences are.

The factors of a score are where its sequence is. To project, every pair of scores is multiplied,
and each with G, which is spread like the parameter leaf: `SpreadScores` holds beside the factors
the dense scores in parts, such that each device has the same part of every sequence's score. They
are exchanged once, by `sequence_scores`, and used by `weighted_sum` and by accumulation.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
  >>> from proma_jax.scores.leaves import DenseScores
  >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
  >>> with jax.set_mesh(mesh):
  ...     scores = DenseScores(jax.device_put(jnp.ones((2, 4)), NamedSharding(mesh, P("data"))))
  ...     leaf = jax.device_put(jnp.ones(4), NamedSharding(mesh, P()))
  ...     spread_scores(scores, leaf).layout.by_feature == P(None, "data")
  True
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from proma_jax._mesh.arrays import automatic, spread
from proma_jax._mesh.axes import Spec, spec_of, without_leading
from proma_jax._mesh.layout import Layout, by_feature, layout_of
from proma_jax.scores.leaf import ScoreLeaf, View, gradient_dtype
from proma_jax.scores.leaves import DenseScores, LayerFactors

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scores", "form"],
    meta_fields=["layout", "exchanged"],
)
@dataclasses.dataclass(frozen=True)
class SpreadScores(ScoreLeaf):
    """Scores that know how they are spread over a mesh.

    Attributes:
      scores: as they were made, each sequence's where the sequence is. Dense scores are replaced by
        the exchanged ones.
      form: the dense form of factors, the same part of every sequence's on each device; None as
        long as it has not been made, or if it does not pay.
      layout: how they, the gradient and `form` are spread.
      exchanged: whether devices have exchanged the dense scores. These then have the layout's other
        numbers of sequences, while all that the methods take and return has their own.
    """

    scores: ScoreLeaf
    form: DenseScores | None
    layout: Layout
    exchanged: bool = False

    @property
    def num_layer_axes(self) -> int:  # type: ignore[override]
        """How many leading axes after b count layers."""
        return self.scores.num_layer_axes

    @property
    def view(self) -> View:  # type: ignore[override]
        """How the parameter leaf is read in the scores' layout."""
        return self.scores.view

    @property
    def dtype(self) -> Any:
        """Of the gradients made from the scores."""
        return gradient_dtype(self.scores)

    @property
    def batch_size(self) -> int:
        """b, the number of sequences."""
        return self.scores.batch_size

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Sizes of the layer axes."""
        return self.scores.layer_shape

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape of the parameter leaf that the scores are of."""
        return self.scores.leaf_shape

    @property
    def made(self) -> ScoreLeaf:
        """The scores as they were made, in the sequences' own order."""
        return self.dense() if isinstance(self.scores, DenseScores) else self.scores

    @property
    def _used(self) -> ScoreLeaf:
        return self.scores if self.form is None else self.form

    def _forth(self, x: Array, axis: int) -> Array:
        """An array with the sequences along an axis, as the scores in use number them."""
        return self.layout.numbering.forth(x, axis) if self.exchanged else x

    def _back(self, x: Array, axis: int) -> Array:
        return self.layout.numbering.back(x, axis) if self.exchanged else x

    def _like_form(self, layers: Array) -> Array:
        """An array of the scores' layout, spread like one of the dense scores."""
        return by_feature(layers, self.layout) if isinstance(self._used, DenseScores) else layers

    def gram(self) -> Array:
        return self._back(self._back(self._used.gram(), -1), -2)

    def gram_by_rows(self) -> Array:
        return self._back(self._back(self._used.gram_by_rows(), -1), -2)

    def dots(self, layers: Array) -> Array:
        return self._back(self._used.dots(self._like_form(layers)), -1)

    def weighted_sum(self, weights: Array) -> Array:
        return self._like_form(self._used.weighted_sum(self._forth(weights, -1)))

    def dense(self) -> DenseScores:
        dense = self._used.dense()
        return dataclasses.replace(dense, values=self._back(dense.values, 0))

    def compact(self) -> ScoreLeaf:
        compact = self._used.compact()
        if self.exchanged or not isinstance(compact, DenseScores):
            return self
        layout = self.layout
        made = spread(compact.values, layout.by_sequence)
        renumbered = spread(layout.numbering.forth(made), layout.renumbered)
        form = dataclasses.replace(compact, values=spread(renumbered, layout.by_feature))
        if isinstance(self.scores, DenseScores):
            return dataclasses.replace(self, scores=form, exchanged=True)
        return dataclasses.replace(self, form=form, exchanged=True)

    def rescaled(self) -> tuple[SpreadScores, Array]:
        moderate, size = self._used.rescaled()
        return dataclasses.replace(self, scores=moderate, form=None), self._back(size, 0)

    def times(self, factor: Array) -> SpreadScores:
        of_used = self._forth(factor, 0)
        if self.form is None:
            return dataclasses.replace(self, scores=self.scores.times(of_used))
        scores, form = self.scores.times(factor), self.form.times(of_used)
        return dataclasses.replace(self, scores=scores, form=form)

    def are_zero(self) -> Array:
        return self._back(self._used.are_zero(), 0)


def spread_scores(
    scores: ScoreLeaf,
    leaf: Array,
    batch_axes: Sequence[str] = (),
    spec: Spec = None,
) -> ScoreLeaf:
    """Scores that know how to be spread over the mesh of their parameter leaf, if there is one.

    Args:
      scores: of the leaf.
      leaf: the parameter leaf, or an array spread like it.
      batch_axes: as in `layout_of`.
      spec: as in `layout_of`.
    """
    if isinstance(scores, SpreadScores):
        return scores
    layout = layout_of(
        leaf, _sequences(scores), scores.view.apply, scores.num_layer_axes, batch_axes, spec
    )
    return with_layout(scores, layout)


def with_layout(scores: ScoreLeaf, layout: Layout | None) -> ScoreLeaf:
    """Scores that know their layout, if there is one."""
    return scores if layout is None else SpreadScores(scores, None, layout)


def _sequences(scores: ScoreLeaf) -> Array:
    """An array of the scores whose first axis is the sequences."""
    return jax.tree.leaves(scores)[0]


def exchanged(scores: ScoreLeaf) -> ScoreLeaf:
    """Scores whose dense form is made and exchanged now, if it pays: all that use it share it."""
    if not isinstance(scores, SpreadScores) or scores.layout.by_feature is None:
        return scores
    made, spec = scores.scores, scores.layout.by_feature
    if isinstance(made, DenseScores):
        dense = automatic(lambda scores: scores.compact().scores, spec, scores)
        return dataclasses.replace(scores, scores=dense, exchanged=True)
    if isinstance(made, LayerFactors) and made.dense_costs_less:
        form = automatic(lambda scores: scores.compact().form, spec, scores)
        return dataclasses.replace(scores, form=form, exchanged=True)
    return scores


def like_parameter(x: Array, scores: ScoreLeaf | None) -> Array:
    """A gradient spread over Auto axes like its parameter leaf, as far as the scores know how."""
    return spread(x, scores.layout.gradient) if isinstance(scores, SpreadScores) else x


def sum_spec(scores: ScoreLeaf) -> Spec:
    """How a weighted sum of scores is to be spread over Explicit axes."""
    if isinstance(scores, SpreadScores):
        return scores.layout.gradient
    if isinstance(scores, DenseScores) and scores.view == View():
        return without_leading(spec_of(scores.values), 1)
    return None
