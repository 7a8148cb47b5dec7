"""LoRA on a frozen NNX model: only the adapters are projected. About 15 seconds on 2 CPU cores.

    python examples/lora.py        # needs flax

Parameters are what `logprob_fn` takes first: here the adapters. All else is closed over, and has
neither scores nor an accumulated gradient.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import proma_jax as proma
from proma_jax import policy_gradient as pg

VOCABULARY, TOKENS, WIDTH, RANK = 16, 8, 32, 4
BATCH, MICROBATCHES = 64, 4


class Policy(nnx.Module):
    """Tokens (..., T) to the logits (..., T, vocabulary) of their next tokens."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x, mask=nnx.make_causal_mask(tokens))
        return self.head(x + self.down(nnx.gelu(self.up(x))))


def with_adapters(model, rngs):
    """Wraps the feed-forward layers; the model computes what it did, as long as lora_b is zero."""
    model.up = nnx.LoRA(WIDTH, RANK, 4 * WIDTH, base_module=model.up, rngs=rngs)
    model.head = nnx.LoRA(WIDTH, RANK, VOCABULARY, base_module=model.head, rngs=rngs)
    model.down = nnx.LoRA(4 * WIDTH, RANK, WIDTH, base_module=model.down, rngs=rngs)
    return model


def main(steps=30):
    """Trains, and returns the mean rewards of the batches and the model."""
    model = with_adapters(Policy(nnx.Rngs(0)), nnx.Rngs(1))  # in earnest, a pretrained model
    graphdef, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def logits_fn(adapters, tokens):
        return nnx.merge(graphdef, adapters, frozen)(tokens)

    def logprob_fn(adapters, sequence):
        tokens = sequence["tokens"]
        logits = logits_fn(adapters, tokens[:-1])
        return pg.token_logprobs(logits, tokens[1:], jnp.ones_like(tokens[1:])).sum()

    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-2))
    tx = proma.accumulate(inner, MICROBATCHES)

    @jax.jit
    def train_step(adapters, opt_state, microbatch):
        _, scores = proma.sequence_scores(logprob_fn)(adapters, microbatch)
        grads = proma.weighted_sum(scores, microbatch["coefficients"])
        updates, opt_state = tx.update(grads, opt_state, adapters, scores=scores)
        return optax.apply_updates(adapters, updates), opt_state

    @jax.jit
    def rollout(adapters, key):
        """Samples a batch of sequences, and rewards each token that equals the one before it."""

        def sample(t, tokens):
            logits = logits_fn(adapters, tokens)[:, t]
            drawn = jax.random.categorical(jax.random.fold_in(key, t), logits)
            return tokens.at[:, t + 1].set(drawn)

        first = jax.random.randint(key, (BATCH,), 0, VOCABULARY)
        tokens = jnp.zeros((BATCH, TOKENS + 1), jnp.int32).at[:, 0].set(first)
        tokens = jax.lax.fori_loop(0, TOKENS, sample, tokens)
        rewards = jnp.mean(tokens[:, 1:] == tokens[:, :-1], axis=1)
        coefficients = pg.token_mean_coefficients(rewards - rewards.mean(), BATCH * TOKENS)
        return {"tokens": tokens, "coefficients": coefficients}, rewards.mean()

    opt_state, rewards = tx.init(adapters), []
    for step in range(steps):
        batch, reward = rollout(adapters, jax.random.key(step))
        rewards.append(float(reward))
        if step == 0:
            print(proma.describe_scores(logprob_fn, adapters, batch))
        for m in range(MICROBATCHES):
            microbatch = jax.tree.map(lambda x, m=m: x[m::MICROBATCHES], batch)
            adapters, opt_state = train_step(adapters, opt_state, microbatch)
        print(f"step {step}: reward {rewards[-1]:.3f}")
    return rewards, nnx.merge(graphdef, adapters, frozen)


if __name__ == "__main__":
    main()
