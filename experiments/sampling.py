"""Rollouts: sampling responses from the policy with a KV cache, under jit.

A rollout keeps everything an update needs: the tokens, which of them are the response, and the
log-probabilities at the time of sampling. The end token belongs to the response, so it gets its
gradient; what follows it is padding.

A policy is a pair of a static `nnx.GraphDef` and its `params`, as `nnx.split(Decoder(...))` gives.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models import decoder
from experiments.tasks import addition
from proma_jax import policy_gradient as pg


class Rollouts(NamedTuple):
    """Prompts and sampled responses: n of them, or one without the leading axis.

    Attributes:
        tokens: (n, P + R) int32, prompts padded on the left, responses on the right.
        valid: (n, P + R) bool, the tokens that are no padding.
        mask: (n, R) bool, the response tokens, the end token included.
        logprobs: (n, R) float32, log-probabilities of the response tokens when they were sampled,
            0 outside the mask.
    """

    tokens: jax.Array
    valid: jax.Array
    mask: jax.Array
    logprobs: jax.Array

    @property
    def responses(self) -> jax.Array:
        """The response tokens (n, R)."""
        return self.tokens[..., -self.mask.shape[-1] :]


def no_rollouts(task: addition.Addition, count: int) -> Rollouts:
    """`count` rollouts of nothing but padding."""
    tokens = jnp.full((count, task.prompt_width + task.response_width), addition.PAD, jnp.int32)
    mask = jnp.zeros((count, task.response_width), bool)
    return Rollouts(tokens, tokens != addition.PAD, mask, jnp.zeros(mask.shape, jnp.float32))


def response_logits(graphdef: nnx.GraphDef, params: nnx.State, rollouts: Rollouts) -> jax.Array:
    """Logits (..., R, V) that predict the response tokens, from one forward over the rollouts."""
    logits = nnx.merge(graphdef, params)(rollouts.tokens, rollouts.valid)
    first = logits.shape[-2] - rollouts.mask.shape[-1]
    return logits[..., first - 1 : -1, :]


def response_logprobs(graphdef: nnx.GraphDef, params: nnx.State, rollouts: Rollouts) -> jax.Array:
    """Log-probabilities (..., R) of the response tokens, 0 outside the mask."""
    logits = response_logits(graphdef, params, rollouts)
    return pg.token_logprobs(logits, rollouts.responses, rollouts.mask)


@functools.partial(jax.jit, static_argnames=("graphdef", "response_width", "end", "pad"))
def sample(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: jax.Array,
    valid: jax.Array,
    key: jax.Array | None,
    *,
    response_width: int,
    end: int,
    pad: int,
) -> Rollouts:
    """Samples one response to each prompt at temperature 1.

    Args:
        graphdef: the policy's structure.
        params: its parameters.
        tokens: (n, P) int32 prompts, padded on the left.
        valid: (n, P) bool, False for padding.
        key: PRNG key; None decodes greedily.
        response_width: most tokens R of a response; one cut off there has no end token.
        end: the token that ends a response.
        pad: the token written after it.

    Returns:
        Rollouts with the n responses.
    """
    policy = nnx.merge(graphdef, params)
    prompts, width = tokens.shape
    cache = decoder.empty_cache(policy.config, prompts, width + response_width)
    logits, cache = policy.extend(tokens, valid, cache)

    def step(carry, position):
        logits, cache, running = carry
        if key is None:
            token = jnp.argmax(logits, axis=-1)
        else:
            token = jax.random.categorical(jax.random.fold_in(key, position), logits)
        token = jnp.where(running, token, pad).astype(jnp.int32)
        logprob = pg.token_logprobs(logits, token, running)
        next_logits, cache = policy.extend(token[:, None], running[:, None], cache)
        return (next_logits[:, 0], cache, running & (token != end)), (token, running, logprob)

    start = (logits[:, -1], cache, jnp.ones(prompts, bool))
    _, (responses, mask, logprobs) = jax.lax.scan(step, start, jnp.arange(response_width))
    return Rollouts(
        tokens=jnp.concatenate([tokens, responses.T], axis=1),
        valid=jnp.concatenate([valid, mask.T], axis=1),
        mask=mask.T,
        logprobs=logprobs.T,
    )


def respond(
    task: addition.Addition,
    graphdef: nnx.GraphDef,
    params: nnx.State,
    prompts: list[str],
    key: jax.Array | None,
) -> Rollouts:
    """The policy's responses to prompts, sampled with `key` or, if that is None, greedy."""
    return sample(
        graphdef,
        params,
        *task.encode_prompts(prompts),
        key,
        response_width=task.response_width,
        end=addition.END,
        pad=addition.PAD,
    )


def greedy_accuracy(
    task: addition.Addition, graphdef: nnx.GraphDef, params: nnx.State, prompts: list[str]
) -> float:
    """The fraction of prompts whose greedy response is right."""
    rollouts = respond(task, graphdef, params, prompts, key=None)
    return float(task.reward(prompts, np.asarray(rollouts.responses)).mean())
