"""A Flax Linen model with its TrainState, updated by hand. About 25 seconds on 2 CPU cores.

    python examples/linen_train_state.py        # needs flax

A causal transformer is rewarded for tokens that repeat. `TrainState.apply_gradients` has no place
for scores (it raises an error that says so), so the update and `replace` are written out.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import proma_jax as proma
from proma_jax import policy_gradient as pg

VOCABULARY, TOKENS, WIDTH = 16, 8, 32
BATCH, MICROBATCHES = 64, 4


class Policy(nn.Module):
    """Tokens (..., T) to the logits (..., T, vocabulary) of their next tokens."""

    @nn.compact
    def __call__(self, tokens):
        x, mask = nn.Embed(VOCABULARY, WIDTH)(tokens), nn.make_causal_mask(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(VOCABULARY)(x)


@jax.jit
def train_step(state, microbatch):
    """One microbatch; every fourth moves the parameters."""

    def logprob_fn(params, sequence):
        tokens = sequence["tokens"]
        logits = state.apply_fn({"params": params}, tokens[:-1])
        return pg.token_logprobs(logits, tokens[1:], jnp.ones_like(tokens[1:])).sum()

    _, scores = proma.sequence_scores(logprob_fn)(state.params, microbatch)
    grads = proma.weighted_sum(scores, microbatch["coefficients"])
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, scores=scores)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


@jax.jit
def rollout(state, key):
    """Samples a batch of sequences, and rewards each token that equals the one before it."""

    def sample(t, tokens):
        logits = state.apply_fn({"params": state.params}, tokens)[:, t]
        return tokens.at[:, t + 1].set(jax.random.categorical(jax.random.fold_in(key, t), logits))

    first = jax.random.randint(key, (BATCH,), 0, VOCABULARY)
    tokens = jnp.zeros((BATCH, TOKENS + 1), jnp.int32).at[:, 0].set(first)
    tokens = jax.lax.fori_loop(0, TOKENS, sample, tokens)
    rewards = jnp.mean(tokens[:, 1:] == tokens[:, :-1], axis=1)
    coefficients = pg.token_mean_coefficients(rewards - rewards.mean(), BATCH * TOKENS)
    return {"tokens": tokens, "coefficients": coefficients}, rewards.mean()


def main(steps=30):
    """Trains, and returns the mean reward of each step's batch."""
    policy = Policy()
    params = policy.init(jax.random.key(0), jnp.zeros((1, TOKENS), jnp.int32))["params"]
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))
    tx = proma.accumulate(inner, MICROBATCHES)
    state = TrainState.create(apply_fn=policy.apply, params=params, tx=tx)
    rewards = []
    for step in range(steps):
        batch, reward = rollout(state, jax.random.key(step))
        rewards.append(float(reward))
        for m in range(MICROBATCHES):
            state = train_step(state, jax.tree.map(lambda x, m=m: x[m::MICROBATCHES], batch))
        removed = float(state.opt_state.accumulation_fraction)
        print(f"step {step}: reward {rewards[-1]:.3f}, removed {removed:.3f}")
    return rewards


if __name__ == "__main__":
    main()
