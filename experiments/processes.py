"""Several processes, as on several hosts, that work on one run, each with devices of its own.

All run the same program, in step. The first alone grades, writes and prints; `by_first` gives the
others what came of it. Checkpoints are the exception: orbax has each process write what its devices
hold. So a run's folder, like a model's, must be one that all processes see.

What all of them refuse or raise ends all of them. Of a process that ends otherwise JAX tells the
others, which then end too: within 100 seconds if it was killed. What was saved stays.

With one process the functions below do nothing but their work.
"""

import os
import pickle
import sys
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments import files

Result = TypeVar("Result")


def join() -> None:
    """Joins the other processes, before JAX is asked for any device; all but the first fall silent.

    Raises:
        files.Failure: they are not found.
    """
    try:
        count, own = (
            int(os.environ[name]) if name in os.environ else None
            for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        )
        # Its handler of SIGTERM would take the place of ours (`preemption`).
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(num_processes=count, process_id=own)
    except (RuntimeError, ValueError) as error:
        raise files.Failure(
            f"--distributed: {error} JAX finds the processes of slurm, of Cloud TPU, of GKE and of "
            "Open MPI by itself; elsewhere the environment of each must have "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID, from 0 on."
        ) from error
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def is_first() -> bool:
    """Whether this process is the one that grades, writes and prints."""
    return jax.process_index() == 0


def by_first(work: Callable[[], Result]) -> Result:
    """What the first process's `work` gives or raises, which the others do not do."""
    if jax.process_count() == 1:
        return work()
    content = b""
    if is_first():
        try:
            content = pickle.dumps((work(), None))
        except Exception as error:
            content = pickle.dumps((None, error))
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(1 << size.bit_length(), np.uint8)  # of few sizes, for few programs
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    result, raised = pickle.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())
    if raised is not None:
        raise raised
    return result


def any_of(answer: bool) -> bool:
    """Whether the answer of any process is True."""
    return bool(multihost_utils.process_allgather(np.array(answer)).any())


def whole(array: jax.Array) -> np.ndarray:
    """The numbers of an array that is spread over the processes, or on this one."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
