"""Several devices for one run: `--mesh data=4,fsdp=2`, and how arrays are spread over them.

Sequences are spread over both axes. Parameters and the optimizer's state are spread over "fsdp",
each array along the largest of its dimensions that "fsdp" divides, the last of equal ones. An array
without such a dimension, or with only one dimension, is whole on every device, as is all else.

A mesh changes no result but for rounding. The functions below take None for no mesh, and then leave
arrays where they are.
"""

import contextlib
import math
import pathlib
import re
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pydantic.dataclasses import dataclass

from experiments import checked, files, processes

AXES = ("data", "fsdp")
Tree = TypeVar("Tree")


@dataclass(frozen=True, config=checked.CONFIG)
class MeshConfig:
    """The devices that share the work."""

    mesh: str | None = None
    """How many devices share the work: data=N shares the sequences, fsdp=N parameters and the
    optimizer's state too, data=N,fsdp=M is N such groups of M. None: one device."""

    def __post_init__(self):
        axes = [re.fullmatch(r"(data|fsdp)=[1-9]\d*", item) for item in self._items]
        if not all(axes) or len({axis and axis[1] for axis in axes}) < len(axes):
            raise ValueError(
                f"mesh={self.mesh} must be 'data=N', 'fsdp=N' or 'data=N,fsdp=M', with numbers of "
                "devices"
            )

    @property
    def _items(self) -> list[str]:
        return [] if self.mesh is None else self.mesh.split(",")

    @property
    def shape(self) -> tuple[int, ...]:
        """Devices along each of the axes."""
        sizes = dict(item.split("=") for item in self._items)
        return tuple(int(sizes.get(axis, 1)) for axis in AXES)

    @property
    def size(self) -> int:
        """All devices."""
        return math.prod(self.shape)

    def made(self) -> Mesh | None:
        """The mesh.

        Raises:
            files.Failure: there are too few devices.
        """
        if self.mesh is None:
            return None
        devices = jax.devices()
        if self.size > len(devices):
            raise files.Failure(
                f"--mesh {self.mesh} needs {self.size} devices, but JAX finds {len(devices)} "
                f"({devices[0].device_kind}): choose a smaller mesh or, to try it on a CPU, set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={self.size} and NPROC=64."
            )
        if self.size < len(devices) and jax.process_count() > 1:
            raise files.Failure(
                f"--mesh {self.mesh} must have all {len(devices)} devices of the "
                f"{jax.process_count()} processes."
            )
        types = (AxisType.Auto,) * len(AXES)
        return jax.make_mesh(self.shape, AXES, types, devices=devices[: self.size])


@dataclass(frozen=True, config=checked.CONFIG)
class DevicesConfig(MeshConfig):
    """The devices that share the work, of one process or of several."""

    distributed: bool = False
    """Whether this is one of several processes, as on several hosts, that were all given this
    command; the mesh is then over the devices of all of them. JAX finds them by itself on slurm,
    Cloud TPU and GKE and under Open MPI, elsewhere by JAX_COORDINATOR_ADDRESS=HOST:PORT,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment."""

    def __post_init__(self):
        super().__post_init__()
        if self.distributed and self.mesh is None:
            raise ValueError(
                f"distributed={self.distributed} needs a mesh over the devices of all processes, "
                "but mesh=None"
            )

    def check_start(self, model: pathlib.Path | None) -> None:
        """Raises a ValueError if training cannot begin with `model`, None for a warm start."""
        if self.distributed and model is None:
            raise ValueError(
                f"distributed={self.distributed} needs a pretrained model, but {model=}: a small "
                "decoder's warm start trains on one device"
            )

    def made(self) -> Mesh | None:
        """The mesh; joins the other processes first, if there are any."""
        if self.distributed:
            processes.join()
        return super().made()


def described(mesh: Mesh | None) -> str:
    """The devices in words."""
    device = (jax.devices() if mesh is None else list(mesh.devices.flat))[0]
    if mesh is None:
        return f"1 {device.device_kind}"
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"{mesh.size} {device.device_kind}, {axes}"


def used(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Within it the library finds the mesh's axes by name."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def spec(mesh: Mesh, shape: tuple[int, ...]) -> P:
    """How a parameter, or an array of the optimizer's state, is spread."""
    devices = mesh.shape["fsdp"]
    fitting = [(size, axis) for axis, size in enumerate(shape) if size % devices == 0]
    if devices == 1 or len(shape) < 2 or not fitting:
        return P()
    _, axis = max(fitting)
    return P(*[None] * axis, "fsdp")


def sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """How a parameter, or an array of the optimizer's state, is spread."""
    return NamedSharding(mesh, spec(mesh, shape))


def named(mesh: Mesh | None, params: Any) -> dict[str, Any]:
    """What `sequence_scores` and `accumulated_gradient` are told of the mesh."""
    if mesh is None:
        return {}
    specs = jax.tree.map(lambda x: spec(mesh, x.shape), params)
    return {"spmd_axis_name": AXES, "param_specs": specs}


def spread(mesh: Mesh | None, state: Tree) -> Tree:
    """Parameters or the optimizer's state, spread over the mesh."""
    if mesh is None:
        return state
    return jax.tree.map(lambda x: jax.device_put(x, sharding(mesh, x.shape)), state)


def kept_spread(mesh: Mesh | None, state: Tree) -> Tree:
    """As `spread`, inside of `jax.jit`."""
    if mesh is None:
        return state
    constrain = jax.lax.with_sharding_constraint
    return jax.tree.map(lambda x: constrain(x, sharding(mesh, x.shape)), state)


def whole(mesh: Mesh | None, tree: Tree) -> Tree:
    """Arrays that every device has whole."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, P()))


def rows(mesh: Mesh | None, tree: Tree, axis: int = 0) -> Tree:
    """Arrays with an axis of sequences that the devices share."""
    if mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, P(*[None] * axis, AXES)))


def bytes_held(tree: Any) -> int:
    """Bytes that each device holds of arrays, or would of their shapes, which have shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def multiple(mesh: Mesh | None, count: int) -> int:
    """The least number of sequences from `count` on that the devices can share."""
    return count if mesh is None else -(-count // mesh.size) * mesh.size


def share(mesh: Mesh | None, count: int) -> int:
    """How many of so many sequences each device has."""
    return count if mesh is None else count // mesh.size


def together(mesh: Mesh | None, count: int, copies: int) -> int:
    """Of `copies` sequences side by side among `count`, how many are always on one device."""
    return math.gcd(share(mesh, count), copies)


def kept_rows(mesh: Mesh | None, tree: Tree, axis: int = 0) -> Tree:
    """As `rows`, inside of `jax.jit`."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, P(*[None] * axis, AXES))
    return jax.lax.with_sharding_constraint(tree, sharding)
