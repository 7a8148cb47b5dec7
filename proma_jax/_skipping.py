"""Which microbatches `accumulate` skips: those that the user's function or their scores rule out.

The function is one that `optax.MultiSteps` takes, such as `optax.skip_not_finite`. It sees updates
only, so scores with NaN or infinity are looked for here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from proma_jax.arithmetic import AxisName


def judge(
    should_skip_update_fn: optax.ShouldSkipUpdateFunction | None,
    updates: Any,
    scores: Any,
    step: jax.Array,
    params: Any,
    axis_name: AxisName = None,
) -> tuple[jax.Array, Any]:
    """Whether to skip a microbatch, and what the user's function says beside that."""
    if should_skip_update_fn is None:
        return jnp.asarray(False), ()
    skip, skip_state = should_skip_update_fn(updates, step, params)
    finite = jnp.asarray([jnp.all(jnp.isfinite(array)) for array in jax.tree.leaves(scores)])
    skip = skip | ~jnp.all(finite)
    if axis_name is not None:
        skip = jax.lax.pmax(skip.astype(jnp.int32), axis_name) > 0
    return skip, skip_state
