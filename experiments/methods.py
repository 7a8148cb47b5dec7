"""The methods compared: what each takes as a microbatch's gradient, and its chain of transforms.

Everything else (rollouts, advantages, weights, microbatches, clipping, AdamW) is the same for all.
Clipping and AdamW come after the accumulation, where they see the whole optimizer step's gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from pydantic import Field
from pydantic.dataclasses import dataclass

import proma_jax as proma
from experiments import checked, meshes, sampling
from proma_jax import policy_gradient as pg

MethodName = Literal[
    "reinforce", "grpo", "grpo_matched", "proma_accumulation", "proma_intra", "proma_both"
]

FRACTIONS = ("accumulation_fraction", "intra_fraction")
"""What the variants remove, by the names that their states and metrics have."""


@dataclass(frozen=True, config=checked.CONFIG)
class MethodConfig:
    """Settings of the optimizer and of each method."""

    learning_rate: checked.Positive = 1e-4
    """Of AdamW, constant and the same for all methods."""
    max_gradient_norm: checked.Positive = 1.0
    """The whole step's gradient is clipped to this global norm."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """grpo: the likelihood ratio counts between 1 - clip and 1 + clip."""
    shrinkage: checked.Fraction = 1.0
    """proma: the fraction of the projection that is removed."""
    ridge: checked.NotNegative = 1e-2
    """Of accumulation: added to the Gram matrix of the unit-norm scores."""
    relative_bound: checked.NotNegative | None = 0.5
    """Of accumulation: the removed part is at most this many times as long as the microbatch's
    gradient; None leaves it unbounded, the paper's Algorithm 1."""
    skip_fraction: checked.Fraction = 0.5
    """Of accumulation: nothing is removed during this first fraction of the microbatches."""
    fused: bool = False
    """proma: whether it projects inside the backward pass (`proma.accumulated_gradient`), which
    takes the memory of plain policy gradient. The results are the same but for rounding."""
    rank: checked.Count = 2
    """Of intra: dimension of the subspaces of inputs and output gradients, which means something
    only beside the layers' widths and the tokens of a microbatch. At 2 a layer's gradient loses
    about a tenth of its length here, as the published runs did at 10."""


class Microbatch(NamedTuple):
    """b rollouts and their weights (b,) in the loss gradient."""

    rollouts: sampling.Rollouts
    coefficients: jax.Array


Step = Callable[
    [nnx.State, optax.OptState, Microbatch, nnx.State],
    tuple[nnx.State, optax.OptState, dict[str, Any]],
]


class Method(NamedTuple):
    """One method.

    Attributes:
        init: from parameters to the optimizer's state.
        step: one optimizer step: (params, opt_state, minibatch, frozen), with the microbatches
            stacked (k, b, ...) and the parameters that are not trained, to new parameters, a new
            state, and for each of `FRACTIONS` that the method removes its values (k,).
    """

    init: Callable[[nnx.State], optax.OptState]
    step: Step


def make_method(
    name: MethodName, config: MethodConfig, policy: sampling.Policy, microbatches: int
) -> Method:
    """Builds a method.

    The learning rate is part of the optimizer's state, and so is the length that grpo_matched
    rescales an update to (`aimed`): methods that differ in nothing else have the same `step`, which
    jit compiles once.

    Args:
        name: which one.
        config: its settings.
        policy: the policy.
        microbatches: how many make one optimizer step.
    """
    of_any_rate = dataclasses.replace(config, learning_rate=1.0)
    return Method(
        init=_make_method(name, config, policy, microbatches).init,
        step=_make_method(name, of_any_rate, policy, microbatches).step,
    )


def aimed(opt_state: optax.OptState, length: float) -> optax.OptState:
    """The state of grpo_matched's optimizer, from which its next update is `length` long."""
    before = optax.tree.get(opt_state, "update_length")
    placed = jax.device_put(np.asarray(length, before.dtype), before.sharding)
    return optax.tree.set(opt_state, update_length=placed)


