"""What the states of both transformations share: a version, checks, and updates as one program."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

F = TypeVar("F", bound=Callable[..., Any])

STATE_VERSION = 3


def state_version() -> jax.Array:
    """() int32, what new states carry."""
    return jnp.asarray(STATE_VERSION, jnp.int32)


def check_state(state: Any, kind: type) -> None:
    """Raises a ValueError unless a state is of the kind that `init` makes."""
    if not isinstance(state, kind):
        raise ValueError(
            f"state is of type {type(state).__name__}, but must be the {kind.__name__} that `init` "
            "makes; one from a checkpoint must be restored as such."
        )


def compiled(update: F, *numbers: Any) -> F:
    """An update as one program, which also eager calls compile once, unless it closes over arrays.

    `optax.inject_hyperparams` makes a new transformation for every update, of numbers that are
    arrays: that would be compiled every time.
    """
    if any(isinstance(x, (jax.Array, np.ndarray)) for x in numbers):
        return update
    as_one = jax.jit(update)

    def call(*arguments: Any) -> Any:
        """Also takes what is no array, such as a function for a line search: not compiled then."""
        leaves = jax.tree.leaves(arguments)
        are_arrays = all(
            isinstance(x, (jax.Array, np.ndarray, np.generic, float, int)) for x in leaves
        )
        return as_one(*arguments) if are_arrays else update(*arguments)

    return call  # type: ignore[return-value]


def check_shapes(updates: Any, acc_grads: Any) -> None:
    """Raises a ValueError unless the state is of parameters shaped like the updates."""
    expected = dict(jax.tree_util.tree_leaves_with_path(acc_grads))
    given = dict(jax.tree_util.tree_leaves_with_path(updates))
    for path in given | expected:
        shapes = [leaves[path].shape if path in leaves else None for leaves in (given, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} has shape {shapes[0]}, but the state is "
                f"of parameters with shape {shapes[1]} there: init and update need one tree."
            )


def as_typed(new: ArrayLike, old: jax.Array) -> jax.Array:
    """A new value in the type of the old one."""
    new = jnp.asarray(new)
    return new if new.dtype == old.dtype else new.astype(old.dtype)
