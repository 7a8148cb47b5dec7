"""Settings of both variants: `Accumulation` and `Intra`, field by field, and the checks of options.

A number may be a schedule, a function of a count of steps. What a setting is worth at a step is
asked for here, so that whoever projects sees numbers only.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from proma_jax._words import counted
from proma_jax.project.linalg import Orthonormalization
from proma_jax.project.span import Numbers, Solver
from proma_jax.scores.leaf import ScoreLeaf
from proma_jax.scores.leaves import DenseScores, LayerFactors

Number = ArrayLike | Callable[[jax.Array], ArrayLike]
Mask = Any | Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Accumulation:
    """Settings of the accumulation variant, as the arguments of `accumulate`.

    Attributes:
      solver: see `accumulate`; the same holds for the others.
      ridge: if it is a function, of the number of optimizer steps so far; so are the other numbers.
      shrinkage: fraction of the projection that is removed.
      relative_bound: of the removed part's length to that of the microbatch's gradient.
      skip_fraction: of the microbatches, at the beginning of a step, that remove nothing.
      rtol: of the solvers "qr" and "svd".
      mask: which leaves are projected.
    """

    solver: Solver = "ridge"
    ridge: Number = 1e-2
    shrinkage: Number = 1.0
    relative_bound: Number | None = None
    skip_fraction: Number = 0.0
    rtol: float = 1e-6
    mask: Mask = None

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, get_args(Solver))
        check_number("ridge", self.ridge, 0)
        check_number("shrinkage", self.shrinkage, 0, 1)
        check_number("skip_fraction", self.skip_fraction, 0, 1)
        check_number("rtol", self.rtol, 0, 1, schedulable=False)
        if self.relative_bound is not None:
            check_number("relative_bound", self.relative_bound, 0)
        check_mask(self.mask)

    def projects(self, kinds: Sequence[tuple[str, type]], updates: Any) -> list[bool]:
        """Which leaves are projected, given the path and the kind of scores of each."""
        by_default = (DenseScores, LayerFactors)
        return projected_leaves(kinds, self.mask, updates, by_default, (ScoreLeaf,))

    def at_step(self, step: jax.Array) -> Numbers:
        """The numbers at an optimizer step."""
        numbers = (self.ridge, self.shrinkage, self.relative_bound, self.rtol)
        return Numbers(*(at_step(number, step) for number in numbers))

    def removes(self, m: jax.Array, k: ArrayLike, step: jax.Array) -> jax.Array:
        """Whether microbatch m of the k of an optimizer step removes anything."""
        skipped = jnp.asarray(at_step(self.skip_fraction, step), jnp.float32)
        first = skipped * jnp.asarray(k, jnp.float32)
        return (m > 0) & (m.astype(jnp.float32) >= first * (1 - 1e-6))  # rounding must not decide


@dataclasses.dataclass(frozen=True)
class Intra:
    """Settings of the intra-microbatch variant, as the arguments of `project_intra`.

    Attributes:
      rank: see `project_intra`; the same holds for the others.
      shrinkage: if it is a function, of the number of microbatches so far.
      power_iterations: of the subspace iteration.
      orthonormalization: of the bases.
      mask: which leaves are projected.
      key: of the random starts of the bases.
    """

    rank: int = 10
    shrinkage: Number = 1.0
    power_iterations: int = 2
    orthonormalization: Orthonormalization = "cholesky_qr"
    mask: Mask = None
    key: int | jax.Array = 0

    def __post_init__(self) -> None:
        check_count("rank", self.rank, "the dimension of the subspaces")
        check_count("power_iterations", self.power_iterations, "how often a basis is refined")
        choices = get_args(Orthonormalization)
        check_choice("orthonormalization", self.orthonormalization, choices)
        check_number("shrinkage", self.shrinkage, 0, 1)
        check_mask(self.mask)
        check_key(self.key)

    def projects(self, kinds: Sequence[tuple[str, type]], updates: Any) -> list[bool]:
        """Which leaves are projected, given the path and the kind of scores of each."""
        projects = projected_leaves(kinds, self.mask, updates, (LayerFactors,), (LayerFactors,))
        if kinds and not any(issubclass(kind, LayerFactors) for _, kind in kinds):
            raise ValueError(
                "scores has no LayerFactors, so there is nothing to project: take scores from "
                "proma_jax.sequence_scores, and see proma_jax.describe_scores."
            )
        return projects

    def rank_in(self, num_tokens: int, d_in: int, d_out: int) -> int:
        """The rank of a layer's subspaces, for a microbatch of so many tokens."""
        return min(self.rank, num_tokens, d_in, d_out)

    def rank_of(self, factors: LayerFactors) -> int:
        """The rank of the subspaces of a layer with these factors."""
        return self.rank_in(factors.rows("inputs").shape[-2], *factors.matrix_shape)

    def shapes_in(self, num_tokens: int, d_in: int, d_out: int) -> list[tuple[int, int]]:
        """(rank, dimension) of a layer's two bases, for a microbatch of so many tokens."""
        rank = self.rank_in(num_tokens, d_in, d_out)
        return [(rank, d_in), (rank, d_out)]

    def warn_of_whole_gradients(self, layers: Sequence[tuple[str, int, int, int]]) -> None:
        """Warns of layers whose gradient is in the subspaces, all of it.

        Args:
          layers: path, number of tokens, d_in and d_out of each.
        """
        whole = [
            f"{path or '(root)'} ({counted(num_tokens, 'token')}, {d_in} -> {d_out})"
            for path, num_tokens, d_in, d_out in layers
            for rank in [self.rank_in(num_tokens, d_in, d_out)]
            if 0 < num_tokens == rank or d_in == d_out == rank
        ]
        if whole:
            warnings.warn(
                f"Intra of rank {self.rank} removes the whole gradient of {', '.join(whole)}. Take "
                "a rank well below the tokens of a microbatch and the widths of its layers, or "
                "leave these out by a mask.",
                stacklevel=2,
            )


