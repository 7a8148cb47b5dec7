"""The words of meshes: which axes there are, and which of them a PartitionSpec names."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

Spec = PartitionSpec | None
"""How an array is spread over a mesh; None if that is not known."""


def spec_of(x: Any) -> PartitionSpec:
    """How an array is spread over Explicit axes."""
    return jax.typeof(x).sharding.spec


def without_leading(spec: PartitionSpec, count: int) -> PartitionSpec:
    """How an array is spread without its first axes."""
    return PartitionSpec(*spec[count:])


def axis_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes named by an entry of a PartitionSpec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def mesh_with(kind: AxisType, arrays: Any) -> Any:
    """The mesh of the first array whose mesh has axes of a kind, None if there is none."""
    for x in jax.tree.leaves(arrays):
        mesh = jax.typeof(x).sharding.mesh
        if axes_of(mesh, kind):
            return mesh
    return None


def changes_mesh(old: Any, new: Any) -> bool:
    """Whether types of arrays have different meshes, as where `jax.sharding.auto_axes` begins."""
    return not old.sharding.mesh.empty and old.sharding.mesh != new.sharding.mesh


def axes_of(mesh: Any, kind: AxisType) -> set[str]:
    """The axes of a mesh that are of a kind."""
    return {name for name, of in zip(mesh.axis_names, mesh.axis_types, strict=True) if of == kind}


def num_devices(mesh: Any, names: Sequence[str]) -> int:
    """The number of devices along some mesh axes."""
    return math.prod(mesh.shape[name] for name in names)


def names_in(spec: Iterable[Any]) -> list[str]:
    """The mesh axes named anywhere in a PartitionSpec."""
    return [name for entry in spec for name in axis_names(entry)]


def without(spec: Iterable[Any], names: Sequence[str]) -> list[Any]:
    """The entries of a PartitionSpec without some mesh axes."""
    kept = [tuple(name for name in axis_names(entry) if name not in names) for entry in spec]
    return [entry or None for entry in kept]


def explicit_batch_axes(arrays: Any) -> tuple[str, ...]:
    """The Explicit mesh axes over which the first axes of arrays are spread."""
    specs = [spec_of(x) for x in jax.tree.leaves(arrays)]
    return tuple(dict.fromkeys(name for spec in specs if spec for name in axis_names(spec[0])))


def has_several_devices() -> bool:
    """Whether a mesh of several devices is set, over which XLA may spread what is computed."""
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - axes_of(mesh, AxisType.Manual)
    return num_devices(mesh, tuple(free)) > 1


def is_spec(x: Any) -> bool:
    """Whether something is a `Spec`."""
    return x is None or isinstance(x, PartitionSpec)
