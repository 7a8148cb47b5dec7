"""A user's program with every type written out: `make typecheck` has mypy --strict check it.

It uses every public function as the README does, and `tests/test_typed_user.py` runs it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import proma_jax as proma
from proma_jax import policy_gradient as pg

Params = dict[str, jax.Array]

K, B, TOKENS, VOCABULARY, WIDTH = 2, 4, 6, 7, 5


def logprob_fn(params: Params, tokens: jax.Array) -> jax.Array:
    """The log-probability of one sequence."""
    logits = jnp.tanh(params["embed"][tokens[:-1]]) @ params["head"]
    return pg.token_logprobs(logits, tokens[1:], jnp.ones_like(tokens[1:])).sum()


def chain(schedule: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformationExtraArgs:
    """Both variants, with their options."""
    accumulate = proma.accumulate(
        optax.adamw(1e-3),
        every_k_schedule=K,
        solver="qr",
        ridge=jnp.float32(1e-2),
        shrinkage=schedule,
        relative_bound=0.5,
        skip_fraction=0.5,
        accumulator_dtype=jnp.float32,
        mask={"embed": False, "head": True},
        should_skip_update_fn=optax.skip_not_finite,
    )
    return optax.chain(proma.project_intra(rank=2, key=jax.random.key(0)), accumulate)


def by_transformations(params: Params, batch: jax.Array, coefficients: jax.Array) -> Params:
    """An optimizer step by the two transformations, microbatch by microbatch."""
    tx = chain(lambda step: 1 / (1 + step))
    state = tx.init(params)
    scores_fn = proma.sequence_scores(logprob_fn)
    for tokens, weights in zip(batch, coefficients, strict=True):
        _, scores = scores_fn(params, tokens)
        grads: Params = proma.weighted_sum(scores, weights)
        updates, state = tx.update(grads, state, params, scores=scores)
        params = jax.tree.map(jnp.add, params, updates)
    intra: proma.ProjectIntraState = state[0]
    accumulated: proma.AccumulateState = state[1]
    assert bool(proma.has_updated(state))
    proma.check_restorable(state, tx.init(params))
    print(f"removed {intra.intra_fraction:.2f} and {accumulated.accumulation_fraction:.2f}")
    return params


def by_the_fused_form(params: Params, batch: jax.Array, coefficients: jax.Array) -> Params:
    """The gradient of an optimizer step in one backward pass."""
    gradient_fn = proma.accumulated_gradient(
        logprob_fn,
        accumulation=proma.Accumulation(solver="ridge", shrinkage=optax.constant_schedule(1.0)),
        intra=proma.Intra(rank=2),
    )
    metrics: proma.GradientMetrics
    grads: Params
    grads, metrics = gradient_fn(params, batch, coefficients, step=0)
    assert metrics.logprobs.shape == (K, B)
    return grads


def objectives(params: Params, batch: jax.Array) -> jax.Array:
    """Advantages, coefficients and a loss from `policy_gradient`."""
    tokens = batch.reshape(K * B, -1)
    mask = jnp.ones_like(tokens[:, 1:])
    rewards = jnp.mean(tokens == 3, axis=1)
    advantages = pg.group_relative_advantages(rewards.reshape(K, B)).reshape(-1)
    coefficients = pg.token_mean_coefficients(advantages, total_tokens=mask.sum())
    logits = jnp.tanh(params["embed"][tokens[:, :-1]]) @ params["head"]
    logprobs = pg.token_logprobs(logits, tokens[:, 1:], mask)
    loss = pg.ppo_clip_loss(logprobs, logprobs, coefficients, mask, clip_high=0.28)
    return loss - 0.01 * pg.entropy(logits, mask) + pg.kl_k3(logprobs, logprobs, mask)


def main() -> tuple[Params, Params, jax.Array]:
    """Takes a step in both ways."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "embed": jax.random.normal(keys[0], (VOCABULARY, WIDTH)),
        "head": jax.random.normal(keys[1], (WIDTH, VOCABULARY)),
    }
    batch = jax.random.randint(keys[2], (K, B, TOKENS + 1), 0, VOCABULARY)
    coefficients = jax.random.normal(keys[3], (K, B))
    description: str = proma.describe_scores(logprob_fn, params, batch[0])
    errors: dict[str, float] = proma.check_scores(logprob_fn, params, batch[0])
    print(description, max(errors.values()))
    updated = by_transformations(params, batch, coefficients)
    return updated, by_the_fused_form(params, batch, coefficients), objectives(params, batch)
