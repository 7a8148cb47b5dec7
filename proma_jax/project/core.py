"""One microbatch: what both variants remove from the gradients of some parameter leaves.

With g_m a leaf's gradient of the microbatch and G what was accumulated before it,

    common  = shrinkage · Q_x (Q_xᵀ g_m Q_d) Q_dᵀ    the intra variant, see dominant.py
    removed = shrinkage · P_S(G)                     the accumulation variant, see span.py
    G ← G + (g_m − common − removed)

`parts` returns what is added to G, and the norms of which the metrics are made. Both
transformations and the fused form call it, each with what it has at hand: g_m itself, or the
coefficients that make it of the scores. All arrays are in the layout of the scores, (*layers, ...).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from proma_jax.arithmetic import AxisName, divide, layer_norms, wide
from proma_jax.project.dominant import Starts, common_parts
from proma_jax.project.span import Numbers, combinations, removed_exactly
from proma_jax.scores.leaf import ScoreLeaf
from proma_jax.scores.leaves import LayerFactors
from proma_jax.settings import Accumulation, Intra

Array = jax.Array


class Leaf(NamedTuple):
    """A parameter leaf at a microbatch.

    Attributes:
      scores: of the microbatch's sequences.
      own: g_m; None if the coefficients are to make it of the scores.
      total: G; None if accumulation does not project the leaf.
      in_intra: whether the intra variant projects it, which takes `LayerFactors`.
    """

    scores: ScoreLeaf
    own: Array | None = None
    total: Array | None = None
    in_intra: bool = False


class Microbatch(NamedTuple):
    """The numbers of one microbatch.

    Attributes:
      removes: () bool, whether accumulation removes anything.
      accumulation: its numbers.
      intra: the intra variant's shrinkage.
      starts: of its bases.
    """

    removes: ArrayLike = False
    accumulation: Numbers = Numbers()
    intra: ArrayLike = 0.0
    starts: Starts = {}  # noqa: RUF012


class Part(NamedTuple):
    """What a microbatch adds to the total of a leaf.

    Attributes:
      added: g_m − common − removed, in at least float32.
      norms: (3,) float32, of removed, common and g_m; the last is zero without the intra variant.
    """

    added: Array
    norms: Array


def parts(
    leaves: Sequence[Leaf],
    numbers: Microbatch,
    *,
    accumulation: Accumulation | None = None,
    intra: Intra | None = None,
    coefficients: Array | None = None,
    axis_name: AxisName = None,
) -> list[Part]:
    """What a microbatch adds to the totals of some leaves.

    Args:
      leaves: the leaves, whose factorisations are shared as far as possible.
      numbers: of the microbatch.
      accumulation: settings of the accumulation variant.
      intra: settings of the intra variant.
      coefficients: (b,), c_i with g_m = Σ c_i s_i, for leaves without `own`.
      axis_name: of mapped axes along which each device has sequences of its own, while G and g_m
        are the same on all.
    """
    is_ridge = accumulation is not None and accumulation.solver == "ridge"
    totals = {i: wide(leaf.total) for i, leaf in enumerate(leaves) if leaf.total is not None}
    forms = [
        leaf.scores.compact() if is_ridge and i in totals else leaf.scores
        for i, leaf in enumerate(leaves)
    ]
    if coefficients is not None and is_ridge and intra is None:
        return _in_one_product(forms, totals, coefficients, numbers)
    own = [
        _weighted_sum(form, coefficients) if leaf.own is None else wide(leaf.own)
        for leaf, form in zip(leaves, forms, strict=True)
    ]
    common = _common(leaves, own, intra, numbers)
    left = [g - common[i] if i in common else g for i, g in enumerate(own)]
    removed = _removed(forms, totals, left, accumulation, numbers, axis_name)
    found = []
    for i, g in enumerate(own):
        part, length = removed.get(i, (None, norm(None)))
        norms = jnp.stack([length, norm(common.get(i)), norm(g if intra else None)])
        found.append(Part(left[i] if part is None else left[i] - part, norms))
    return found


def _weighted_sum(scores: ScoreLeaf, coefficients: Array | None) -> Array:
    assert coefficients is not None, "a leaf without its own gradient needs coefficients"
    return scores.weighted_sum(coefficients)


def _in_one_product(
    forms: Sequence[ScoreLeaf],
    totals: dict[int, Array],
    coefficients: Array,
    numbers: Microbatch,
) -> list[Part]:
    """`parts` where g_m and what is removed are weighted sums of the scores: one sum makes both."""
    chosen = [forms[i] for i in totals]

    def remove() -> list[tuple[Array, Array]]:
        found = combinations(
            chosen,
            list(totals.values()),
            [None] * len(chosen),
            numbers.accumulation,
            coefficients=coefficients,
        )
        return [
            ((c.weights * c.size[..., None]).astype(total.dtype), norm(c.lengths))
            for c, total in zip(found, totals.values(), strict=True)
        ]

    def nothing() -> list[tuple[Array, Array]]:
        shapes = [(*form.layer_shape, form.batch_size) for form in chosen]
        return [
            (jnp.zeros_like(total, shape=shape), _zero(total))
            for total, shape in zip(totals.values(), shapes, strict=True)
        ]

    of_chosen = jax.lax.cond(numbers.removes, remove, nothing) if chosen else []
    removed = dict(zip(totals, of_chosen, strict=True))
    found = []
    for i, form in enumerate(forms):
        weights, length = removed.get(i, (None, norm(None)))
        if weights is None:
            left = coefficients
        else:
            left = jnp.broadcast_to(coefficients, weights.shape) - weights
        norms = jnp.stack([length, norm(None), norm(None)])
        found.append(Part(form.weighted_sum(left), norms))
    return found


def _common(
    leaves: Sequence[Leaf], own: Sequence[Array], intra: Intra | None, numbers: Microbatch
) -> dict[int, Array]:
    """What the intra variant removes from those leaves that it projects."""
    factors = {
        i: leaf.scores.made
        for i, leaf in enumerate(leaves)
        if leaf.in_intra and isinstance(leaf.scores.made, LayerFactors)
    }
    if intra is None or not factors:
        return {}
    found = common_parts(list(factors.values()), [own[i] for i in factors], intra, numbers.starts)
    return {i: jnp.asarray(numbers.intra * part) for i, part in zip(factors, found, strict=True)}


def _removed(
    forms: Sequence[ScoreLeaf],
    totals: dict[int, Array],
    left: Sequence[Array],
    accumulation: Accumulation | None,
    numbers: Microbatch,
    axis_name: AxisName,
) -> dict[int, tuple[Array, Array]]:
    """What accumulation removes from those leaves that it projects, and its norm."""
    if accumulation is None or not totals:
        return {}
    solver, of_span = accumulation.solver, numbers.accumulation
    chosen = [forms[i] for i in totals]
    own_lengths = [layer_norms(left[i], forms[i].num_layer_axes) for i in totals]

    def remove() -> list[tuple[Array, Array]]:
        of_leaves = chosen, list(totals.values()), own_lengths
        if solver == "ridge":
            found = combinations(*of_leaves, of_span, axis_name=axis_name)
            pairs = [
                (c.removed(form, axis_name), c.lengths)
                for c, form in zip(found, chosen, strict=True)
            ]
        else:
            pairs = [
                removed_exactly(*of_leaf, of_span, solver=solver, axis_name=axis_name)
                for of_leaf in zip(*of_leaves, strict=True)
            ]
        return [
            (part.astype(total.dtype), norm(lengths))
            for (part, lengths), total in zip(pairs, totals.values(), strict=True)
        ]

    def nothing() -> list[tuple[Array, Array]]:
        return [(jnp.zeros_like(total), _zero(total)) for total in totals.values()]

    return dict(zip(totals, jax.lax.cond(numbers.removes, remove, nothing), strict=True))


def _zero(like: Array) -> Array:
    """A norm of zero, in `jax.shard_map` of the same kind as an array."""
    return jnp.zeros_like(like, jnp.float32, shape=())


def norm(x: Array | None) -> Array:
    """() float32, of an array, or of nothing."""
    return jnp.zeros((), jnp.float32) if x is None else layer_norms(x).astype(jnp.float32)


def norm_of_all(arrays: Sequence[Array], axis_name: AxisName = None) -> Array:
    """() float32, the norm of all arrays together, or of all that have these norms.

    Args:
      arrays: arrays, or their norms.
      axis_name: of mapped axes along which each device has arrays of its own.
    """
    of_all = norm(jnp.stack([norm(x) for x in arrays])) if arrays else norm(None)
    if axis_name is None:
        return of_all
    size = jax.lax.pmax(jax.lax.stop_gradient(of_all), axis_name)
    return size * jnp.sqrt(jax.lax.psum(divide(of_all, size) ** 2, axis_name))


def fraction(removed: Sequence[Array], whole: Sequence[Array], axis_name: AxisName = None) -> Array:
    """() float32, the quotient of two `norm_of_all`; 0 where both are zero."""
    return divide(norm_of_all(removed, axis_name), norm_of_all(whole, axis_name))
