"""Sets JAX up for tests: eight virtual CPU devices, and compilation that is quick and remembered.

Hypothesis draws the same few examples every time, at the oldest and the newest dependencies fewer;
`make campaign` has it draw thousands of others.
"""

import importlib.metadata
import os
import pathlib

from hypothesis import settings

CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
XLA_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
jaxlib_version = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
if jaxlib_version < (0, 11):  # a later one aborts at this flag
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Threads for what eight devices run at once: with as few as devices, collectives that wait for one
# another in different orders take them all, and XLA aborts after 40 seconds.
os.environ.setdefault("NPROC", "64")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *XLA_FLAGS])

settings.register_profile("proma_jax", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("versions", derandomize=True, deadline=None, max_examples=8)
settings.register_profile("campaign", deadline=None, max_examples=4000)
settings.load_profile("proma_jax")
