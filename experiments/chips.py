"""TPU chips that need not be there: libtpu compiles for them on any machine.

This module alone names `jax.experimental.topologies`.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from experiments import meshes

_WITHOUT_CHIPS = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""For libtpu, which else asks the network what machine it is on, and allows one process only."""


def described(topology: str) -> Any:
    """The chips of a topology such as v5p:2x2x1; `devices` has them.

    Raises:
        Exception: libtpu is missing, or knows no such chips; of several types.
    """
    os.environ.update(_WITHOUT_CHIPS)
    return topologies.get_topology_desc(topology, platform="tpu")


def mesh(topology: Any, shape: Sequence[int]) -> Mesh:
    """A mesh of all chips of a topology, or of its first one, with the axes data and fsdp."""
    if math.prod(shape) == 1:
        return of_one(topology.devices)
    return topologies.make_mesh(topology, shape, meshes.AXES)


def of_one(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of the first device."""
    return Mesh(np.array(devices[:1]).reshape(1, 1), meshes.AXES)
