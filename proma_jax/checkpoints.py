"""Checkpoints: whether a saved state fits the program that wants to go on from it.

The states of `accumulate` and `project_intra` are NamedTuples of arrays, which any checkpointing
library saves. They carry a version, which changes whenever an older state can no longer be gone on
from, by its structure or by what its numbers mean. Libraries restore into a state of the wanted
structure, as of `tx.init(params)`, and say little where the saved one is another;
`check_restorable` names the leaves that differ.

Example:
  >>> import jax.numpy as jnp, optax
  >>> import proma_jax as proma
  >>> tx = proma.accumulate(optax.sgd(1e-3), 4)
  >>> saved = tx.init({"w": jnp.ones((3, 2))})
  >>> check_restorable(saved, tx.init({"w": jnp.ones((3, 4))}))
  Traceback (most recent call last):
    ...
  ValueError: the saved state does not fit: acc_grads.w has shape (3, 2) there and (3, 4) here
"""

from typing import Any

import jax
import numpy as np

from proma_jax.accumulation import AccumulateState
from proma_jax.intra import ProjectIntraState


def check_restorable(saved: Any, state: Any) -> None:
    """Says why a saved state cannot be gone on from, if so.

    With orbax-checkpoint, `check_restorable(manager.item_metadata(step).tree, state)` before
    `restored = manager.restore(step, args=ocp.args.StandardRestore(state))`, and
    `check_restorable(restored, state)` after it, which also compares versions. In a new process
    the metadata is None unless the manager was made with
    `item_handlers=ocp.StandardCheckpointHandler()`.

    Args:
      saved: a pytree of arrays, or of whatever has a shape and a dtype. NamedTuples may have become
        dicts, and tuples lists.
      state: what is wanted, such as `(params, tx.init(params))`.

    Raises:
      ValueError: leaves are missing, left over or of other shapes or types, or a state of
        `accumulate` or `project_intra` is of another version. The message names them.
    """
    there, here, versions = _leaves(saved), _leaves(state), _versions(state)
    differences = {
        name: difference
        for name in there | here
        if (difference := _difference(there.get(name), here.get(name), name in versions))
    }
    if not differences:
        return
    first = "; ".join(f"{name} {what}" for name, what in list(differences.items())[:10])
    more = f"; and {len(differences) - 10} more leaves" if len(differences) > 10 else ""
    advice = ""
    if versions & differences.keys():
        advice = (
            ". Another version of proma_jax saved it: go on with that version, or restore the "
            "parameters alone and make the optimizer's state anew with `init`"
        )
    raise ValueError(f"the saved state does not fit: {first}{more}{advice}")


def _leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): _as_array(leaf) for path, leaf in leaves}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _as_array(leaf: Any) -> Any:
    """A leaf that is saved as an array: a PRNG key as its data, a Python number."""
    if not hasattr(leaf, "dtype"):
        return np.asarray(leaf)
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf


def _versions(state: Any) -> set[str]:
    """The names of the versions of our own states."""

    def is_ours(x: Any) -> bool:
        return isinstance(x, (AccumulateState, ProjectIntraState))

    found = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_ours)
    version = jax.tree_util.GetAttrKey("version")
    return {_name((*path, version)) for path, leaf in found if is_ours(leaf)}


def _difference(there: Any, here: Any, is_version: bool) -> str | None:
    """What differs between a saved leaf and the one that is wanted; None stands for no leaf."""
    if there is None:
        return "is not there"
    if here is None:
        return "is there, but not here"
    for what, a, b in [
        ("shape", tuple(there.shape), tuple(here.shape)),
        ("type", there.dtype, here.dtype),
    ]:
        if a != b:
            return f"has {what} {a} there and {b} here"
    known = all(isinstance(x, (np.ndarray, jax.Array)) for x in (there, here))
    if is_version and known and np.any(there != here):
        return f"is {there} there and {here} here"
    return None
