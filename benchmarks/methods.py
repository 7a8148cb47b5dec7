"""The methods measured: each turns parameters and the k microbatches into one gradient.

Names, with r a rank:

plain_sum, plain_per_sequence, plain_batched, plain_fused
    Plain policy gradient: jax.grad of the weighted sum of log-probabilities, vmapped over the
    sequences; the weighted sum of per-sequence gradients; jax.grad of one forward pass of the
    whole microbatch; `proma.accumulated_gradient` without any projection. They give the same
    gradient, and the fastest is what a ratio refers to.
grpo, grpo_per_sequence
    The PPO-clipped loss, taken in the first two ways.
accumulation, intra_r, both_r
    PROMA by the optax transformations, with scores from `proma.sequence_scores`.
accumulation_dense
    The same with scores from vmap(grad), as users can make them by hand.
accumulation_fused, intra_r_fused, both_r_fused
    PROMA by `proma.accumulated_gradient`.
naive_accumulation, naive_intra_r
    PROMA as hooks on the linear layers would do it; see `benchmarks.naive`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import proma_jax as proma
from benchmarks import naive
from benchmarks.cases import Batch, Case
from benchmarks.decoder import Params
from proma_jax import policy_gradient as pg

Step = Callable[[Params, Batch], Params]
Gradient = Callable[[Params, Batch], Params]
Scores = Callable[[Params, Batch], tuple[Params, Any]]

PLAIN = ("plain_sum", "plain_per_sequence", "plain_batched", "plain_fused")
METHODS = (
    *PLAIN,
    "grpo",
    "grpo_per_sequence",
    "accumulation",
    "accumulation_dense",
    "accumulation_fused",
    "intra_10",
    "intra_100",
    "intra_10_fused",
    "intra_100_fused",
    "both_10",
    "both_10_fused",
    "naive_accumulation",
    "naive_intra_10",
    "naive_intra_100",
)


def make_step(name: str, case: Case) -> Step:
    """The method's gradient of a whole optimizer step, to be jitted.

    Raises:
        ValueError: there is no method of that name.
    """

    def rank_of(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"method {name!r}: {text!r} must be a rank, at least 1")
        return int(text)

    match name.split("_"):
        case ["plain", "sum"]:
            return _summed(_sum_gradient(case, _weighted_logprob(case)))
        case ["plain", "per", "sequence"]:
            return _summed(_per_sequence_gradient(case, _weighted_logprob(case)))
        case ["plain", "batched"]:
            return _summed(_batched_gradient(case))
        case ["plain", "fused"]:
            return _fused(case, None, None)
        case ["grpo"]:
            return _summed(_sum_gradient(case, _clipped_loss(case)))
        case ["grpo", "per", "sequence"]:
            return _summed(_per_sequence_gradient(case, _clipped_loss(case)))
        case ["accumulation"]:
            return _accumulated(_accumulate(case), _sequence_scores(case))
        case ["accumulation", "dense"]:
            return _accumulated(_accumulate(case), _dense_scores(case))
        case ["accumulation", "fused"]:
            return _fused(case, proma.Accumulation(), None)
        case ["intra", rank]:
            return _intra(case, rank_of(rank))
        case ["intra", rank, "fused"]:
            return _fused(case, None, proma.Intra(rank=rank_of(rank)))
        case ["both", rank]:
            tx = optax.chain(proma.project_intra(rank_of(rank)), _accumulate(case))
            return _accumulated(tx, _sequence_scores(case))
        case ["both", rank, "fused"]:
            return _fused(case, proma.Accumulation(), proma.Intra(rank=rank_of(rank)))
        case ["naive", "accumulation"]:
            return _naive_accumulation(case)
        case ["naive", "intra", rank]:
            return _naive_intra(case, rank_of(rank))
    raise ValueError(f"no method {name!r}; there are {', '.join(METHODS)}, also with other ranks")


def _zeros(params):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)


def _plus(total, gradient):
    return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradient)


def _summed(gradient: Gradient) -> Step:
    """Plain accumulation, in float32."""

    def step(params, batch):
        def add(total, microbatch):
            return _plus(total, gradient(params, microbatch)), None

        return jax.lax.scan(add, _zeros(params), batch)[0]

    return step


def _weighted_logprob(case):
    def loss(params, sequence):
        return sequence.coefficients * case.logprob(params, sequence.tokens)

    return loss


def _clipped_loss(case):
    def loss(params, sequence):
        logprobs = case.token_logprobs(params, sequence.tokens)
        mask = jnp.ones(logprobs.shape, bool)
        return pg.ppo_clip_loss(logprobs, sequence.old_logprobs, sequence.coefficients, mask)

    return loss


def _sum_gradient(case, sequence_loss) -> Gradient:
    def loss(params, microbatch):
        return jnp.sum(jax.vmap(sequence_loss, (None, 0))(params, microbatch))

    return jax.grad(loss)


def _per_sequence_gradient(case, sequence_loss) -> Gradient:
    """The sum of per-sequence gradients; the loss is already weighted."""

    def gradient(params, microbatch):
        grads = jax.vmap(jax.grad(sequence_loss), (None, 0))(params, microbatch)
        return jax.tree.map(lambda g: jnp.sum(g, axis=0, dtype=jnp.float32), grads)

    return gradient


def _batched_gradient(case) -> Gradient:
    def loss(params, microbatch):
        logprobs = case.token_logprobs(params, microbatch.tokens)
        return jnp.sum(microbatch.coefficients * jnp.sum(logprobs, axis=-1))

    return jax.grad(loss)


def _sequence_scores(case) -> Scores:
    def grads_and_scores(params, microbatch):
        scores_fn = proma.sequence_scores(case.logprob, **case.on_mesh)
        _, scores = scores_fn(params, microbatch.tokens)
        return proma.weighted_sum(scores, microbatch.coefficients), scores

    return grads_and_scores


def _dense_scores(case) -> Scores:
    """As `_sequence_scores`: projected layer by layer, the embedding table not at all."""

    def per_layer(scores):
        return proma.DenseScores(scores, num_layer_axes=int(case.config.scanned))

    def grads_and_scores(params, microbatch):
        scores = jax.vmap(jax.grad(case.logprob), (None, 0))(params, microbatch.tokens)
        grads = proma.weighted_sum(scores, microbatch.coefficients)
        layers = jax.tree.map(per_layer, scores["layers"])
        return grads, {"embedding": None, "layers": layers, "norm": scores["norm"]}

    return grads_and_scores


def _accumulate(case):
    return proma.accumulate(optax.identity(), every_k_schedule=case.microbatches)


def _accumulated(tx: optax.GradientTransformationExtraArgs, scores_fn: Scores) -> Step:
    """What `tx`, which accumulates by itself, emits at the last microbatch."""

    def step(params, batch):
        def update(carry, microbatch):
            state, _ = carry
            grads, scores = scores_fn(params, microbatch)
            updates, state = tx.update(grads, state, params, scores=scores)
            return (state, updates), None

        start = (tx.init(params), jax.tree.map(jnp.zeros_like, params))
        (_, updates), _ = jax.lax.scan(update, start, batch)
        return updates

    return step


def _intra(case, rank) -> Step:
    tx, scores_fn = proma.project_intra(rank), _sequence_scores(case)

    def step(params, batch):
        def add(carry, microbatch):
            state, total = carry
            grads, scores = scores_fn(params, microbatch)
            updates, state = tx.update(grads, state, params, scores=scores)
            return (state, _plus(total, updates)), None

        (_, total), _ = jax.lax.scan(add, (tx.init(params), _zeros(params)), batch)
        return total

    return step


def _fused(case, accumulation, intra) -> Step:
    gradient_fn = proma.accumulated_gradient(
        case.logprob, accumulation=accumulation, intra=intra, **case.on_mesh
    )

    def step(params, batch):
        return gradient_fn(params, batch.tokens, batch.coefficients, step=0)[0]

    return step


def _naive_accumulation(case) -> Step:
    scores_fn = _sequence_scores(case)

    def step(params, batch):
        def add(total, microbatch):
            grads, scores = scores_fn(params, microbatch)
            return naive.map_kernels(naive.accumulated, jnp.add, scores, total, grads), None

        return jax.lax.scan(add, _zeros(params), batch)[0]

    return step


def _naive_intra(case, rank) -> Step:
    scores_fn, key = _sequence_scores(case), jax.random.key(0)

    def project(gradient, inputs, output_grads):
        return naive.projected(gradient, inputs, output_grads, rank, key)

    def gradient(params, microbatch):
        grads, scores = scores_fn(params, microbatch)
        return naive.map_kernels(project, lambda g: g, scores, grads)

    return _summed(gradient)