def check_settings(accumulation: Any, intra: Any) -> None:
    """Raises a ValueError unless each is the settings of its variant, or None."""
    for name, settings, kind, example in [
        ("accumulation", accumulation, Accumulation, "Accumulation(relative_bound=0.5)"),
        ("intra", intra, Intra, "Intra(rank=2)"),
    ]:
        if not isinstance(settings, kind | None):
            raise ValueError(
                f"{name}={settings!r} must be a proma_jax.{kind.__name__}, such as {example}, or "
                "None."
            )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")


def check_count(name: str, value: Any, meaning: str) -> None:
    """Raises a ValueError unless `value` is a static integer of at least 1."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise ValueError(
            f"{name}={value!r} must be a static int: it can neither be traced nor injected (name "
            "it in the static_args of optax.inject_hyperparams)."
        )
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1: it is {meaning}.")


def check_number(
    name: str, value: Any, least: float, most: float = float("inf"), schedulable: bool = True
) -> None:
    """Raises a ValueError if `value` is not a number in [least, most], as far as it is known."""
    if isinstance(value, jax.core.Tracer) or (schedulable and callable(value)):
        return
    is_scalar = isinstance(value, (int, float, np.generic, np.ndarray, jax.Array))
    if not is_scalar or jnp.shape(value) != () or not least <= value <= most:
        otherwise = ", or a schedule of such" if schedulable else ""
        raise ValueError(f"{name}={value!r} must be a number in [{least:g}, {most:g}]{otherwise}.")


def prng_key(key: Any) -> jax.Array:
    """A seed or a key, typed or raw, as a typed key."""
    dtype = jnp.result_type(key)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    is_seed = jnp.issubdtype(dtype, jnp.integer) and jnp.ndim(key) == 0
    return jax.random.key(key) if is_seed else jax.random.wrap_key_data(key)


def check_key(key: Any) -> None:
    """Raises a ValueError unless `key` is a seed or one key."""
    try:
        jax.eval_shape(lambda: jax.random.fold_in(prng_key(key), 0))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"key={key!r} must be an int or one key, as of jax.random.key: it cannot be injected "
            "(name it in the static_args of optax.inject_hyperparams)."
        ) from error


def check_axis_name(axis_name: Any) -> None:
    """Raises a ValueError unless it names mapped axes, or is None."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if names is None:
        return
    if not isinstance(names, tuple) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(
            f"axis_name={axis_name!r} must be None, the name of a mapped axis, or a tuple of names."
        )


def check_mask(mask: Any) -> None:
    """Raises a ValueError for a mask that is False and nothing more.

    That is what `optax.inject_hyperparams` makes of a function, which it takes for a schedule.
    """
    if isinstance(mask, (bool, np.bool_)) and not mask:
        raise ValueError(
            f"mask={mask} projects nothing, which is shrinkage=0. If optax.inject_hyperparams made "
            "it of a function, name mask in its static_args."
        )


def at_step(number: Any, step: jax.Array) -> Any:
    """The value of a number, or of a schedule at a step."""
    return number(step) if callable(number) else number


def projected_leaves(
    kinds: Sequence[tuple[str, type]],
    mask: Mask,
    updates: Any,
    by_default: tuple[type, ...],
    possible: tuple[type, ...],
) -> list[bool]:
    """Whether each leaf of `updates` is to be projected.

    Args:
      kinds: path of each leaf and the type of its scores.
      mask: as in `mask_leaves`, or None.
      updates: pytree of arrays.
      by_default: kinds of scores that are projected without a mask.
      possible: kinds of scores that can be projected.

    Raises:
      ValueError: the mask does not fit, or asks for a leaf whose scores are of another kind.
    """
    if mask is None:
        return [issubclass(kind, by_default) for _, kind in kinds]
    chosen = mask_leaves(mask, updates)
    for (path, kind), project in zip(kinds, chosen, strict=True):
        if project and not issubclass(kind, possible):
            name = "None" if kind is type(None) else kind.__name__
            needed = " or ".join(sorted(kind.__name__ for kind in possible))
            raise ValueError(
                f"mask asks to project {path}, but its scores are {name}, not {needed}."
            )
    return chosen


def mask_leaves(mask: Mask, updates: Any) -> list[bool]:
    """One bool for each leaf of `updates`.

    Args:
      mask: a pytree of bools that is a prefix of `updates`, or a function from `updates` to one.
      updates: pytree of arrays, in which `optax.MaskedNode` stands for what is not there.

    Raises:
      ValueError: the mask has another structure or holds something else than bools.
    """
    tree = mask(updates) if callable(mask) else mask

    def expand(chosen: Any, subtree: Any) -> Any:
        if not isinstance(chosen, (bool, np.bool_)):
            raise ValueError(f"it holds {chosen!r}, but every leaf must be True or False.")
        return jax.tree.map(lambda _: bool(chosen), subtree)

    try:
        expanded = jax.tree.map(expand, tree, updates)
    except (TypeError, ValueError) as error:
        raise ValueError(f"mask does not fit the updates: {error}") from error
    return jax.tree.leaves(expanded)
