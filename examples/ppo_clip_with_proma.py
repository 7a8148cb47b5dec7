"""PPO's clipped loss with PROMA, and a model in plain JAX. About 15 seconds on 2 CPU cores.

    python examples/ppo_clip_with_proma.py

The gradient may be that of any loss: here PPO's clip with an entropy bonus. It takes a backward
pass of its own, beside the one for the scores, which are always those of the log-probabilities.
Each rollout batch serves for two optimizer steps, so that in the second one the ratios are not 1.
"""

import jax
import jax.numpy as jnp
import optax

import proma_jax as proma
from proma_jax import policy_gradient as pg

VOCABULARY, TOKENS, WIDTH = 16, 8, 32
BATCH, MICROBATCHES, STEPS_PER_BATCH, ENTROPY_BONUS = 64, 4, 2, 0.01


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


def token_logprobs(params, batch):
    """The log-probabilities of the tokens, of one sequence or of a batch."""
    logits = logits_fn(params, batch["tokens"][..., :-1])
    return pg.token_logprobs(logits, batch["tokens"][..., 1:], batch["mask"])


def logprob_fn(params, sequence):
    """What PROMA is given: the log-probability of one sequence."""
    return token_logprobs(params, sequence).sum()


def loss_fn(params, batch):
    """What is minimised: any function of a microbatch, such that microbatches add up."""
    logprobs, mask = token_logprobs(params, batch), batch["mask"]
    loss = pg.ppo_clip_loss(logprobs, batch["old_logprobs"], batch["coefficients"], mask)
    entropy = pg.entropy(logits_fn(params, batch["tokens"][..., :-1]), mask)
    return loss - ENTROPY_BONUS * entropy / MICROBATCHES


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
    coefficients = pg.token_mean_coefficients(
        rewards - rewards.mean(), BATCH * TOKENS / STEPS_PER_BATCH
    )
    batch = {"tokens": tokens, "mask": tokens[:, 1:] >= 0, "coefficients": coefficients}
    return {**batch, "old_logprobs": token_logprobs(params, batch)}, rewards.mean()


def main(batches=30):
    """Trains, and returns the mean reward of each batch."""
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    tx = proma.accumulate(inner, MICROBATCHES)

    @jax.jit
    def train_step(params, opt_state, microbatch):
        grads = jax.grad(loss_fn)(params, microbatch)
        _, scores = proma.sequence_scores(logprob_fn)(params, microbatch)
        updates, opt_state = tx.update(grads, opt_state, params, scores=scores)
        return optax.apply_updates(params, updates), opt_state

    params = init_params(jax.random.key(0))
    opt_state, rewards = tx.init(params), []
    for i in range(batches):
        batch, reward = rollout(params, jax.random.key(i))
        rewards.append(float(reward))
        for m in range(STEPS_PER_BATCH * MICROBATCHES):
            microbatch = {name: x[m :: STEPS_PER_BATCH * MICROBATCHES] for name, x in batch.items()}
            params, opt_state = train_step(params, opt_state, microbatch)
        ratios = jnp.exp(token_logprobs(params, batch) - batch["old_logprobs"])
        print(f"batch {i}: reward {reward:.3f}, ratios {ratios.min():.2f} to {ratios.max():.2f}")
    return rewards


if __name__ == "__main__":
    main()
