"""Scores: the gradients of each sequence's log-probability, in whatever form is cheapest to hold.

The projections need three operations of a parameter leaf's scores s_1..s_b: their inner products
(`gram`), their inner products with a gradient (`dots`) and their linear combinations
(`weighted_sum`). Every class offers these, so the transformations never ask what they hold:

* `DenseScores`: the scores themselves;
* `LayerFactors`: s_i = X_iᵀ D_i, the inputs and output gradients of the matmuls that use a kernel;
* `LookupFactors`: the token indices and output gradients of an embedding lookup (tables.py);
* `SumScores`: a sum of these, as for a tied embedding (tables.py).

Example:
  >>> import jax.numpy as jnp
  >>> inputs, output_grads = jnp.ones((2, 5, 3)), jnp.ones((2, 5, 4))   # b=2, 5 tokens
  >>> scores = LayerFactors(inputs, output_grads)
  >>> gradient = scores.weighted_sum(jnp.array([1.0, -0.5]))
  >>> scores.gram().shape, scores.dots(gradient).shape, gradient.shape
  ((2, 2), (2,), (3, 4))
"""

from __future__ import annotations

import dataclasses
import functools
import math
import string
from typing import Any

import jax
import jax.numpy as jnp

from proma_jax.arithmetic import contract, divide, wide
from proma_jax.scores import products
from proma_jax.scores.leaf import ScoreLeaf, View

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values"],
    meta_fields=["num_layer_axes", "view", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class DenseScores(ScoreLeaf):
    """The scores themselves.

    Attributes:
      values: (b, *layers, ...), floating point.
      num_layer_axes: how many leading axes after b count layers. Default 0: one layer.
      view: how the parameter leaf is read as (*layers, ...). Default: as it is.
      dtype: of the gradients made from the scores. Default: that of `values`.
    """

    values: Array
    num_layer_axes: int = 0
    view: View = View()
    dtype: Any = None
    arrays = ("values",)

    def _one_layer_shape(self) -> tuple[int, ...]:
        return self.values.shape[1 + self.num_layer_axes :]

    @property
    def _features(self) -> str:
        """Einsum subscripts of a layer's axes, which stay apart so that any may be sharded."""
        return string.ascii_uppercase[: len(self._one_layer_shape())]

    def gram(self) -> Array:
        return products.gram(self._layers_first("values"), self.num_layer_axes)

    def gram_by_rows(self) -> Array:
        return jnp.moveaxis(jax.lax.map(self.dots, self.values), 0, -2)

    def dots(self, layers: Array) -> Array:
        n = self._features
        return contract(f"...b{n},...{n}->...b", self._layers_first("values"), layers)

    def weighted_sum(self, weights: Array) -> Array:
        return products.sum_of_scores(self._layers_first("values"), self._in_layers(weights))

    def dense(self) -> DenseScores:
        return self

    def rescaled(self) -> tuple[DenseScores, Array]:
        size = self._max_abs("values")
        scaled = self._scale("values", divide(jnp.ones_like(size), size))
        return dataclasses.replace(self, values=scaled), size

    def times(self, factor: Array) -> DenseScores:
        return dataclasses.replace(self, values=self._scale("values", factor))

    def are_zero(self) -> Array:
        return self._max_abs("values") == 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "output_grads", "in_loss"],
    meta_fields=["num_layer_axes", "view", "dtype", "input_group"],
)
@dataclasses.dataclass(frozen=True)
class LayerFactors(ScoreLeaf):
    """Scores s_i = X_iᵀ D_i of a kernel used in matrix products.

    Several uses of one kernel are more tokens: [X₁; X₂]ᵀ [D₁; D₂].

    Attributes:
      inputs: X, (b, *layers, tokens..., d_in), what the kernel was multiplied with.
      output_grads: D, (b, *layers, tokens..., d_out), the gradient of log π with respect to the
        products.
      num_layer_axes: how many leading axes after b count layers. Default 0: one layer.
      view: how the parameter leaf is read as (*layers, d_in, d_out). Default: as it is.
      dtype: of the gradients made from the scores. Default: the factors' common type.
      in_loss: (b, *layers, tokens...) bool, which tokens have a say in the subspaces of
        `project_intra`. Default: those with an output gradient. `sequence_scores` says it where
        several kernels share an input: the tokens with an output gradient in any of them.
      input_group: leaves of one tree of scores with the same number here have the same `inputs` and
        `in_loss`, so that `project_intra` need not find the same subspace twice. Default: None,
        nothing is known; give that if you change them.
    """

    inputs: Array
    output_grads: Array
    num_layer_axes: int = 0
    view: View = View()
    dtype: Any = None
    in_loss: Array | None = None
    input_group: int | None = None
    arrays = ("inputs", "output_grads")

    def _one_layer_shape(self) -> tuple[int, int]:
        return self.inputs.shape[-1], self.output_grads.shape[-1]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(d_in, d_out) of one layer."""
        return self._one_layer_shape()

    def tokens(self, name: str) -> Array:
        """The field as (*layers, b, tokens, d)."""
        array = self._layers_first(name)
        shape = (*self.layer_shape, self.batch_size, self._num_tokens, array.shape[-1])
        return array.reshape(shape)

    def rows(self, name: str) -> Array:
        """The field as (*layers, b · tokens, d)."""
        *_, n_sequences, n_tokens, d = self.tokens(name).shape
        return self.tokens(name).reshape(*self.layer_shape, n_sequences * n_tokens, d)

    def tokens_in_loss(self) -> Array:
        """(*layers, b, tokens) bool, which tokens have a say in the subspaces."""
        if self.in_loss is None:
            return jnp.any(self.tokens("output_grads") != 0, axis=-1)
        shape = (*self.layer_shape, self.batch_size, self._num_tokens)
        return self._layers_first("in_loss").reshape(shape)

    @property
    def _num_tokens(self) -> int:
        return math.prod(self.inputs.shape[1 + self.num_layer_axes : -1])

    @property
    def dense_costs_less(self) -> bool:
        """Whether the scores themselves cost less to project with than pairs of tokens.

        Beside the product of the factors, which both forms need, the dense one makes and reads b
        scores four times, as long as some 128 operations for each of their entries take; the
        factored one multiplies every token with every other, and with G.
        """
        d_in, d_out = self._one_layer_shape()
        tokens = self._num_tokens
        if d_in == 0 or d_out == 0:
            return False
        return self.batch_size * tokens**2 * (1 / d_in + 1 / d_out) + tokens > 64

    def compact(self) -> LayerFactors | DenseScores:
        return self.dense() if self.dense_costs_less else self

    def gram(self) -> Array:
        x, d = self.tokens("inputs"), self.tokens("output_grads")
        x_products = contract("...ita,...jua->...ijtu", x, x)
        d_products = contract("...ita,...jua->...ijtu", d, d)
        return jnp.sum(x_products * d_products, axis=(-2, -1))

    def dots(self, layers: Array) -> Array:
        moved = contract("...bti,...io->...bto", self.tokens("inputs"), layers)
        return jnp.sum(moved * wide(self.tokens("output_grads")), axis=(-2, -1))

    def weighted_sum(self, weights: Array) -> Array:
        x, d = self.tokens("inputs"), self.tokens("output_grads")
        return products.sum_of_products(x, d, self._in_layers(weights))

    def dense(self) -> DenseScores:
        x, d = self.tokens("inputs"), self.tokens("output_grads")
        values = jnp.moveaxis(contract("...bti,...bto->...bio", x, d), self.num_layer_axes, 0)
        return DenseScores(values, self.num_layer_axes, self.view, self.dtype)

    def rescaled(self) -> tuple[LayerFactors, Array]:
        """As of any scores; inputs without an output gradient, which have no say, become zero."""
        has_gradient = jnp.any(self.output_grads != 0, axis=-1, keepdims=True)
        counted = dataclasses.replace(self, inputs=jnp.where(has_gradient, self.inputs, 0))
        x_size, d_size = counted._max_abs("inputs"), self._max_abs("output_grads")
        scaled = dataclasses.replace(
            self,
            inputs=counted._scale("inputs", divide(jnp.ones_like(x_size), x_size)),
            output_grads=self._scale("output_grads", divide(jnp.ones_like(d_size), d_size)),
        )
        return scaled, x_size * d_size

    def times(self, factor: Array) -> LayerFactors:
        scaled = self._scale("output_grads", factor)
        return dataclasses.replace(self, output_grads=scaled)

    def are_zero(self) -> Array:
        present = [jnp.any(getattr(self, name) != 0, axis=-1) for name in self.arrays]
        tokens = tuple(range(1 + self.num_layer_axes, present[0].ndim))
        return ~jnp.any(present[0] & present[1], axis=tokens)


def as_score_leaf(scores: Any) -> ScoreLeaf:
    """A (b, *leaf.shape) array as `DenseScores`; score leaves as they are."""
    return scores if isinstance(scores, ScoreLeaf) else DenseScores(scores)
