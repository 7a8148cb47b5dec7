"""Scores beside updates: which belongs to which leaf, and what is said where they do not fit.

What leaves `match_scores` is floating point, of the update's shape, and has a view. `weighted_sum`
is the loss gradient, of scores that fit in the same sense.

Example:
  >>> import jax.numpy as jnp
  >>> [(path, update, leaf)] = match_scores({"w": jnp.ones(3)}, {"w": jnp.ones((2, 3))})
  >>> path, leaf.batch_size
  ("['w']", 2)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from proma_jax._mesh.arrays import automatic
from proma_jax._mesh.scores import spread_scores, sum_spec
from proma_jax.scores.leaf import ScoreLeaf, gradient_dtype, is_score_leaf
from proma_jax.scores.leaves import as_score_leaf
from proma_jax.scores.tables import SumScores

Array = jax.Array


def match_scores(updates: Any, scores: Any) -> list[tuple[str, Array, ScoreLeaf | None]]:
    """Lines scores up with updates by leaf path.

    Args:
      updates: pytree of arrays; `optax.MaskedNode` means "not mine" and is passed over.
      scores: pytree whose leaves are score leaves, (b, *leaf.shape) arrays, or None.

    Returns:
      (path, update, score leaf or None) for each leaf of `updates`, in the order of
      `jax.tree.leaves`.

    Raises:
      ValueError: scores are missing, have no leaf at a path or one of another shape, disagree on b,
        or hold a leaf that `updates` lacks; or something is not floating point. The message names
        the leaf and both shapes.
    """
    if scores is None:
        raise ValueError(
            "scores is None: pass update(updates, state, params, scores=scores), from "
            "proma_jax.sequence_scores. If you do, something around the transformation drops extra "
            "arguments: flax's TrainState.apply_gradients does (call state.tx.update instead), "
            "some of optax's wrappers do, and `accumulate` does for its inner optimizer (put it "
            "outside of that, by optax.chain). The page `With optax`, docs/optax.md, has each."
        )
    _check_no_pair(scores, updates)
    by_path = dict(jax.tree_util.tree_leaves_with_path(scores, is_leaf=_stands_for_leaf))
    update_leaves = jax.tree_util.tree_leaves_with_path(updates, is_leaf=_is_masked)
    paths = {path for path, _ in update_leaves}
    masked = {path for path, update in update_leaves if _is_masked(update)}
    for path, leaf in by_path.items():
        prefixes = (path[:i] for i in range(len(path)))
        if leaf is not None and path not in paths and masked.isdisjoint(prefixes):
            raise ValueError(
                f"scores{_name(path)} has no counterpart in updates: both must come from one tree, "
                "with a score leaf or None for every leaf, and no wrapper may change the tree of "
                "updates alone, as optax.flatten does."
            )
    matched: list[tuple[str, Array, ScoreLeaf | None]] = []
    batch_sizes: dict[int, str] = {}
    for path, update in update_leaves:
        if _is_masked(update):
            continue
        if not jnp.issubdtype(update.dtype, jnp.floating):
            raise ValueError(
                f"updates{_name(path)} is {update.dtype}, but gradients must be floating point: "
                "leave the leaf out of the parameters, or mask it with optax.masked."
            )
        if path not in by_path:
            raise ValueError(
                f"scores has no leaf for updates{_name(path)} of shape {update.shape}: give its "
                "scores, or None to leave it without projection."
            )
        leaf = by_path[path]
        if leaf is None or _is_masked(leaf):
            matched.append((_name(path), update, None))
            continue
        leaf = _checked(_name(path), update, leaf)
        matched.append((_name(path), update, leaf))
        batch_sizes.setdefault(leaf.batch_size, _name(path))
    if len(batch_sizes) > 1:
        sizes = ", ".join(f"{size} at scores{path}" for size, path in batch_sizes.items())
        raise ValueError(f"scores disagree on the number of sequences b: {sizes}.")
    return matched


def kinds(matched: Sequence[tuple[str, Array, ScoreLeaf | None]]) -> list[tuple[str, type]]:
    """The path of each leaf, and what its scores are held as."""
    return [(path, type(None if leaf is None else leaf.made)) for path, _, leaf in matched]


def _check_no_pair(scores: Any, like: Any = None) -> None:
    """Raises a ValueError for all that `sequence_scores` returns in place of the scores."""
    if not isinstance(scores, tuple) or len(scores) != 2 or isinstance(like, tuple):
        return
    first, second = (jax.tree.leaves(part, is_leaf=is_score_leaf) for part in scores)
    has_scores = any(isinstance(leaf, ScoreLeaf) for leaf in second)
    if has_scores and not any(isinstance(leaf, ScoreLeaf) for leaf in first):
        raise ValueError(
            "scores is a pair. sequence_scores(logprob_fn)(params, microbatch) returns "
            "(logprobs, scores): give the second of the two."
        )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _stands_for_leaf(x: Any) -> bool:
    return is_score_leaf(x) or _is_masked(x)


def _checked(path: str, update: Array, leaf: Any) -> ScoreLeaf:
    if not isinstance(leaf, ScoreLeaf) and (
        jnp.ndim(leaf) == 0 or jnp.shape(leaf)[1:] != update.shape
    ):
        raise ValueError(
            f"scores{path} has shape {jnp.shape(leaf)}, but updates{path} has shape "
            f"{update.shape}: dense scores must have its shape after a leading axis b."
        )
    leaf = as_score_leaf(leaf)
    for part in leaf.made.parts if isinstance(leaf.made, SumScores) else (leaf.made,):
        shapes = {name: getattr(part, name).shape for name in part.arrays}
        if len({s if name == "indices" else s[:-1] for name, s in shapes.items()}) > 1:
            raise ValueError(
                f"scores{path} ({type(part).__name__}) has {shapes}: their axes must agree, "
                "but for a last one of features."
            )
    if leaf.leaf_shape != update.shape:
        raise ValueError(
            f"scores{path} ({type(leaf).__name__}) are of a leaf of shape {leaf.leaf_shape}, but "
            f"updates{path} has shape {update.shape}."
        )
    _check_floating(path, leaf)
    return spread_scores(leaf, update)


def _check_floating(path: str, leaf: ScoreLeaf) -> None:
    if not jnp.issubdtype(gradient_dtype(leaf), jnp.floating):
        raise ValueError(f"scores{path} must be floating point, got {gradient_dtype(leaf)}.")


def weighted_sum(scores: Any, coefficients: Array) -> Any:
    """The loss gradient Σ_i c_i s_i.

    Args:
      scores: pytree of score leaves or (b, *leaf.shape) arrays, as from `sequence_scores`. None
        stays None.
      coefficients: (b,), c_i, the weight of sequence i in the loss gradient, e.g. −A_i / (response
        tokens in the mini-batch). That of a sequence whose scores are zero, as one without response
        tokens, has no say, even if it is NaN.

    Returns:
      A pytree shaped and typed like the parameters. The sums are taken in float32.

    Raises:
      ValueError: `coefficients` is not of shape (b,) or not real; a leaf is not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}   # b = 2, w has 2 entries
      >>> weighted_sum(scores, jnp.array([1.0, 10.0]))["w"].tolist()
      [31.0, 42.0]
    """
    _check_no_pair(scores)
    coefficients = jnp.asarray(coefficients)
    if jnp.iscomplexobj(coefficients):
        raise ValueError(f"coefficients is {coefficients.dtype}, but must be real.")

    def one_leaf(path: Any, leaf: Any) -> Array | None:
        if leaf is None:
            return None
        leaf = as_score_leaf(leaf)
        _check_floating(_name(path), leaf)
        if coefficients.shape != (leaf.batch_size,):
            raise ValueError(
                f"coefficients has shape {coefficients.shape}, but scores{_name(path)} "
                f"are of {leaf.batch_size} sequences: give one coefficient per sequence."
            )

        def total(leaf: ScoreLeaf, coefficients: Array) -> Array:
            total = leaf.view.invert(leaf.compact().weighted_sum(coefficients))
            return total.astype(gradient_dtype(leaf))

        return automatic(total, sum_spec(leaf), leaf, coefficients)

    return jax.tree_util.tree_map_with_path(one_leaf, scores, is_leaf=is_score_leaf)
