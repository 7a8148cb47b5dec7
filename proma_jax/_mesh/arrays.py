"""Arrays on a mesh: the same arithmetic, however they are spread.

Under Explicit axes JAX wants to be told how the result of a contraction is spread; `automatic`
leaves that to XLA, as under Auto axes, all but the end results.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from proma_jax._mesh.axes import (
    Spec,
    axes_of,
    explicit_batch_axes,
    is_spec,
    mesh_with,
    names_in,
    spec_of,
    without,
)
from proma_jax.arithmetic import AxisName, wide

T = TypeVar("T")


def automatic(fn: Callable[..., T], like: Any, *arguments: Any) -> T:
    """`fn(*arguments)`, computed as under Auto axes.

    Args:
      fn: of arrays that are all among its arguments, not in its closure.
      like: how the result is spread over Explicit axes, a prefix of its structure: arrays that are
        spread like it, or PartitionSpecs; None for what is whole on every device.
      *arguments: pytrees of arrays.
    """
    mesh = mesh_with(AxisType.Explicit, arguments)
    if mesh is None:
        return fn(*arguments)

    def spec(x: Any) -> PartitionSpec:
        return (x or PartitionSpec()) if is_spec(x) else spec_of(x)

    specs = jax.tree.map(spec, like, is_leaf=is_spec)
    axes = tuple(axes_of(mesh, AxisType.Explicit))
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(fn, axes=axes, out_sharding=specs)(*arguments)


def spec_within(leaf: Any, in_layout: Callable[[jax.Array], jax.Array], spec: Spec = None) -> Spec:
    """How a leaf in another layout is spread over a mesh; None where it mixes spread axes.

    Args:
      leaf: an array.
      in_layout: reads it in the other layout.
      spec: how the leaf is spread over Auto axes. Explicit ones say it themselves.
    """
    sharding: Any = jax.typeof(leaf).sharding
    if axes_of(sharding.mesh, AxisType.Auto) and spec is not None:
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
    mesh = mesh_with(AxisType.Auto, x)
    if spec is None or mesh is None:
        return x
    if not set(names_in(spec)) <= axes_of(mesh, AxisType.Auto):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def zeros_like(like: Any, lengths: Sequence[int], dtype: Any = None) -> jax.Array:
    """(*lengths, *shape) zeros, spread like an array of a traced type."""
    spec = PartitionSpec(*[None] * len(lengths), *like.sharding.spec)
    sharding = NamedSharding(like.sharding.mesh, spec)
    return jnp.zeros((*lengths, *like.shape), dtype or like.dtype, out_sharding=sharding)


def on_devices_of(params: Any, state: T) -> T:
    """A state whose arrays are all committed to the parameters' devices, if these are.

    Restored parameters are committed to devices, while zeros are not. An update would be compiled
    for this mixture, and again for its own results.
    """

    def is_concrete(x: Any) -> bool:
        return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)

    shardings = [x.sharding for x in jax.tree.leaves(params) if is_concrete(x) and x.committed]
    if not shardings or not shardings[0].is_fully_addressable:
        return state
    whole = shardings[0]
    if isinstance(whole, NamedSharding):
        whole = NamedSharding(whole.mesh, PartitionSpec())

    def placed(x: Any) -> Any:
        return jax.device_put(x, whole) if is_concrete(x) and not x.committed else x

    return jax.tree.map(placed, state)


def without_batch_axes(params: Any, microbatch: Any) -> Any:
    """Parameters that are whole along the Explicit axes over which sequences are spread.

    Nothing can be spread over one axis twice, as a parameter would under a `vmap` over sequences.
    """
    batch_axes = explicit_batch_axes(microbatch)

    def whole(leaf: jax.Array) -> jax.Array:
        mesh, spec = jax.typeof(leaf).sharding.mesh, spec_of(leaf)
        if set(batch_axes).isdisjoint(names_in(spec)):
            return leaf
        kept = PartitionSpec(*without(spec, batch_axes))
        return jax.sharding.reshard(leaf, NamedSharding(mesh, kept))

    return jax.tree.map(whole, params)


def varying_like(tree: Any, like: Any) -> Any:
    """Arrays that `jax.shard_map` takes to differ between devices where any array in `like` does.

    The gradient with respect to an array that is the same on all devices is summed over them.
    """
    if mesh_with(AxisType.Manual, like) is None:
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


def _explicit(mesh: Any) -> AbstractMesh:
    """The mesh with Explicit axes."""
    types = (AxisType.Explicit,) * len(mesh.axis_names)
    return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)
