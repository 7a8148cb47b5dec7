"""GRPO with PROMA accumulation from end to end: a loop to copy. About 40 seconds on 2 CPU cores.

    python examples/grpo_with_proma.py        # needs flax

A small transformer learns to count: given a digit it is to go on with the next ones up to 9, and
then to stop. A rollout batch has 16 prompts with 16 sampled responses each, and serves for two
optimizer steps of 8 microbatches. PROMA is in the lines marked (1), (2) and (3).
`main(shrinkage=0.0)` runs the same loop without it.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import proma_jax as proma
from proma_jax import policy_gradient as pg

STOP, VOCABULARY, RESPONSE, WIDTH = 10, 11, 10, 64
PROMPTS, GROUP, STEPS_PER_BATCH, MICROBATCHES = 16, 16, 2, 8


class Policy(nnx.Module):
    """A transformer layer: tokens (..., T) to the logits (..., T, vocabulary) of the next."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.norm1, self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(tokens))
        return self.head(x + self.down(nnx.gelu(self.up(self.norm2(x)))))


GRAPHDEF, PARAMS = nnx.split(Policy(nnx.Rngs(0)))


@jax.jit
def response_logits(params, tokens):
    """The logits (..., T, vocabulary) of the tokens after the first."""
    return nnx.merge(GRAPHDEF, params)(tokens)[..., :-1, :]


def token_logprobs(params, batch):
    """The log-probabilities of the response's tokens, of one sequence or of a batch."""
    logits = response_logits(params, batch["tokens"])
    return pg.token_logprobs(logits, batch["tokens"][..., 1:], batch["mask"])


def logprob_fn(params, sequence):
    """The log-probability of one sequence's response."""
    return token_logprobs(params, sequence).sum()


def loss_fn(params, batch):
    """GRPO's loss of a microbatch: PPO's clip, normalised by the tokens of the optimizer step."""
    logprobs = token_logprobs(params, batch)
    return pg.ppo_clip_loss(logprobs, batch["old_logprobs"], batch["coefficients"], batch["mask"])


@jax.jit
def rollout(params, key):
    """Samples responses and grades them: a batch, and its mean reward."""
    prompt_key, key = jax.random.split(key)
    prompts = jnp.repeat(jax.random.randint(prompt_key, (PROMPTS,), 0, STOP - 1), GROUP)
    tokens = jnp.zeros((len(prompts), 1 + RESPONSE), jnp.int32).at[:, 0].set(prompts)

    def sample(t, tokens):
        logits = response_logits(params, tokens)[:, t]
        return tokens.at[:, t + 1].set(jax.random.categorical(jax.random.fold_in(key, t), logits))

    tokens = jax.lax.fori_loop(0, RESPONSE, sample, tokens)
    stops = tokens[:, 1:] == STOP
    mask = jnp.cumsum(stops, axis=1) - stops == 0  # up to the first stop, itself included
    wanted = jnp.minimum(prompts[:, None] + 1 + jnp.arange(RESPONSE), STOP)
    right = jnp.sum(mask & (tokens[:, 1:] == wanted), axis=1)
    rewards = right / jnp.maximum(mask.sum(axis=1), STOP - prompts)
    advantages = pg.group_relative_advantages(rewards.reshape(PROMPTS, GROUP)).reshape(-1)
    coefficients = pg.token_mean_coefficients(advantages, mask.sum() / STEPS_PER_BATCH)
    batch = {"tokens": tokens, "mask": mask, "coefficients": coefficients}
    return {**batch, "old_logprobs": token_logprobs(params, batch)}, rewards.mean()


def main(batches=40, shrinkage=1.0):
    """Trains, and returns each batch's mean reward and its steps' mean KL."""
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    tx = proma.accumulate(inner, MICROBATCHES, shrinkage=shrinkage)  # (1) for optax.MultiSteps

    @jax.jit
    def microbatch_step(params, opt_state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        _, scores = proma.sequence_scores(logprob_fn)(params, batch)  # (2)
        updates, opt_state = tx.update(grads, opt_state, params, scores=scores)  # (3)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state, history = PARAMS, tx.init(PARAMS), []
    for i in range(batches):
        rollout_key, order_key = jax.random.split(jax.random.key(i))
        batch, reward = rollout(params, rollout_key)
        order = jax.random.permutation(order_key, PROMPTS * GROUP)
        divergences = []
        for step in order.reshape(STEPS_PER_BATCH, MICROBATCHES, -1):
            before = params
            for chosen in step:
                microbatch = {name: x[chosen] for name, x in batch.items()}
                params, opt_state = microbatch_step(params, opt_state, microbatch)
            old, new = (response_logits(p, batch["tokens"]) for p in (before, params))
            divergences.append(pg.exact_kl(old, new, batch["mask"]))
        history.append((float(reward), float(sum(divergences)) / STEPS_PER_BATCH))
        print("batch {}: reward {:.3f}, KL per step {:.2e}".format(i, *history[-1]))
    return history


if __name__ == "__main__":
    main()
