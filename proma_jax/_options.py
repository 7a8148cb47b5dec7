"""Options that both transformations take: masks, and numbers that may be schedules."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from proma_jax.projection import layer_norms
from proma_jax.scores import AxisName, divide, wide

Number = ArrayLike | Callable[[jax.Array], ArrayLike]
Mask = Any | Callable[[Any], Any]


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
      mask: as in `_mask_leaves`, or None.
      updates: pytree of arrays.
      by_default: kinds of scores that are projected without a mask.
      possible: kinds of scores that can be projected.

    Raises:
      ValueError: the mask does not fit, or asks for a leaf whose scores are of another kind.
    """
    if mask is None:
        return [issubclass(kind, by_default) for _, kind in kinds]
    chosen = _mask_leaves(mask, updates)
    for (path, kind), project in zip(kinds, chosen, strict=True):
        if project and not issubclass(kind, possible):
            name = "None" if kind is type(None) else kind.__name__
            needed = " or ".join(sorted(kind.__name__ for kind in possible))
            raise ValueError(
                f"mask asks to project {path}, but its scores are {name}, not {needed}."
            )
    return chosen


def _mask_leaves(mask: Mask, updates: Any) -> list[bool]:
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


def mean(arrays: Any, axis_name: AxisName) -> Any:
    """Arrays' means over mapped axes, taken in at least float32, in their own types."""
    if axis_name is None:
        return arrays
    return jax.tree.map(lambda x: jax.lax.pmean(wide(x), axis_name).astype(x.dtype), arrays)


def norm(arrays: Sequence[jax.Array], axis_name: AxisName = None) -> jax.Array:
    """() float32, the norm of all arrays together, and of all devices' along mapped axes."""
    norms = [layer_norms(array).astype(jnp.float32) for array in arrays]
    together = layer_norms(jnp.stack(norms)) if norms else jnp.zeros((), jnp.float32)
    if axis_name is None:
        return together
    size = jax.lax.pmax(jax.lax.stop_gradient(together), axis_name)
    return size * jnp.sqrt(jax.lax.psum(divide(together, size) ** 2, axis_name))


def fraction(
    removed: Sequence[jax.Array], whole: Sequence[jax.Array], axis_name: AxisName = None
) -> jax.Array:
    """‖removed‖ / ‖whole‖, each as of `norm`; 0 where both are zero. Float32."""
    return divide(norm(removed, axis_name), norm(whole, axis_name))


def with_leaves(tree: Any, leaves: Sequence[jax.Array]) -> Any:
    """`tree` with other leaves."""
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
