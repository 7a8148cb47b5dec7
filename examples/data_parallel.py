"""Data-parallel training on 8 devices under jax.jit. About 15 seconds on 2 CPU cores.

    python examples/data_parallel.py

Eight virtual CPU devices stand for eight accelerators. Spread the sequences and copy the
parameters, as for any loss; `spmd_axis_name` and `param_specs` tell PROMA so. A microbatch is then
one global array, and what is removed is what one device would remove with all of its sequences.
"""

import os

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import proma_jax as proma
from proma_jax import policy_gradient as pg

VOCABULARY, TOKENS, WIDTH = 16, 8, 32
BATCH, MICROBATCHES = 64, 4


def init_params(key):
    """An embedding, a hidden layer and a head."""
    shapes = {"embed": (VOCABULARY, WIDTH), "hidden": (WIDTH, 128), "head": (128, VOCABULARY)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def logits_fn(params, tokens):
    """Tokens (..., T) to the logits (..., T, vocabulary) of their next tokens."""
    return jax.nn.gelu(params["embed"][tokens] @ params["hidden"]) @ params["head"]


def logprob_fn(params, sequence):
    """The log-probability of one sequence."""
    tokens = sequence["tokens"]
    logits = logits_fn(params, tokens[:-1])
    return pg.token_logprobs(logits, tokens[1:], jnp.ones_like(tokens[1:])).sum()


scores_fn = proma.sequence_scores(logprob_fn, spmd_axis_name="data", param_specs=P())
inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
tx = proma.accumulate(inner, MICROBATCHES)


@jax.jit
def train_step(params, opt_state, microbatch):
    """One microbatch; every fourth moves the parameters."""
    _, scores = scores_fn(params, microbatch)
    grads = proma.weighted_sum(scores, microbatch["coefficients"])
    updates, opt_state = tx.update(grads, opt_state, params, scores=scores)
    return optax.apply_updates(params, updates), opt_state


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
    coefficients = pg.token_mean_coefficients(rewards - rewards.mean(), BATCH * TOKENS)
    return {"tokens": tokens, "coefficients": coefficients}, rewards.mean()


def main(steps=30):
    """Trains, and returns the mean reward of each step's batch and the parameters."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    copied, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        params = jax.device_put(init_params(jax.random.key(0)), copied)
        opt_state, rewards = tx.init(params), []
        for step in range(steps):
            batch, reward = rollout(params, jax.random.key(step))
            rewards.append(float(reward))
            for m in range(MICROBATCHES):
                microbatch = {name: x[m::MICROBATCHES] for name, x in batch.items()}
                microbatch = jax.device_put(microbatch, spread)
                params, opt_state = train_step(params, opt_state, microbatch)
            print(f"step {step}: reward {reward:.3f} on {len(params['head'].devices())} devices")
    return rewards, params


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    os.environ["NPROC"] = "64"  # threads enough for the collectives of virtual devices
    main()
