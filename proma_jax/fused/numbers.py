"""The numbers of one microbatch: schedules at its step, and where its bases start."""

import jax
import jax.numpy as jnp

from proma_jax.fused.plan import Plan
from proma_jax.project import core
from proma_jax.project.dominant import Starts, random_starts
from proma_jax.settings import at_step, prng_key

Array = jax.Array


def numbers_of(plan: Plan, m: Array, k: int, step: Array, batch_size: int) -> core.Microbatch:
    """Those of microbatch m of k, of `batch_size` sequences, in an optimizer step."""
    numbers = core.Microbatch()
    if plan.accumulation:
        removes = plan.accumulation.removes(m, k, step)
        numbers = numbers._replace(removes=removes, accumulation=plan.accumulation.at_step(step))
    if plan.intra:
        chosen = [
            (plan.paths[leaf], batch_size * part.num_tokens, *part.matrix_shape)
            for leaf, parts in plan.program.parts.items()
            for _, part in parts
            if plan.leaves[leaf].intra
        ]
        plan.intra.warn_of_whole_gradients(chosen)
        taken = step * k + m
        numbers = numbers._replace(
            intra=jnp.asarray(at_step(plan.intra.shrinkage, taken)),
            starts=_starts(plan, taken, batch_size),
        )
    return numbers


def _starts(plan: Plan, taken: Array, batch_size: int) -> Starts:
    """Those of a microbatch's bases."""
    assert plan.intra is not None
    slots = [slot for of_node in plan.nodes.values() for slot in of_node]
    found = [(slot.leaf, slot.assembly) for slot in slots]
    found += [(leaf, part) for leaf in plan.late for _, part in plan.program.parts[leaf]]
    shapes = [
        shape
        for leaf, part in found
        if plan.leaves[leaf].intra
        for shape in plan.intra.shapes_in(batch_size * part.num_tokens, *part.matrix_shape)
    ]
    key = jax.random.fold_in(prng_key(plan.intra.key), taken)
    return random_starts(key, shapes)
