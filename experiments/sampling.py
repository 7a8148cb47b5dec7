"""Rollouts: sampling responses from the policy with a key/value cache, under jit.

A rollout keeps everything an update needs: the tokens, which of them are the response, and the
log-probabilities at the time of sampling. The end token belongs to the response, so it gets its
gradient; what follows it is padding.

A policy is a `Policy`, which never changes, and its `params`, as `nnx.split(Decoder(...))` gives.
"""

import functools
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments import checked, meshes, next_token
from experiments.models import decoder, tokens
from experiments.tasks import task
from proma_jax import policy_gradient as pg


@dataclass(frozen=True, config=checked.CONFIG)
class SamplingConfig:
    """How responses are drawn from the policy."""

    temperature: checked.Positive = 1.0
    """Logits are divided by it. The policy that is trained, and whose log-probabilities, KL and
    entropy are reported, is the one at this temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that make up this probability are drawn."""
    top_k: checked.Count | None = None
    """Only so many of the likeliest tokens are drawn; None: all."""


_BUCKET = 16
"""Widths are cut to multiples of it."""


class Policy(NamedTuple):
    """A language model, but for its parameters.

    Attributes:
        graphdef: the model's structure.
        tokenizer: its tokens.
        prompt_width: most tokens of a prompt.
        response_width: most tokens of a response; one that is cut off there has no end token.
        config: how it is sampled from.
        logits_at_a_time: tokens of a sequence whose logits are formed together for their
            log-probabilities; None: all. Fewer take less memory, above all with large vocabularies.
        mesh: the devices that share its work, None for one.
    """

    graphdef: nnx.GraphDef
    tokenizer: tokens.Tokenizer
    prompt_width: int
    response_width: int
    config: SamplingConfig = SamplingConfig()
    logits_at_a_time: int | None = None
    mesh: jax.sharding.Mesh | None = None


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


def no_rollouts(policy: Policy, count: int) -> Rollouts:
    """`count` rollouts of nothing but padding."""
    shape = count, policy.prompt_width + policy.response_width
    mask = jnp.zeros((count, policy.response_width), bool)
    return Rollouts(
        tokens=jnp.full(shape, policy.tokenizer.pad, jnp.int32),
        valid=jnp.zeros(shape, bool),
        mask=mask,
        logprobs=jnp.zeros(mask.shape, jnp.float32),
    )


def response_logits(policy: Policy, params: nnx.State, rollouts: Rollouts) -> jax.Array:
    """Logits (..., R, V) float32 of the response tokens, from one forward over the rollouts."""
    return logits_of(policy, params, response_hidden(policy, params, rollouts))


