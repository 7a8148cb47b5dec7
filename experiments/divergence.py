"""How far an optimizer step moved the policy: exact KL and entropy over a batch's rollouts.

What the policy after a step says of the rollouts is what the policy before the next one says of
them, and what the start says serves the whole batch. So each goes over the rollouts once, and the
hidden states that its head is applied to are kept. Logits, which take more memory with any large
vocabulary, are formed from them again, of a few sequences at a time, or of as many tokens as each
device forms together in training (`logits_at_a_time`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import meshes, sampling
from proma_jax import policy_gradient as pg

_MOST_AT_A_TIME = 64
"""Sequences measured together; the activations of more leave a CPU's cache, at twice the time."""


class Meter:
    """Measures one optimizer step after another over the same n rollouts.

    Args:
        policy: the policy.
        rollouts: of the batch that the steps learn from.
        copies: how many of them have the same prompt, side by side.
        at_a_time: most sequences that are measured together.
        start: the policy's parameters when training began.
        before: its parameters before the first step to measure.
    """

    def __init__(
        self,
        policy: sampling.Policy,
        rollouts: sampling.Rollouts,
        copies: int,
        at_a_time: int,
        start: nnx.State,
        before: nnx.State,
    ):
        self._see = functools.partial(_see, policy, rollouts, copies, at_a_time)
        self._divergences = functools.partial(_divergences, policy, rollouts.mask, at_a_time)
        self._start, self._latest = jax.block_until_ready((self._see(start), self._see(before)))

    def step(self, params: nnx.State) -> dict[str, jax.Array]:
        """What the next step, which led to `params`, did to the policy.

        Returns:
            "step_kl", of the policy before the step from that after it; "start_kl", of the policy
            after it from the start; "entropy", of the policy after it: means over the response
            tokens, in nats.
        """
        before, self._latest = self._latest, self._see(params)
        return self._divergences(before, self._latest, self._start)


class _Seen(NamedTuple):
    """Parameters, and the hidden states (n, R, width) of their policy before the responses."""

    params: nnx.State
    hidden: jax.Array


def _see(policy, rollouts, copies, at_a_time, params):
    return _Seen(params, _hidden(policy, rollouts, copies, at_a_time, params))


@functools.partial(jax.jit, static_argnames=("policy", "copies", "at_a_time"))
def _hidden(policy, rollouts, copies, at_a_time, params):
    at_a_time = _sequences(policy, at_a_time, len(rollouts.mask))
    shared = meshes.together(policy.mesh, at_a_time, copies)
    of_part = functools.partial(sampling.response_hidden, policy, params, copies=shared)
    hidden = _in_parts(policy.mesh, of_part, rollouts, at_a_time)
    return hidden.reshape(-1, *hidden.shape[2:])[: len(rollouts.mask)]


@functools.partial(jax.jit, static_argnames=("policy", "at_a_time"))
def _divergences(policy, mask, at_a_time, before, after, start):
    def of_part(part):
        mask, *hidden = part
        of_before, of_after, of_start = (
            sampling.logits_of(policy, seen.params, x)
            for seen, x in zip((before, after, start), hidden, strict=True)
        )
        means = {
            "step_kl": pg.exact_kl(of_before, of_after, mask),
            "start_kl": pg.exact_kl(of_after, of_start, mask),
            "entropy": pg.entropy(of_after, mask),
        }
        return jax.tree.map(lambda mean: mean * mask.sum(), means)

    responses = mask, before.hidden, after.hidden, start.hidden
    tokens = jax.tree.map(lambda x: x.reshape(mask.size, *x.shape[2:]), responses)
    together = _sequences(policy, at_a_time, len(mask)) * mask.shape[1]
    if policy.logits_at_a_time is not None:
        devices = meshes.multiple(policy.mesh, 1)
        together = min(together, policy.logits_at_a_time * devices)
    sums = _in_parts(policy.mesh, of_part, tokens, together)
    return jax.tree.map(lambda x: x.sum() / mask.sum(), sums)


def _sequences(policy, at_a_time, count):
    """How many sequences are measured together."""
    return meshes.multiple(policy.mesh, min(at_a_time, _MOST_AT_A_TIME, count))


def _in_parts(mesh, of_part, rows, at_a_time):
    """What `of_part` gives of so many rows at a time, the last of them padded; stacked."""
    count = len(jax.tree.leaves(rows)[0])

    def in_parts(x):
        padding = ((0, -count % at_a_time), *((0, 0),) * (x.ndim - 1))
        parts = jnp.pad(x, padding).reshape(-1, at_a_time, *x.shape[1:])
        return meshes.kept_rows(mesh, parts, axis=1)

    return jax.lax.map(of_part, jax.tree.map(in_parts, rows))
