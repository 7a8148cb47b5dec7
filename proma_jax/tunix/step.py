"""One microbatch of a Tunix learner by PROMA: scores, gradient, update. A pure function of arrays.

Between microbatches everything is kept in the state of `optax.MultiSteps`, in which Tunix keeps its
own accumulation, so that its checkpoints hold PROMA's, and either goes on from the other's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tunix.rl import common

from proma_jax._states import state_version
from proma_jax.accumulation import AccumulateState, accumulate
from proma_jax.capture import sequence_scores
from proma_jax.intra import project_intra
from proma_jax.scores.match import weighted_sum
from proma_jax.settings import Accumulation, Intra
from proma_jax.tunix import on_policy


class Variant(NamedTuple):
    """What becomes of a microbatch's gradient.

    Attributes:
      tunix_own: the MultiSteps that Tunix accumulates with.
      inner: the optimizer that it wraps.
      k: the microbatches of an optimizer step.
      accumulation: settings, or None.
      intra: settings, or None.
    """

    tunix_own: optax.MultiSteps
    inner: optax.GradientTransformation
    k: int
    accumulation: Accumulation | None
    intra: Intra | None

    def update(
        self, grads: Any, state: optax.MultiStepsState, params: Any, scores: Any
    ) -> tuple[Any, optax.MultiStepsState, dict[str, jax.Array]]:
        """The updates, the new state, and the fractions that were removed."""
        fractions = {}
        if self.intra is not None:
            link = project_intra(**vars(self.intra))
            before = link.init(params)._replace(step=state.gradient_step * self.k + state.mini_step)
            grads, after = link.update(grads, before, params, scores=scores)
            fractions["proma/intra_fraction"] = after.intra_fraction
        if self.accumulation is None:
            updates, state = self.tunix_own.update(grads, state, params)
            return updates, state, fractions
        wrapped = accumulate(self.inner, self.k, average=True, **vars(self.accumulation))
        updates, found = wrapped.update(grads, _ours(state), params, scores=scores)
        fractions["proma/accumulation_fraction"] = found.accumulation_fraction
        return updates, _multi_steps(found), fractions


def _ours(state: optax.MultiStepsState) -> AccumulateState:
    return AccumulateState(
        mini_step=state.mini_step,
        gradient_step=state.gradient_step,
        inner_opt_state=state.inner_opt_state,
        acc_grads=state.acc_grads,
        accumulation_fraction=jnp.zeros((), jnp.float32),
        accepted=state.mini_step,
        skip_state=state.skip_state,
        version=state_version(),
    )


def _multi_steps(state: AccumulateState) -> optax.MultiStepsState:
    return optax.MultiStepsState(
        state.mini_step,
        state.gradient_step,
        state.inner_opt_state,
        state.acc_grads,
        state.skip_state,
    )


class _Replay(nnx.Module):
    """A model that gives logits which are there already, (b, T, V), for completions of T tokens."""

    def __init__(self, logits: jax.Array):
        self.logits = nnx.Variable(jnp.pad(logits, ((0, 0), (0, 1), (0, 0))))

    def __call__(self, tokens: jax.Array, **kwargs: Any) -> tuple[jax.Array, None]:
        return self.logits[...], None


def token_scores(
    model: nnx.Module, wrt: Any, example: Any, *, pad_id: int, eos_id: int, temperature: float
) -> tuple[jax.Array, Any]:
    """The logits of the completions, (b, T, V), and the sequences' scores.

    A sequence's log-probability is the sum of Tunix's own over the tokens of its completion mask.
    """
    graphdef, *states = nnx.split(model, wrt, ...)
    params, rest = map(nnx.as_pure, states)

    def logprob_fn(params: Any, row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        prompt, completion, mask = row
        logprobs, logits = common.compute_per_token_logps(
            graphdef,
            nnx.merge_state(params, rest),
            prompt_tokens=prompt[None],
            completion_tokens=completion[None],
            pad_id=pad_id,
            eos_id=eos_id,
            stop_gradient=False,
            return_logits=True,
            temperature=temperature,
        )
        return jnp.sum(logprobs[0] * mask), logits[0]

    rows = example.prompt_ids, example.completion_ids, example.completion_mask
    scores_fn = sequence_scores(logprob_fn, has_aux=True)
    (_, logits), scores = scores_fn(params, rows)
    return logits, scores


def train_step_fn(variant: Variant, learner: Any) -> Callable[..., tuple[Any, dict[str, Any], Any]]:
    """Makes a train step of a learner with the arguments and results of Tunix's own."""

    def train_step(
        model: nnx.Module, optimizer: nnx.Optimizer, inputs: Any
    ) -> tuple[jax.Array, dict[str, Any], jax.Array]:
        cluster, config = learner.rl_cluster, learner.algo_config
        loss_fn, wrt = cluster.actor_trainer.loss_fn, optimizer.wrt
        arguments = cluster.actor_trainer.gen_model_input_fn(inputs)
        example = arguments["train_example"]
        ids = {"pad_id": cluster.rollout.pad_id(), "eos_id": cluster.rollout.eos_id()}
        logits, scores = token_scores(model, wrt, example, temperature=config.temperature, **ids)
        if on_policy.is_weighted_sum(loss_fn, config, example):
            loss, aux = loss_fn(_Replay(logits * (config.temperature or 1.0)), **arguments)
            grads = weighted_sum(scores, on_policy.coefficients(config, example))
        else:
            grad_fn = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, wrt), has_aux=True)
            (loss, aux), grads = grad_fn(model, **arguments)
            grads = nnx.as_pure(grads)
        params = nnx.as_pure(nnx.state(model, wrt))
        state = nnx.as_pure(optimizer.opt_state)
        updates, state, fractions = variant.update(grads, state, params, scores)
        nnx.update(model, optax.apply_updates(params, updates))
        nnx.update(optimizer.opt_state, nnx.state(state))
        optimizer.step[...] += 1
        return loss, aux | fractions, optax.global_norm(grads)

    return train_step