def response_hidden(
    policy: Policy, params: nnx.State, rollouts: Rollouts, copies: int = 1
) -> jax.Array:
    """Hidden states (..., R, width) before the response tokens, for `logits_of`.

    Of n rollouts with `copies` responses to each prompt side by side, each prompt is read once.
    """
    model = nnx.merge(policy.graphdef, params)
    if copies == 1 or rollouts.mask.shape[1] == 1:  # each is read once anyway
        return _before_responses(model, rollouts)
    count, width = rollouts.tokens.shape
    first = width - rollouts.mask.shape[1]
    both = rollouts.tokens, rollouts.valid
    prompts = (x.reshape(-1, copies, width)[:, 0, :first] for x in both)
    cache = decoder.empty_cache(model.config, count // copies, width - 1)
    of_prompts, cache = model.extend_hidden(*prompts, cache)
    before_first = jnp.repeat(of_prompts[:, -1:], copies, axis=0)
    responses = (x[:, first:-1] for x in both)
    before_others, _ = model.extend_hidden(*responses, decoder.repeated(cache, copies))
    return jnp.concatenate([before_first, before_others], axis=1)


def logits_of(policy: Policy, params: nnx.State, hidden: jax.Array) -> jax.Array:
    """Logits (..., V) float32 of hidden states (..., width), at the policy's temperature."""
    logits = nnx.merge(policy.graphdef, params).logits(hidden)
    return logits.astype(jnp.float32) / policy.config.temperature


def response_logprobs(policy: Policy, params: nnx.State, rollouts: Rollouts) -> jax.Array:
    """Log-probabilities (..., R) float32 of the response tokens, 0 outside the mask."""
    if policy.logits_at_a_time is None:
        logits = response_logits(policy, params, rollouts)
        return pg.token_logprobs(logits, rollouts.responses, rollouts.mask)
    model = nnx.merge(policy.graphdef, params)
    hidden = _before_responses(model, rollouts).astype(jnp.float32) / policy.config.temperature
    return pg.chunked_token_logprobs(
        hidden,
        model.head_kernel,
        rollouts.responses,
        rollouts.mask,
        chunk_size=policy.logits_at_a_time,
    )


def _before_responses(model: decoder.Decoder, rollouts: Rollouts) -> jax.Array:
    """Hidden states (..., R, width) of the tokens before the response tokens."""
    hidden = model.hidden(rollouts.tokens, rollouts.valid)
    first = hidden.shape[-2] - rollouts.mask.shape[-1]
    return hidden[..., first - 1 : -1, :]


class _Sampled(NamedTuple):
    """What sampling carries from one token to the next, n sequences side by side."""

    length: jax.Array
    token: jax.Array
    cache: decoder.KVCache
    running: jax.Array
    responses: jax.Array
    mask: jax.Array
    logprobs: jax.Array


@functools.partial(
    jax.jit, static_argnames=("graphdef", "copies", "config", "response_width", "ends", "pad")
)
def sample(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: jax.Array,
    valid: jax.Array,
    key: jax.Array | None,
    *,
    copies: int = 1,
    config: SamplingConfig,
    response_width: int,
    ends: tuple[int, ...],
    pad: int,
) -> Rollouts:
    """Samples responses to each prompt, which is read once; ends when all responses have.

    Args:
        graphdef: the policy's structure.
        params: its parameters.
        tokens: (p, P) int32 prompts, padded on the left.
        valid: (p, P) bool, False for padding.
        key: PRNG key; None decodes greedily.
        copies: responses to each prompt.
        config: how tokens are drawn.
        response_width: most tokens R of a response; one cut off there has no end token.
        ends: the tokens that end a response.
        pad: the token written after it.

    Returns:
        Rollouts with the n = p * copies responses, those to one prompt side by side. Their
        log-probabilities are the policy's at `config.temperature`, whatever top-p and top-k leave
        out.
    """
    policy = nnx.merge(graphdef, params)
    prompts, width = tokens.shape
    cache = decoder.empty_cache(policy.config, prompts, width + response_width)
    hidden, cache = policy.extend_hidden(tokens, valid, cache)
    cache = decoder.repeated(cache, copies)
    tokens, valid, logits = (
        jnp.repeat(x, copies, axis=0) for x in (tokens, valid, policy.logits(hidden[:, -1]))
    )
    is_end = jnp.zeros(logits.shape[-1], bool).at[jnp.array(ends)].set(True)

    def draw(now: _Sampled, logits: jax.Array) -> _Sampled:
        logits = logits.astype(jnp.float32) / config.temperature
        if key is None:
            token = jnp.argmax(logits, axis=-1)
        else:
            noise = jax.random.fold_in(key, now.length)
            token = next_token.drawn(noise, logits, top_p=config.top_p, top_k=config.top_k)
        token = jnp.where(now.running, token, pad).astype(jnp.int32)
        logprob = pg.token_logprobs(logits, token, now.running)
        return now._replace(
            length=now.length + 1,
            token=token,
            running=now.running & ~is_end[token],
            responses=now.responses.at[:, now.length].set(token),
            mask=now.mask.at[:, now.length].set(now.running),
            logprobs=now.logprobs.at[:, now.length].set(logprob),
        )

    def step(now: _Sampled) -> _Sampled:
        is_valid = jax.lax.dynamic_slice_in_dim(now.mask, now.length - 1, 1, axis=1)
        logits, cache = policy.extend(now.token[:, None], is_valid, now.cache)
        return draw(now._replace(cache=cache), logits[:, 0])

    shape = prompts * copies, response_width
    nothing = _Sampled(
        length=jnp.int32(0),
        token=jnp.zeros(shape[0], jnp.int32),
        cache=cache,
        running=jnp.ones(shape[0], bool),
        responses=jnp.full(shape, pad, jnp.int32),
        mask=jnp.zeros(shape, bool),
        logprobs=jnp.zeros(shape, jnp.float32),
    )
    sampled = jax.lax.while_loop(
        lambda now: (now.length < response_width) & jnp.any(now.running),
        step,
        draw(nothing, logits),
    )
    return Rollouts(
        tokens=jnp.concatenate([tokens, sampled.responses], axis=1),
        valid=jnp.concatenate([valid, sampled.mask], axis=1),
        mask=sampled.mask,
        logprobs=sampled.logprobs,
    )


def respond(
    policy: Policy,
    params: nnx.State,
    prompts: Sequence[str | task.Chat],
    key: jax.Array | None,
    at_a_time: int | None = None,
    *,
    copies: int = 1,
) -> Rollouts:
    """The policy's responses to prompts.

    Args:
        policy: the policy.
        params: its parameters.
        prompts: p texts or chats.
        key: PRNG key; None decodes greedily.
        at_a_time: sequences sampled together; fewer take less memory. Default: all.
        copies: responses to each prompt.

    Returns:
        n = p * copies rollouts of the policy's widths, those to one prompt side by side, whole on
        every device.

    Raises:
        ValueError: a prompt has more tokens than the policy's widest, or none.
    """
    encoded, valid = tokens.padded(policy.tokenizer, prompts, policy.prompt_width)
    cut = policy.prompt_width - _bucket(valid[:, ::-1])
    count = len(prompts) * copies
    at_a_time = meshes.multiple(policy.mesh, min(at_a_time or count, count))
    shared = meshes.together(policy.mesh, at_a_time, copies)
    firsts = range(0, count, at_a_time)
    keys = [key] if key is None or len(firsts) == 1 else jax.random.split(key, len(firsts))
    sampled = []
    for part, first in enumerate(firsts):
        rows = np.arange(first, first + at_a_time, shared) % count // copies
        rollouts = sample(
            policy.graphdef,
            params,
            *meshes.rows(policy.mesh, (encoded[rows, cut:], valid[rows, cut:])),
            keys[part % len(keys)],
            copies=shared,
            config=policy.config,
            response_width=policy.response_width,
            ends=policy.tokenizer.ends,
            pad=policy.tokenizer.pad,
        )
        sampled.append(rollouts)
    together = jax.tree.map(lambda *x: jnp.concatenate(x)[:count], *sampled)
    rollouts = together._replace(
        tokens=jnp.pad(together.tokens, ((0, 0), (cut, 0)), constant_values=policy.tokenizer.pad),
        valid=jnp.pad(together.valid, ((0, 0), (cut, 0))),
    )
    return meshes.whole(policy.mesh, rollouts)


def trimmed(rollouts: Rollouts) -> Rollouts:
    """Rollouts without most of the columns that hold nothing but padding.

    What is left has one of few widths, so that what takes it is compiled for few.
    """
    prompt_width = rollouts.tokens.shape[1] - rollouts.mask.shape[1]
    first = prompt_width - _bucket(np.asarray(rollouts.valid)[:, prompt_width - 1 :: -1])
    length = _bucket(np.asarray(rollouts.mask))
    return Rollouts(
        tokens=rollouts.tokens[:, first : prompt_width + length],
        valid=rollouts.valid[:, first : prompt_width + length],
        mask=rollouts.mask[:, :length],
        logprobs=rollouts.logprobs[:, :length],
    )


def _bucket(used: np.ndarray) -> int:
    """Columns to keep of `used` (n, width): those with a True, rounded up to 16's multiples."""
    longest = int(np.flatnonzero(used.any(axis=0)).max(initial=0)) + 1
    return min(-(-longest // _BUCKET) * _BUCKET, used.shape[1])


def texts(policy: Policy, rollouts: Rollouts) -> list[str]:
    """The responses as texts."""
    responses, mask = np.asarray(rollouts.responses), np.asarray(rollouts.mask)
    return [
        policy.tokenizer.decode(response[is_valid])
        for response, is_valid in zip(responses, mask, strict=True)
    ]


def ended(policy: Policy, rollouts: Rollouts) -> np.ndarray:
    """Which responses (n,) have an end token, and were not cut off."""
    is_end = np.isin(np.asarray(rollouts.responses), policy.tokenizer.ends)
    return np.any(is_end & np.asarray(rollouts.mask), axis=1)
