"""Meshes: the same arithmetic, whatever mesh its arrays are spread over.

Under Explicit axes JAX wants to be told how the result of a contraction is spread; `automatic`
leaves that to XLA, as under Auto axes, all but the end results. A `Layout` is what the arithmetic
of the scores cannot see from there. With it the products of all pairs of sequences need no
sequence's dense scores anywhere but in parts: they are exchanged so that each device holds the same
part of every sequence's score, where by default XLA would bring all scores whole to every device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from proma_jax.arithmetic import AxisName, wide

T = TypeVar("T")
Spec = PartitionSpec | None
"""How an array is spread over a mesh; None if that is not known."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays that belong to a parameter leaf are spread over a mesh.

    Attributes:
      gradient: the parameter leaf and its gradients; None if that is not known.
      by_sequence: its dense scores (b, *layers, ...) as they are made, every sequence's where its
        factors are; None if that is not known.
      between: what `by_sequence` is turned into first, where the mesh axes of sequences that spread
        the leaf as well have moved to the features: XLA knows how to move some axes at a time.
      by_feature: its dense scores as they are used, the same part of all; None likewise.
    """

    gradient: Spec
    by_sequence: Spec = None
    between: Spec = None
    by_feature: Spec = None


def automatic(fn: Callable[..., T], like: Any, *arguments: Any) -> T:
    """`fn(*arguments)`, computed as under Auto axes.

    Args:
      fn: of arrays that are all among its arguments, not in its closure.
      like: how the result is spread over Explicit axes, a prefix of its structure: arrays that are
        spread like it, or PartitionSpecs; None for what is whole on every device.
      *arguments: pytrees of arrays.
    """
    mesh = _mesh_with(AxisType.Explicit, arguments)
    if mesh is None:
        return fn(*arguments)

    def spec(x: Any) -> PartitionSpec:
        return (x or PartitionSpec()) if _is_spec(x) else spec_of(x)

    specs = jax.tree.map(spec, like, is_leaf=_is_spec)
    axes = tuple(_axes_of(mesh, AxisType.Explicit))
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(fn, axes=axes, out_sharding=specs)(*arguments)


def spec_of(x: Any) -> PartitionSpec:
    """How an array is spread over Explicit axes."""
    return jax.typeof(x).sharding.spec


def layout_of(
    leaf: Any,
    sequences: jax.Array,
    in_layout: Callable[[jax.Array], jax.Array],
    num_layer_axes: int,
    batch_axes: Sequence[str] = (),
    spec: Spec = None,
) -> Layout | None:
    """The layout for a parameter leaf's scores, None if there is nothing to say.

    Under Explicit axes all is known from the arrays, under Auto axes what `batch_axes` and `spec`
    tell.

    Args:
      leaf: the parameter leaf, or an array spread like it.
      sequences: an array whose first axis is the sequences, spread as they are.
      in_layout: reads the leaf as (*layers, ...).
      num_layer_axes: how many axes of that are layers.
      batch_axes: the mesh axes over which the sequences are spread, under Auto axes.
      spec: how the leaf is spread over Auto axes, None if that is not known.
    """
    mesh = _mesh_with(AxisType.Explicit, (leaf, sequences))
    if mesh is not None:
        batch_axes, spec = explicit_batch_axes(sequences), spec_of(leaf)
    else:
        mesh = _mesh_with(AxisType.Auto, (leaf, sequences))
        if mesh is None or spec is None:
            return None
    within = spec_within(leaf, in_layout, spec)
    if within is None or not batch_axes:
        return Layout(spec)
    shape = jax.eval_shape(in_layout, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)).shape
    features = [*within, *[None] * len(shape)][: len(shape)]
    if sequences.shape[0] % _size(mesh, batch_axes):
        return Layout(spec)
    by_sequence = PartitionSpec(tuple(batch_axes), *_without(features, batch_axes))
    free = tuple(name for name in batch_axes if name not in _named(features))
    between = PartitionSpec(free, *features)
    if free:
        most_spread_first = sorted(
            range(num_layer_axes, len(shape)), key=lambda i: -len(axis_names(features[i]))
        )
        for i in most_spread_first:
            joined = (*axis_names(features[i]), *free)
            if set(joined) <= set(batch_axes) and shape[i] % _size(mesh, joined) == 0:
                features[i] = joined
                break
        else:
            return Layout(spec)
    return Layout(spec, by_sequence, between, PartitionSpec(None, *features))


def spec_within(leaf: Any, in_layout: Callable[[jax.Array], jax.Array], spec: Spec = None) -> Spec:
    """How a leaf in another layout is spread over a mesh; None where it mixes spread axes.

    Args:
      leaf: an array.
      in_layout: reads it in the other layout.
      spec: how the leaf is spread over Auto axes. Explicit ones say it themselves.
    """
    sharding: Any = jax.typeof(leaf).sharding
    if _axes_of(sharding.mesh, AxisType.Auto) and spec is not None:
        sharding = NamedSharding(_explicit(sharding.mesh), spec)
    value = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    try:
        with jax.sharding.use_abstract_mesh(sharding.mesh):
            return jax.eval_shape(in_layout, value).sharding.spec
    except Exception:  # JAX has no public name for the one of a reshape that mixes spread axes
        return None


def rearranged(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`fn(x)`, which only rearranges; whole on every device where it mixes spread axes."""
    return automatic(fn, spec_within(x, fn), x)


