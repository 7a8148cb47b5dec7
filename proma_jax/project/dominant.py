"""The intra variant's projection: the part of g that lies in a microbatch's dominant subspaces.

Of the gradient g of a kernel with inputs X (n, d_in) and output gradients D (n, d_out), over all
tokens n of a microbatch, that is Q_x (Q_xᵀ g Q_d) Q_dᵀ, with Q_x and Q_d orthonormal bases of about
the top-r right singular subspaces of X and D. Bases start from random directions that are the same
for all layers of one width, and kernels that share an input share its basis.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from proma_jax.scores.leaves import LayerFactors
  >>> from proma_jax.settings import Intra
  >>> x = jnp.zeros((2, 5, 3)).at[..., 0].set(1.0)   # all tokens of 2 sequences are alike
  >>> scores = LayerFactors(x, jnp.ones((2, 5, 4)))
  >>> settings = Intra(rank=1)
  >>> starts = random_starts(jax.random.key(0), [(1, 3), (1, 4)])
  >>> [part] = common_parts([scores], [jnp.ones((3, 4))], settings, starts)
  >>> part.round(3).tolist()[:2]
  [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from proma_jax.arithmetic import contract
from proma_jax.project.linalg import dominant_directions, orthonormal_basis, random_start
from proma_jax.scores.leaves import LayerFactors
from proma_jax.settings import Intra

Array = jax.Array
Starts = dict[tuple[int, int], Array]
"""By (rank, dimension), the directions from which bases of that shape start."""


def random_starts(key: Array, shapes: Iterable[tuple[int, int]]) -> Starts:
    """Starts of bases of some shapes (rank, dimension)."""
    return {shape: random_start(key, *shape) for shape in sorted(set(shapes))}


def common_parts(
    factors: Sequence[LayerFactors], gradients: Sequence[Array], settings: Intra, starts: Starts
) -> list[Array]:
    """What of the gradients of some kernels lies in the dominant subspaces.

    Args:
      factors: of each kernel. Kernels with the same `input_group` share the basis of their inputs.
      gradients: g of each, (*layers, d_in, d_out).
      settings: of the bases.
      starts: of all shapes that are needed.
    """
    matrices: dict[_Name, tuple[Array, Array | None]] = {}
    names: list[tuple[_Name, _Name]] = []
    for i, leaf in enumerate(factors):
        rank, (d_in, d_out), layers = settings.rank_of(leaf), leaf.matrix_shape, leaf.layer_shape
        inputs, output_grads = leaf.rows("inputs"), leaf.rows("output_grads")
        in_loss = leaf.tokens_in_loss().reshape(inputs.shape[:-1])
        group = ("of leaf", i) if leaf.input_group is None else ("of group", leaf.input_group)
        of_inputs = rank, d_in, layers, group
        of_grads = rank, d_out, layers, ("output_grads", i)
        matrices |= {of_inputs: (inputs, in_loss), of_grads: (output_grads, None)}
        names.append((of_inputs, of_grads))
    bases = _bases(matrices, settings, starts)

    def common_part(gradient: Array, q_x: Array, q_d: Array) -> Array:
        coordinates = contract("...ri,...ij,...sj->...rs", q_x, gradient, q_d)
        return contract("...ri,...rs,...sj->...ij", q_x, coordinates, q_d)

    return [
        common_part(gradient, bases[of_inputs], bases[of_grads])
        for gradient, (of_inputs, of_grads) in zip(gradients, names, strict=True)
    ]


_Name = tuple[int, int, tuple[int, ...], Any]
"""Of a matrix: rank and dimension of its basis, its layers, and what tells it from others."""


def _bases(
    matrices: dict[_Name, tuple[Array, Array | None]], settings: Intra, starts: Starts
) -> dict[_Name, Array]:
    """A basis of each matrix, of which only some rows are kept; matrices of one kind together."""
    alike: dict[Any, list[_Name]] = defaultdict(list)
    for name in matrices:
        alike[name[:3]].append(name)
    bases: dict[_Name, Array] = {}
    for (rank, dimension, _), names in alike.items():
        rows, kept = zip(*(matrices[name] for name in names), strict=True)
        directions = dominant_directions(
            rows, starts[rank, dimension], kept=kept, power_iterations=settings.power_iterations
        )
        found = orthonormal_basis(directions, settings.orthonormalization)
        bases |= zip(names, found, strict=True)
    return bases