@functools.lru_cache
def _make_method(
    name: MethodName, config: MethodConfig, policy: sampling.Policy, microbatches: int
) -> Method:
    def loss_gradient(loss_fn):
        def gradient(params, microbatch, frozen):
            def loss(params):
                whole = nnx.merge_state(params, frozen)
                logprobs = sampling.response_logprobs(policy, whole, microbatch.rollouts)
                return loss_fn(logprobs, microbatch)

            return jax.grad(loss)(params), {}

        return gradient

    def reinforce_loss(logprobs, microbatch):
        return pg.reinforce_loss(logprobs, microbatch.coefficients, microbatch.rollouts.mask)

    def clipped_loss(logprobs, microbatch):
        rollouts, coefficients = microbatch
        return pg.ppo_clip_loss(
            logprobs,
            rollouts.logprobs,
            coefficients,
            rollouts.mask,
            clip_low=config.clip,
            clip_high=config.clip,
        )

    def sequence_logprob(frozen):
        def logprob(params, rollout):
            whole = nnx.merge_state(params, frozen)
            return jnp.sum(sampling.response_logprobs(policy, whole, rollout))

        return logprob

    def score_gradient(params, microbatch, frozen):
        scores_fn = proma.sequence_scores(
            sequence_logprob(frozen), **meshes.named(policy.mesh, params)
        )
        _, scores = scores_fn(params, microbatch.rollouts)
        return proma.weighted_sum(scores, microbatch.coefficients), {"scores": scores}

    def rescale(update_length):
        return optax.chain(optax.normalize_by_update_norm(eps=0.0), optax.scale(update_length))

    inner = optax.chain(
        optax.snapshot("gradient_norm", optax.tree.norm),
        optax.clip_by_global_norm(config.max_gradient_norm),
        optax.adamw(1.0),
        optax.inject_hyperparams(optax.scale)(step_size=config.learning_rate),
        optax.inject_hyperparams(rescale)(update_length=1.0)
        if name == "grpo_matched"
        else optax.identity(),
        optax.snapshot("update_norm", optax.tree.norm),
    )
    accumulation = proma.Accumulation(
        solver="ridge",
        ridge=config.ridge,
        shrinkage=config.shrinkage,
        relative_bound=config.relative_bound,
        skip_fraction=config.skip_fraction,
    )
    intra = proma.Intra(rank=config.rank, shrinkage=config.shrinkage)
    if config.fused and name in ("proma_accumulation", "proma_intra", "proma_both"):

        def fused(params, step, minibatch, frozen):
            gradient_fn = proma.accumulated_gradient(
                sequence_logprob(frozen),
                accumulation=None if name == "proma_intra" else accumulation,
                intra=None if name == "proma_accumulation" else intra,
                **meshes.named(policy.mesh, params),
            )
            grads, metrics = gradient_fn(params, *minibatch, step)
            return grads, step + 1, {name: getattr(metrics, name) for name in FRACTIONS}

        return _method(lambda params: jnp.int32(0), fused, inner, policy.mesh)
    accumulated = proma.accumulate(
        optax.identity(), microbatches, **dataclasses.asdict(accumulation)
    )
    projected = proma.project_intra(**dataclasses.asdict(intra))
    unchanged = optax.with_extra_args_support(optax.identity())
    gradient, projection = {
        "reinforce": (loss_gradient(reinforce_loss), unchanged),
        "grpo": (loss_gradient(clipped_loss), unchanged),
        "grpo_matched": (loss_gradient(clipped_loss), unchanged),
        "proma_accumulation": (score_gradient, accumulated),
        "proma_intra": (score_gradient, projected),
        "proma_both": (score_gradient, optax.chain(projected, accumulated)),
    }[name]
    summed = _one_by_one(gradient, projection, policy.mesh)
    return _method(projection.init, summed, inner, policy.mesh)


class OptState(NamedTuple):
    """The states of a method's projection and of the optimizer that follows it."""

    projection: Any
    inner: optax.OptState


Gradient = Callable[[nnx.State, Any, Microbatch, nnx.State], tuple[nnx.State, Any, dict[str, Any]]]
"""From (params, projection_state, minibatch, frozen) to the gradient of an optimizer step, the
projection's new state, and for each of `FRACTIONS` its values (k,)."""


def _method(
    init: Callable[[nnx.State], Any],
    gradient: Gradient,
    inner: optax.GradientTransformation,
    mesh: jax.sharding.Mesh | None,
) -> Method:
    """Hands the gradient of all microbatches to the optimizer.

    Args:
        init: from parameters to the projection's state.
        gradient: of all microbatches.
        inner: the optimizer.
        mesh: over which parameters and state stay spread.
    """

    def step(params, opt_state, minibatch, frozen):
        grads, projection, removed = gradient(params, opt_state.projection, minibatch, frozen)
        updates, state = inner.update(grads, opt_state.inner, params)
        after = optax.apply_updates(params, updates), OptState(projection, state)
        return *meshes.kept_spread(mesh, after), removed

    return Method(lambda params: OptState(init(params), inner.init(params)), step)


def _one_by_one(
    gradient: Callable[[nnx.State, Microbatch, nnx.State], tuple[nnx.State, dict[str, Any]]],
    projection: optax.GradientTransformationExtraArgs,
    mesh: jax.sharding.Mesh | None,
) -> Gradient:
    """Sums what a projection makes of the gradient of each microbatch.

    The optimizer is not called in this loop, which would carry its state through every microbatch.

    Args:
        gradient: (params, microbatch, frozen) to its loss gradient and the projection's extra
            arguments.
        projection: of a microbatch's gradient. One that accumulates by itself gives zeros until the
            last microbatch.
        mesh: over which sum and state stay spread.
    """

    def summed(params, state, minibatch, frozen):
        def add(carry, microbatch):
            total, state = carry
            grads, extra = gradient(params, microbatch, frozen)
            grads, state = projection.update(grads, state, params, **extra)
            removed = {name: optax.tree.get(state, name, 0.0) for name in FRACTIONS}
            total = optax.tree.add(total, grads)
            return meshes.kept_spread(mesh, (total, state)), removed

        zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
        (total, state), removed = jax.lax.scan(add, (zeros, state), minibatch)
        return optax.tree.cast_like(total, params), state, removed

    return summed