def spread(x: jax.Array, spec: Spec) -> jax.Array:
    """An array spread over Auto axes by `spec`; as it is, if that is None or of other axes."""
    mesh = _mesh_with(AxisType.Auto, x)
    if spec is None or mesh is None:
        return x
    if not set(_named(spec)) <= _axes_of(mesh, AxisType.Auto):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def batch_axes_of(spmd_axis_name: Any, arrays: Any) -> tuple[str, ...]:
    """The mesh axes that `spmd_axis_name` names; a ValueError for those that no mesh has."""
    names = axis_names(spmd_axis_name)
    problem = _unknown(names, arrays)
    if problem:
        raise ValueError(f"spmd_axis_name is {spmd_axis_name!r}, but {problem}.")
    return names


def by_feature(layers: jax.Array, layout: Layout) -> jax.Array:
    """An array (*layers, ...) spread like one of a leaf's dense scores, as they are used."""
    if layout.by_feature is None:
        return layers
    return spread(layers, without_leading(layout.by_feature, 1))


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
    if specs is not None and _mesh_with(AxisType.Explicit, params) is not None:
        raise ValueError(
            "param_specs is for Auto mesh axes, but params has Explicit ones, whose types say how "
            "it is spread: leave param_specs out."
        )
    of_leaves: list[Spec] = []

    def collect(spec: Any, subtree: Any) -> None:
        of_leaves.extend([spec] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map(collect, specs, params, is_leaf=_is_spec)
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
    names, shape = _named(spec), jnp.shape(leaf)
    if len(spec) > len(shape) or len(set(names)) < len(names):
        return "it has too many entries, or names an axis twice"
    unknown, mesh = _unknown(names, (leaf, sequences)), _mesh_with(AxisType.Auto, leaf)
    if unknown or mesh is None:
        return unknown
    if any(n % _size(mesh, axis_names(entry)) for n, entry in zip(shape, spec, strict=False)):
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


def without_batch_axes(params: Any, microbatch: Any) -> Any:
    """Parameters that are whole along the Explicit axes over which sequences are spread.

    Nothing can be spread over one axis twice, as a parameter would under a `vmap` over sequences.
    """
    batch_axes = explicit_batch_axes(microbatch)

    def whole(leaf: jax.Array) -> jax.Array:
        mesh, spec = jax.typeof(leaf).sharding.mesh, spec_of(leaf)
        if set(batch_axes).isdisjoint(_named(spec)):
            return leaf
        kept = PartitionSpec(*_without(spec, batch_axes))
        return jax.sharding.reshard(leaf, NamedSharding(mesh, kept))

    return jax.tree.map(whole, params)


def varying_like(tree: Any, like: Any) -> Any:
    """Arrays that `jax.shard_map` takes to differ between devices where any array in `like` does.

    The gradient with respect to an array that is the same on all devices is summed over them.
    """
    if _mesh_with(AxisType.Manual, like) is None:
        return tree
    numbers = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(like)
    ]
    flag = functools.reduce(jnp.logical_or, [jnp.zeros_like(x, bool, shape=()) for x in numbers])
    return jax.tree.map(lambda x: jnp.where(flag, x, x), tree)


def mean(arrays: Any, axis_name: AxisName) -> Any:
    """Arrays' means over mapped axes, if any, taken in at least float32, in their own types."""
    if axis_name is None:
        return arrays

    def of_one(x: jax.Array) -> jax.Array:
        return jax.lax.pmean(wide(x), axis_name).astype(x.dtype)

    return jax.tree.map(of_one, arrays)


def has_several_devices() -> bool:
    """Whether a mesh of several devices is set, over which XLA may spread what is computed."""
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - _axes_of(mesh, AxisType.Manual)
    return _size(mesh, tuple(free)) > 1


def explicit_batch_axes(arrays: Any) -> tuple[str, ...]:
    """The Explicit mesh axes over which the first axes of arrays are spread."""
    specs = [spec_of(x) for x in jax.tree.leaves(arrays)]
    return tuple(dict.fromkeys(name for spec in specs if spec for name in axis_names(spec[0])))


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec)


def _mesh_with(kind: AxisType, arrays: Any) -> Any:
    """The mesh of the first array whose mesh has axes of a kind, None if there is none."""
    for x in jax.tree.leaves(arrays):
        mesh = jax.typeof(x).sharding.mesh
        if _axes_of(mesh, kind):
            return mesh
    return None


def _explicit(mesh: Any) -> AbstractMesh:
    """The mesh with Explicit axes."""
    types = (AxisType.Explicit,) * len(mesh.axis_names)
    return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)


def _axes_of(mesh: Any, kind: AxisType) -> set[str]:
    return {name for name, of in zip(mesh.axis_names, mesh.axis_types, strict=True) if of == kind}


def _size(mesh: Any, names: Sequence[str]) -> int:
    """The number of devices along some mesh axes."""
    return math.prod(mesh.shape[name] for name in names)


def _named(spec: Iterable[Any]) -> list[str]:
    """The mesh axes named anywhere in a PartitionSpec."""
    return [name for entry in spec for name in axis_names(entry)]


def _without(spec: Iterable[Any], names: Sequence[str]) -> list[Any]:
    """The entries of a PartitionSpec without some mesh axes."""
    kept = [tuple(name for name in axis_names(entry) if name not in names) for entry in spec]
    return [entry or None for entry in kept]


def without_leading(spec: PartitionSpec, count: int) -> PartitionSpec:
    """How an array is spread without its first axes."""
    return PartitionSpec(*spec[count:])


def axis_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes named by an entry of a PartitionSpec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
