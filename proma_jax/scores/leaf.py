"""What a score leaf offers: the scores of one parameter leaf, whatever they are held as.

A leaf may stack several layers (a scan over layers, a batched einsum). Score arrays have the shape
(b, *layers, ...), and every operation is per layer. A `View` says how the leaf's own layout maps to
(*layers, ...), the scores' layout.

Example:
  >>> import jax.numpy as jnp
  >>> view = View().reshape((6,), (2, 3)).transpose((1, 0))
  >>> view.apply(jnp.arange(6)).tolist(), view.invert(view.apply(jnp.arange(6))).tolist()
  ([[0, 3], [1, 4], [2, 5]], [0, 1, 2, 3, 4, 5])
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from proma_jax.arithmetic import wide

if TYPE_CHECKING:
    from proma_jax.scores.leaves import DenseScores

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class View:
    """A reversible reading of a parameter leaf: reshapes and transpositions, in order.

    The default reads the leaf as it is. `apply` maps the leaf's layout to the scores' layout
    (*layers, ...), `invert` maps back.
    """

    steps: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    def reshape(self, old: Sequence[int], new: Sequence[int]) -> View:
        if tuple(old) == tuple(new):
            return self
        return View((*self.steps, ("reshape", tuple(old), tuple(new))))

    def transpose(self, axes: Sequence[int]) -> View:
        axes = tuple(axes)
        if axes == tuple(range(len(axes))):
            return self
        inverse = tuple(sorted(range(len(axes)), key=axes.__getitem__))
        return View((*self.steps, ("transpose", inverse, axes)))

    def apply(self, leaf: Array) -> Array:
        for kind, _, new in self.steps:
            leaf = leaf.reshape(new) if kind == "reshape" else leaf.transpose(new)
        return leaf

    def invert(self, value: Array) -> Array:
        for kind, old, _ in reversed(self.steps):
            value = value.reshape(old) if kind == "reshape" else value.transpose(old)
        return value


class ScoreLeaf:
    """Scores of one parameter leaf.

    Attributes:
      num_layer_axes: how many leading axes of each array, after b, count layers.
      view: how the parameter leaf is read as (*layers, ...), the scores' layout.
      dtype: of the gradients made from the scores; None for that of the arrays.
      arrays: names of the fields that hold (b, *layers, ...).
    """

    num_layer_axes: int
    view: View
    dtype: Any
    arrays: tuple[str, ...]

    def gram(self) -> Array:
        """(*layers, b, b) inner products of the scores."""
        raise NotImplementedError

    def gram_by_rows(self) -> Array:
        """`gram` for programs that rarely run: it compiles fast, and may run slowly."""
        return self.gram()

    def dots(self, layers: Array) -> Array:
        """(*layers, b) inner products with an array of the scores' layout."""
        raise NotImplementedError

    def weighted_sum(self, weights: Array) -> Array:
        """Σ_i weights_i s_i in the scores' layout; weights (b,) or (*layers, b).

        The weight of a zero score has no say, even if it is NaN.
        """
        raise NotImplementedError

    def dense(self) -> DenseScores:
        """The scores themselves."""
        raise NotImplementedError

    def compact(self) -> ScoreLeaf:
        """The same scores in the form that is the fastest to project with."""
        return self

    @property
    def made(self) -> ScoreLeaf:
        """The scores as they were made, whatever has been added to them on a mesh."""
        return self

    def rescaled(self) -> tuple[ScoreLeaf, Array]:
        """Scores of moderate size and the (b, *layers) factors that they were divided by."""
        raise NotImplementedError

    def times(self, factor: Array) -> ScoreLeaf:
        """Every sequence's scores times a (b, *layers) factor."""
        raise NotImplementedError

    def are_zero(self) -> Array:
        """(b, *layers) bool, which scores are known to be zero from what they are held as."""
        raise NotImplementedError

    @property
    def batch_size(self) -> int:
        """b, the number of sequences."""
        return getattr(self, self.arrays[0]).shape[0]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Sizes of the layer axes, () for a leaf that is one layer."""
        return getattr(self, self.arrays[0]).shape[1 : 1 + self.num_layer_axes]

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape of the parameter leaf that the scores are of."""
        layered = jax.ShapeDtypeStruct((*self.layer_shape, *self._one_layer_shape()), jnp.float32)
        return jax.eval_shape(self.view.invert, layered).shape

    def _one_layer_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _in_layers(self, weights: Array) -> Array:
        """(*layers, b) of weights (b,) or (*layers, b)."""
        return jnp.broadcast_to(wide(weights), (*self.layer_shape, self.batch_size))

    def _layers_first(self, name: str) -> Array:
        """The field as (*layers, b, ...)."""
        return jnp.moveaxis(getattr(self, name), 0, self.num_layer_axes)

    def _max_abs(self, name: str) -> Array:
        """(b, *layers): largest magnitude in each sequence's part of the field."""
        array = wide(getattr(self, name))
        return jnp.max(
            jnp.abs(array), axis=tuple(range(1 + self.num_layer_axes, array.ndim)), initial=0
        )

    def _scale(self, name: str, factor: Array) -> Array:
        array = wide(getattr(self, name))
        return array * per_sequence(factor, array)


def weighted(weights: Array, x: Array, num_layer_axes: int) -> Array:
    """(*layers, b, ...) times (b,) or (*layers, b) weights; what is zero stays so, even by NaN."""
    x = wide(x)
    weights = jnp.broadcast_to(weights, x.shape[: 1 + num_layer_axes])
    return jnp.where(x == 0, 0, x * per_sequence(weights, x))


def per_sequence(weights: Array, like: Array) -> Array:
    """Appends axes to (..., b) weights whose leading axes are `like`'s, for broadcasting."""
    return weights.reshape(weights.shape + (1,) * (like.ndim - weights.ndim))


def is_score_leaf(x: Any) -> bool:
    """Whether `x` stands for one parameter leaf in a tree of scores."""
    return x is None or isinstance(x, ScoreLeaf)


def gradient_dtype(scores: ScoreLeaf) -> Any:
    """The type of the gradients that `weighted_sum` makes from a score leaf."""
    if scores.dtype is not None:
        return scores.dtype
    floating = (getattr(scores, name).dtype for name in scores.arrays if name != "indices")
    return functools.reduce(jnp.promote_types, floating)


def map_layers(fn: Callable[[ScoreLeaf, Array], Array], scores: ScoreLeaf, layers: Array) -> Array:
    """Calls `fn` on one layer of a parameter leaf after the other.

    Args:
      fn: takes the scores of one layer and that layer of `layers`; returns an array.
      scores: of the leaf.
      layers: an array of the scores' layout, (*layers, ...).

    Returns:
      What `fn` returns, with the layer axes in front. One layer at a time, so that what `fn` makes
      of a layer's scores is never held for two layers.
    """
    scores = scores.made
    if scores.num_layer_axes == 0:
        return fn(scores, layers)
    count = math.prod(scores.layer_shape)

    def flatten_layers(x: Array) -> Array:
        return x.reshape(count, *x.shape[scores.num_layer_axes :])

    fields = {name: flatten_layers(scores._layers_first(name)) for name in scores.arrays}
    whole: Any = scores

    def one_layer(slices: tuple[dict[str, Array], Array]) -> Array:
        one = dataclasses.replace(whole, **slices[0], num_layer_axes=0, view=View())
        return fn(one, slices[1])

    result = jax.lax.map(one_layer, (fields, flatten_layers(layers)))
    return result.reshape(*scores.layer_shape, *result.shape[1:])
