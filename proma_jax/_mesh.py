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
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays that belong to a parameter leaf are spread over a mesh.

    Attributes:
      gradient: the parameter leaf; None if its axes are not Explicit.
      scores: its dense scores (b, *layers, ...), by their features; None if nothing is known.
    """

    gradient: PartitionSpec | None
    scores: PartitionSpec | None


def automatic(fn: Callable[..., T], specs: Any, *arguments: Any) -> T:
    """`fn(*arguments)`, computed as under Auto axes.

    Args:
      fn: of arrays that are all among its arguments, not in its closure.
      specs: PartitionSpecs of the result under Explicit axes, a prefix of its structure.
      *arguments: pytrees of arrays.
    """
    mesh = _mesh_with(AxisType.Explicit, arguments)
    if mesh is None:
        return fn(*arguments)
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
) -> Layout | None:
    """The layout for a parameter leaf's scores, None if there is nothing to say.

    Under Explicit axes all is known from the arrays. Under Auto axes only `batch_axes` tell, and
    then only on a mesh that has no other axes, along which a leaf could be spread.

    Args:
      leaf: the parameter leaf, or an array spread like it.
      sequences: an array whose first axis is the sequences, spread as they are.
      in_layout: reads the leaf as (*layers, ...).
      num_layer_axes: how many axes of that are layers.
      batch_axes: the mesh axes over which the sequences are spread, under Auto axes.
    """
    mesh = _mesh_with(AxisType.Explicit, (leaf, sequences))
    if mesh is not None:
        batch_axes, gradient = explicit_batch_axes(sequences), spec_of(leaf)
        within = spec_within(leaf, in_layout)
        if within is None:
            return Layout(gradient, None)
    else:
        mesh, gradient, within = _mesh_with(AxisType.Auto, (leaf, sequences)), None, PartitionSpec()
        if mesh is None or {a for a, n in mesh.shape.items() if n > 1} != set(batch_axes):
            return None
    shape = jax.eval_shape(in_layout, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)).shape
    spec = [*within, *[None] * len(shape)][: len(shape)]
    taken = {name for entry in spec for name in axis_names(entry)}
    free = tuple(name for name in batch_axes if name not in taken)
    if free:
        parts = math.prod(mesh.shape[name] for name in free)
        divisible = [
            i
            for i in range(num_layer_axes, len(shape))
            if spec[i] is None and shape[i] % parts == 0
        ]
        if not divisible:
            return Layout(gradient, None)
        spec[divisible[0]] = free
    return Layout(gradient, PartitionSpec(None, *spec))


def spec_within(leaf: Any, in_layout: Callable[[jax.Array], jax.Array]) -> PartitionSpec | None:
    """How a leaf in another layout is spread over Explicit axes; None where it mixes them."""
    value = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.typeof(leaf).sharding)
    try:
        return jax.eval_shape(in_layout, value).sharding.spec
    except Exception:  # JAX has no public name for the one of a reshape that mixes spread axes
        return None


def by_features(values: jax.Array, layout: Layout | None, num_summed: int = 0) -> jax.Array:
    """Dense scores (b, *layers, ...) spread as their layout says, under Auto axes.

    With `num_summed` 1, what they sum to over the sequences.
    """
    mesh = _mesh_with(AxisType.Auto, values)
    if layout is None or layout.scores is None or mesh is None:
        return values
    named = {name for entry in layout.scores for name in axis_names(entry)}
    if not named <= _axes_of(mesh, AxisType.Auto):
        return values
    spec = PartitionSpec(*layout.scores[num_summed:])
    return jax.lax.with_sharding_constraint(values, NamedSharding(mesh, spec))


def without_batch_axes(params: Any, microbatch: Any) -> Any:
    """Parameters that are whole along the Explicit axes over which sequences are spread.

    Nothing can be spread over one axis twice, as a parameter would under a `vmap` over sequences.
    """
    batch_axes = explicit_batch_axes(microbatch)

    def whole(leaf: jax.Array) -> jax.Array:
        mesh, names = jax.typeof(leaf).sharding.mesh, list(map(axis_names, spec_of(leaf)))
        kept = [tuple(name for name in of_axis if name not in batch_axes) for of_axis in names]
        if kept == names:
            return leaf
        spec = PartitionSpec(*[of_axis or None for of_axis in kept])
        return jax.sharding.reshard(leaf, NamedSharding(mesh, spec))

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


def explicit_batch_axes(arrays: Any) -> tuple[str, ...]:
    """The Explicit mesh axes over which the first axes of arrays are spread."""
    specs = [spec_of(x) for x in jax.tree.leaves(arrays)]
    return tuple(dict.fromkeys(name for spec in specs if spec for name in axis_names(spec[0])))


def _mesh_with(kind: AxisType, arrays: Any) -> Any:
    """The mesh of the first array whose mesh has axes of a kind, None if there is none."""
    for x in jax.tree.leaves(arrays):
        mesh = jax.typeof(x).sharding.mesh
        if _axes_of(mesh, kind):
            return mesh
    return None


def _axes_of(mesh: Any, kind: AxisType) -> set[str]:
    return {name for name, of in zip(mesh.axis_names, mesh.axis_types, strict=True) if of == kind}


def axis_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes named by an entry of a PartitionSpec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
