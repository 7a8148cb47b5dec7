"""A whole optimizer step inside the backward pass. About 20 seconds on 2 CPU cores.

    python examples/fused_step.py

`accumulated_gradient` takes all microbatches of a step at once, and no scores of two layers ever
exist together: with scanned, rematerialised layers it needs about the memory of plain policy
gradient. Any optax chain follows. Here with both variants, accumulation and intra.
"""

import jax
import jax.numpy as jnp
import optax

import proma_jax as proma
from proma_jax import policy_gradient as pg

VOCABULARY, TOKENS, WIDTH, LAYERS = 16, 8, 32, 4
BATCH, MICROBATCHES = 64, 4


def init_params(key):
    """Residual layers, stacked for a scan, between an embedding and a head."""
    shapes = {
        "embed": (VOCABULARY, WIDTH),
        "up": (LAYERS, WIDTH, 4 * WIDTH),
        "down": (LAYERS, 4 * WIDTH, WIDTH),
        "head": (WIDTH, VOCABULARY),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(key, shape) / shape[-2] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def logits_fn(params, tokens):
    """Tokens (..., T) to the logits (..., T, vocabulary) of their next tokens."""

    @jax.checkpoint
    def layer(x, kernels):
        up, down = kernels
        return x + jax.nn.gelu(x @ up) @ down, None

    x, _ = jax.lax.scan(layer, params["embed"][tokens], (params["up"], params["down"]))
    return x @ params["head"]


def logprob_fn(params, tokens):
    """The log-probability of one sequence."""
    mask = jnp.ones(len(tokens) - 1, bool)
    return pg.token_logprobs(logits_fn(params, tokens[:-1]), tokens[1:], mask).sum()


gradient_fn = proma.accumulated_gradient(
    logprob_fn, accumulation=proma.Accumulation(), intra=proma.Intra(rank=4)
)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))


@jax.jit
def rollout(params, key):
    """Samples a batch of sequences, and rewards each token that equals the one before it."""

    def sample(t, tokens):
        logits = logits_fn(params, tokens)[:, t]
        return tokens.at[:, t + 1].set(jax.random.categorical(jax.random.fold_in(key, t), logits))

    first = jax.random.randint(key, (BATCH,), 0, VOCABULARY)
    tokens = jnp.zeros((BATCH, TOKENS + 1), jnp.int32).at[:, 0].set(first)
    tokens = jax.lax.fori_loop(0, TOKENS, sample, tokens)
    rewards = jnp.mean(tokens[:, 1:] == tokens[:, :-1], axis=1)
    return tokens, pg.token_mean_coefficients(rewards - rewards.mean(), BATCH * TOKENS), rewards


@jax.jit
def train_step(params, opt_state, tokens, coefficients, step):
    """One optimizer step of k microbatches, k and b the two leading axes of the batch."""
    batch, weights = (x.reshape(MICROBATCHES, -1, *x.shape[1:]) for x in (tokens, coefficients))
    grads, metrics = gradient_fn(params, batch, weights, step)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, metrics


def main(steps=30):
    """Trains, and returns the mean reward of each step's batch and the last step's metrics."""
    params = init_params(jax.random.key(0))
    opt_state, mean_rewards = optimizer.init(params), []
    for step in range(steps):
        tokens, coefficients, rewards = rollout(params, jax.random.key(step))
        mean_rewards.append(float(rewards.mean()))
        params, opt_state, metrics = train_step(params, opt_state, tokens, coefficients, step)
        removed, intra = metrics.accumulation_fraction[-1], metrics.intra_fraction[-1]
        print(f"step {step}: reward {mean_rewards[-1]:.3f}, removed {removed:.2f} and {intra:.2f}")
    return mean_rewards, metrics


if __name__ == "__main__":
    main()
