"""A Flax NNX model with dropout: a random key per sequence. Takes N seconds on 2 CPU cores.

    python examples/nnx_dropout.py        # needs flax

`logprob_fn` must be a function of its arguments alone, but the `Rngs` in an `nnx.Dropout` are
state that every call changes. Left as they are, they would give all sequences of all steps one
dropout mask. So each sequence brings a key of its own, like its tokens, and `nnx.reseed` puts it
into a copy of the model. The model is a user's own, unchanged.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import proma_jax as proma
from proma_jax import policy_gradient as pg

VOCABULARY, TOKENS, WIDTH = 16, 8, 32
BATCH, MICROBATCHES = 64, 4


class Policy(nnx.Module):
    """Tokens (..., T) to the logits (..., T, vocabulary) of their next tokens."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(4 * WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.dropout(nnx.gelu(self.up(self.embed(tokens)))))


@nnx.jit
def train_step(model, optimizer, microbatch):
    """One microbatch; every fourth moves the parameters."""
    graphdef, params, random_state = nnx.split(model, nnx.Param, nnx.RngState)

    def logprob_fn(params, sequence):
        copy, tokens = nnx.merge(graphdef, params, random_state, copy=True), sequence["tokens"]
        nnx.reseed(copy, dropout=sequence["key"])
        return pg.token_logprobs(copy(tokens[:-1]), tokens[1:], jnp.ones_like(tokens[1:])).sum()

    _, scores = proma.sequence_scores(logprob_fn)(params, microbatch)
    grads = proma.weighted_sum(scores, microbatch["coefficients"])
    optimizer.update(model, grads, scores=scores)


@nnx.jit
def rollout(model, key):
    """Samples a batch of sequences, and rewards each token that equals the one before it."""

    def sample(t, tokens):
        logits = model(tokens)[:, t]
        return tokens.at[:, t + 1].set(jax.random.categorical(jax.random.fold_in(key, t), logits))

    first = jax.random.randint(key, (BATCH,), 0, VOCABULARY)
    tokens = jnp.zeros((BATCH, TOKENS + 1), jnp.int32).at[:, 0].set(first)
    tokens = jax.lax.fori_loop(0, TOKENS, sample, tokens)
    rewards = jnp.mean(tokens[:, 1:] == tokens[:, :-1], axis=1)
    coefficients = pg.token_mean_coefficients(rewards - rewards.mean(), BATCH * TOKENS)
    keys = jax.random.split(key, BATCH)
    return {"tokens": tokens, "coefficients": coefficients, "key": keys}, rewards.mean()


def main(steps=30):
    """Trains, and returns the mean reward of each step's batch."""
    model = Policy(nnx.Rngs(0))
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    optimizer = nnx.Optimizer(model, proma.accumulate(inner, MICROBATCHES), wrt=nnx.Param)
    rewards = []
    for step in range(steps):
        model.eval()
        batch, reward = rollout(model, jax.random.key(step))
        rewards.append(float(reward))
        model.train()
        for m in range(MICROBATCHES):
            train_step(model, optimizer, jax.tree.map(lambda x, m=m: x[m::MICROBATCHES], batch))
        print(f"step {step}: reward {rewards[-1]:.3f}")
    return rewards


if __name__ == "__main__":
    main()
