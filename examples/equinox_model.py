"""An Equinox model: partition it, and PROMA takes its arrays. About 20 seconds on 2 CPU cores.

    python examples/equinox_model.py        # needs equinox

`eqx.partition` splits a model into its arrays, which are the parameters, and the rest, as for
optax. (The file is not called equinox.py, which Python would import in place of the library.)
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import proma_jax as proma
from proma_jax import policy_gradient as pg

VOCABULARY, TOKENS, WIDTH = 16, 8, 32
BATCH, MICROBATCHES = 64, 4


class Policy(eqx.Module):
    """Tokens (T,) to the logits (T, vocabulary) of their next tokens."""

    embed: eqx.nn.Embedding
    norm: eqx.nn.RMSNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.norm = eqx.nn.RMSNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=keys[1])
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, depth=1, activation=jax.nn.gelu, key=keys[2])
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=keys[3])

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        normed = jax.vmap(self.norm)(x)
        x = x + self.attention(normed, normed, normed, mask=jnp.tri(len(tokens), dtype=bool))
        return jax.vmap(self.head)(x + jax.vmap(self.mlp)(jax.vmap(self.norm)(x)))


@eqx.filter_jit
def train_step(model, opt_state, tx, microbatch):
    """One microbatch; every fourth moves the parameters."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def logprob_fn(params, sequence):
        tokens = sequence["tokens"]
        logits = eqx.combine(params, static)(tokens[:-1])
        return pg.token_logprobs(logits, tokens[1:], jnp.ones_like(tokens[1:])).sum()

    _, scores = proma.sequence_scores(logprob_fn)(params, microbatch)
    grads = proma.weighted_sum(scores, microbatch["coefficients"])
    updates, opt_state = tx.update(grads, opt_state, params, scores=scores)
    return eqx.apply_updates(model, updates), opt_state


@eqx.filter_jit
def rollout(model, key):
    """Samples a batch of sequences, and rewards each token that equals the one before it."""

    def sample(t, tokens):
        logits = jax.vmap(model)(tokens)[:, t]
        return tokens.at[:, t + 1].set(jax.random.categorical(jax.random.fold_in(key, t), logits))

    first = jax.random.randint(key, (BATCH,), 0, VOCABULARY)
    tokens = jnp.zeros((BATCH, TOKENS + 1), jnp.int32).at[:, 0].set(first)
    tokens = jax.lax.fori_loop(0, TOKENS, sample, tokens)
    rewards = jnp.mean(tokens[:, 1:] == tokens[:, :-1], axis=1)
    coefficients = pg.token_mean_coefficients(rewards - rewards.mean(), BATCH * TOKENS)
    return {"tokens": tokens, "coefficients": coefficients}, rewards.mean()


def main(steps=30):
    """Trains, and returns the mean reward of each step's batch."""
    model = Policy(jax.random.key(0))
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))
    tx = proma.accumulate(inner, MICROBATCHES)
    opt_state, rewards = tx.init(eqx.filter(model, eqx.is_inexact_array)), []
    for step in range(steps):
        batch, reward = rollout(model, jax.random.key(step))
        rewards.append(float(reward))
        for m in range(MICROBATCHES):
            microbatch = jax.tree.map(lambda x, m=m: x[m::MICROBATCHES], batch)
            model, opt_state = train_step(model, opt_state, tx, microbatch)
        print(f"step {step}: reward {rewards[-1]:.3f}")
    return rewards


if __name__ == "__main__":
    main()
