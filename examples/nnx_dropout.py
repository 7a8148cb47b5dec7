"""A Flax NNX model with dropout: a random key per sequence. About 15 seconds on 2 CPU cores.

    python examples/nnx_dropout.py        # needs flax

`logprob_fn` must be a function of its arguments alone, but the `Rngs` that an `nnx.Dropout` may
hold are state: closed over, they give all sequences one mask, or raise a TraceContextError. So the
layer holds none and is given some at each call, from a key that comes with the sequence, like its
tokens. (In a model that must stay as it is, merge with `copy=True` and `nnx.reseed` the copy. But
reseed knows the streams by the names that they were made with, as in `nnx.Rngs(0, dropout=1)`: for
a name that no stream has it does nothing. `proma.check_scores` warns of one mask for all.)
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
        self.dropout = nnx.Dropout(0.1)
        self.head = nnx.Linear(4 * WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens, rngs=None):
        x = nnx.gelu(self.up(self.embed(tokens)))
        return self.head(self.dropout(x, deterministic=rngs is None, rngs=rngs))


@nnx.jit
def train_step(model, optimizer, microbatch):
    """One microbatch; every fourth moves the parameters. Returns the log-probabilities."""
    graphdef, params = nnx.split(model, nnx.Param)

    def logprob_fn(params, sequence):
        tokens, rngs = sequence["tokens"], nnx.Rngs(dropout=sequence["key"])
        logits = nnx.merge(graphdef, params)(tokens[:-1], rngs)
        return pg.token_logprobs(logits, tokens[1:], jnp.ones_like(tokens[1:])).sum()

    logprobs, scores = proma.sequence_scores(logprob_fn)(params, microbatch)
    grads = proma.weighted_sum(scores, microbatch["coefficients"])
    optimizer.update(model, grads, scores=scores)
    return logprobs


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


def make_optimizer(model):
    """AdamW around which PROMA accumulates; `nnx.Optimizer` hands the scores on."""
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    return nnx.Optimizer(model, proma.accumulate(inner, MICROBATCHES), wrt=nnx.Param)


def main(steps=30):
    """Trains, and returns the mean reward of each step's batch."""
    model = Policy(nnx.Rngs(0))
    optimizer, rewards = make_optimizer(model), []
    for step in range(steps):
        batch, reward = rollout(model, jax.random.key(step))
        rewards.append(float(reward))
        for m in range(MICROBATCHES):
            train_step(model, optimizer, jax.tree.map(lambda x, m=m: x[m::MICROBATCHES], batch))
        print(f"step {step}: reward {rewards[-1]:.3f}")
    return rewards


if __name__ == "__main__":
    main()
