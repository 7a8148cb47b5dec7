"""What users name of a mesh: the axes of the sequences, and how parameters are spread.

Every name is looked up before it is used: what no mesh has, or does not fit, is an error.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from proma_jax._mesh.axes import Spec, axis_names, is_spec, mesh_with, names_in, num_devices


def batch_axes_of(spmd_axis_name: Any, arrays: Any) -> tuple[str, ...]:
    """The mesh axes that `spmd_axis_name` names; a ValueError for those that no mesh has."""
    names = axis_names(spmd_axis_name)
    problem = _unknown(names, arrays)
    if problem:
        raise ValueError(f"spmd_axis_name is {spmd_axis_name!r}, but {problem}.")
    return names


def specs_of_leaves(specs: Any, params: Any, sequences: Any) -> list[Spec]:
    """A PartitionSpec for each parameter leaf, None where that is not known.

    Args:
      specs: pytree of PartitionSpecs and None, a prefix of `params`.
      params: the parameters.
      sequences: arrays that they are used with, whose mesh may be named.

    Raises:
      ValueError: `specs` has another structure, holds something else or does not fit a leaf, or the
        parameters' types say already how they are spread.
    """
    if specs is not None and mesh_with(AxisType.Explicit, params) is not None:
        raise ValueError(
            "param_specs is for Auto mesh axes, but params has Explicit ones, whose types say how "
            "it is spread: leave param_specs out."
        )
    of_leaves: list[Spec] = []

    def collect(spec: Any, subtree: Any) -> None:
        of_leaves.extend([spec] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map(collect, specs, params, is_leaf=is_spec)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"param_specs does not fit params: {error}") from error
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), spec in zip(leaves, of_leaves, strict=True):
        problem = _problem(spec, leaf, sequences)
        if problem:
            raise ValueError(
                f"param_specs has {spec!r} for params{jax.tree_util.keystr(path)} of shape "
                f"{jnp.shape(leaf)}, but {problem}."
            )
    return of_leaves


def _problem(spec: Any, leaf: Any, sequences: Any) -> str | None:
    """What keeps an array from being spread by `spec`, None if nothing does."""
    if spec is None:
        return None
    if not isinstance(spec, PartitionSpec) or PartitionSpec.UNCONSTRAINED in tuple(spec):
        return "it must be a PartitionSpec of axis names, or None"
    names, shape = names_in(spec), jnp.shape(leaf)
    if len(spec) > len(shape) or len(set(names)) < len(names):
        return "it has too many entries, or names an axis twice"
    unknown, mesh = _unknown(names, (leaf, sequences)), mesh_with(AxisType.Auto, leaf)
    if unknown or mesh is None:
        return unknown
    if any(n % num_devices(mesh, axis_names(entry)) for n, entry in zip(shape, spec, strict=False)):
        return f"its axes cannot be divided so on {dict(mesh.shape)}"
    return None


def _unknown(names: Iterable[str], arrays: Any) -> str | None:
    """What to say of mesh axes if no mesh has them, neither that of arrays nor the one set."""
    meshes = [jax.sharding.get_abstract_mesh()]
    meshes += [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays)]
    known = tuple(dict.fromkeys(name for mesh in meshes for name in mesh.axis_names))
    if set(names) <= set(known):
        return None
    if known:
        return f"the mesh has the axes {known}"
    return "no mesh is set: call it under `with jax.set_mesh(mesh)`"
