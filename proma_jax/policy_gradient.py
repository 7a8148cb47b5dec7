"""Policy-gradient arithmetic: advantages, coefficients, surrogate losses, KL estimators, entropy.

Pure functions over arrays with masks. The pieces meet in one convention: a *coefficient* c_i is
sequence i's weight in the loss gradient, sign and normalisation included, so that

    loss gradient = Σ_i c_i ∇ log π(y_i | x_i)

(`token_mean_coefficients`: c_i = −A_i / response tokens of the mini-batch). Every loss takes these
coefficients, and sums, so the losses of the microbatches of one optimizer step simply add up. While
the policy is the one that sampled, all three losses have the gradient above, which is
`proma_jax.weighted_sum(scores, coefficients)`.

Throughout:

- The last axis of a log-probability array is the token, T; the last axis of logits is the
  vocabulary, V. Any leading axes (a batch b, usually) are shared by all arguments.
- A mask is a bool or 0/1 integer array; what is masked out has no influence on values or gradients,
  even where it holds NaN or infinity. The sums and means of nothing are 0.
- Arithmetic is float32 (float64 if an argument is); results have the dtype of the first argument.
- Shapes and dtypes are checked, and so are numbers, unless they are traced. What is wrong is a
  `ValueError` that names the argument.

Example:
  >>> import jax.numpy as jnp
  >>> from proma_jax import policy_gradient as pg
  >>> rewards = jnp.array([[1.0, 0.0], [0.0, 0.0]])  # 2 prompts, 2 responses each
  >>> advantages = pg.group_relative_advantages(rewards, scale_by_std=False).reshape(-1)
  >>> mask = jnp.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
  >>> coefficients = pg.token_mean_coefficients(advantages, total_tokens=mask.sum())
  >>> print(coefficients)
  [-0.0625  0.0625 -0.     -0.    ]
  >>> logprobs = jnp.log(jnp.full((4, 3), 0.5))
  >>> print(f"{pg.reinforce_loss(logprobs, coefficients, mask):.4f}")
  -0.0433
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = [
    "chunked_token_logprobs",
    "cispo_loss",
    "entropy",
    "exact_kl",
    "group_relative_advantages",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "ppo_clip_loss",
    "reinforce_loss",
    "sequence_mean_coefficients",
    "token_logprobs",
    "token_mean_coefficients",
]


def group_relative_advantages(
    rewards: ArrayLike, *, scale_by_std: bool = True, epsilon: float = 1e-6
) -> jax.Array:
    """Rewards relative to their group: (r − mean) / (std + epsilon), as in GRPO.

    A group whose rewards are all equal has advantages of exactly 0.

    Args:
      rewards: (..., n), the n ≥ 2 responses to one prompt along the last axis. Integers and bools
        are taken as float32.
      scale_by_std: divide by the group's sample standard deviation (n − 1 in its denominator, as
        in VeRL and TRL). False leaves rewards centred only, as in Dr. GRPO.
      epsilon: added to the standard deviation; 1e-6 is VeRL's.

    Returns:
      Advantages, shaped like `rewards`.

    Raises:
      ValueError: no last axis of at least 2 rewards, or a negative epsilon.

    Example:
      >>> print(group_relative_advantages(jnp.array([[1, 0, 0, 0], [1, 1, 1, 1]])).round(4))
      [[ 1.5 -0.5 -0.5 -0.5]
       [ 0.   0.   0.   0. ]]
    """
    rewards = jnp.asarray(rewards)
    if rewards.ndim == 0 or rewards.shape[-1] < 2:
        raise ValueError(
            f"rewards must have shape (..., n) with n >= 2 responses per group, got {rewards.shape}"
        )
    _check_number("epsilon", epsilon, lambda x: x >= 0, "at least 0")
    if not jnp.issubdtype(rewards.dtype, jnp.floating):
        rewards = rewards.astype(jnp.float32)
    (r,) = _compute_dtype(rewards)
    size = _safe_power_of_two(jnp.max(jnp.abs(r), axis=-1, keepdims=True))
    r = r / size  # exact, and then no square and no sum overflows
    r = r - r[..., :1]  # equal rewards become exact zeros before any rounding
    advantages = r - jnp.mean(r, axis=-1, keepdims=True)
    if not scale_by_std:
        return (advantages * size).astype(rewards.dtype)
    variance = jnp.sum(advantages**2, axis=-1, keepdims=True) / (r.shape[-1] - 1)
    spread = variance > 0
    std = jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1)), 1)
    return (advantages / (std + epsilon / size)).astype(rewards.dtype)


def _safe_power_of_two(x: jax.Array) -> jax.Array:
    """A power of two that brings x ≥ 0 to where squares are safe; 1 for what is not a number."""
    _, exponent = jnp.frexp(x)
    most = 3 * jnp.finfo(x.dtype).maxexp // 4  # farther out the power's own inverse may be none
    return jnp.ldexp(jnp.ones_like(x), jnp.clip(exponent, -most, most))


def token_mean_coefficients(advantages: ArrayLike, total_tokens: ArrayLike) -> jax.Array:
    """Coefficients −A_i / total_tokens of a loss that is a mean over tokens (DAPO, VeRL's default).

    With a constant in place of the number of tokens they are those of Dr. GRPO.

    Args:
      advantages: (b,), or any shape.
      total_tokens: scalar, the response tokens of the whole mini-batch: of all the microbatches of
        one optimizer step, not only of the one at hand. If it is 0, so are the coefficients.

    Returns:
      Coefficients, shaped like `advantages`.

    Raises:
      ValueError: advantages not floating, or total_tokens not a scalar or negative.

    Example:
      >>> print(token_mean_coefficients(jnp.array([1.0, -1.0]), total_tokens=8))
      [-0.125  0.125]
    """
    advantages = _floating("advantages", advantages)
    _check_number("total_tokens", total_tokens, lambda x: x >= 0, "at least 0")
    a, total = _compute_dtype(advantages, jnp.asarray(total_tokens))
    return _divide(-a, total).astype(advantages.dtype)


def sequence_mean_coefficients(
    advantages: ArrayLike, lengths: ArrayLike, total_sequences: ArrayLike
) -> jax.Array:
    """Coefficients −A_i / (length_i · total_sequences): the mean over sequences of token means.

    This is the loss of the GRPO paper (DeepSeekMath).

    Args:
      advantages: (b,), or any shape.
      lengths: response tokens of each sequence, shaped like `advantages`; where it is 0, so is the
        coefficient.
      total_sequences: scalar, the sequences of the whole mini-batch: of all the microbatches of one
        optimizer step, not only of the one at hand. If it is 0, so are the coefficients.

    Returns:
      Coefficients, shaped like `advantages`.

    Raises:
      ValueError: advantages not floating, lengths of another shape, or total_sequences not a scalar
        or negative.

    Example:
      >>> print(sequence_mean_coefficients(jnp.array([1.0, -1.0]), jnp.array([4, 2]), 2))
      [-0.125  0.25 ]
    """
    advantages = _floating("advantages", advantages)
    lengths = jnp.asarray(lengths)
    _check_shape("lengths", lengths, advantages.shape, "advantages")
    _check_number("total_sequences", total_sequences, lambda x: x >= 0, "at least 0")
    a, n, total = _compute_dtype(advantages, lengths, jnp.asarray(total_sequences))
    return _divide(-a, n * total).astype(advantages.dtype)


def reinforce_loss(logprobs: ArrayLike, coefficients: ArrayLike, mask: ArrayLike) -> jax.Array:
    """The REINFORCE surrogate Σ_i c_i log π(y_i | x_i).

    Args:
      logprobs: (..., T) log-probabilities of the tokens under the policy.
      coefficients: (...,), each sequence's weight in the loss gradient.
      mask: (..., T), the response tokens.

    Returns:
      The loss, a scalar. Its gradient is Σ_i c_i s_i, with s_i the scores.

    Raises:
      ValueError: shapes that do not fit, log-probabilities or coefficients that are not floating.

    Example:
      >>> logprobs, mask = jnp.array([[-1.0, -2.0, -jnp.inf]]), jnp.array([[1, 1, 0]])
      >>> print(reinforce_loss(logprobs, jnp.array([-0.5]), mask))
      1.5
    """
    c = _per_token(coefficients, mask)
    dtype, _, (lp, c) = _masked(mask, logprobs=logprobs, coefficients=c)
    return jnp.sum(c * lp).astype(dtype)


def ppo_clip_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    coefficients: ArrayLike,
    mask: ArrayLike,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> jax.Array:
    """PPO's clipped surrogate, GRPO's loss: Σ max(c_i ρ, c_i clip(ρ, 1 − clip_low, 1 + clip_high)).

    The sum is over tokens and ρ = π / π_old is the token's likelihood ratio. With c_i = −A_i / n
    this is the usual −min(A_i ρ, A_i clip(ρ)) / n.

    Args:
      logprobs: (..., T) log-probabilities of the tokens under the policy.
      old_logprobs: (..., T), the same under the policy that sampled them; a constant, no gradient
        flows through it.
      coefficients: (...,), each sequence's weight in the loss gradient.
      mask: (..., T), the response tokens.
      clip_low: how far below 1 the ratio of a token to be discouraged still counts, in (0, 1];
        0.2 is PPO's and GRPO's.
      clip_high: how far above 1 the ratio of a token to be encouraged still counts, above 0;
        0.2 is PPO's and GRPO's, DAPO takes 0.28.

    Returns:
      The loss, a scalar.

    Raises:
      ValueError: shapes that do not fit, arrays that are not floating, a clip out of range.

    Example:
      >>> old = jnp.log(jnp.array([[0.5, 0.5]]))
      >>> new = jnp.log(jnp.array([[0.75, 0.25]]))  # ratios 1.5, clipped to 1.2, and 0.5
      >>> mask = jnp.array([[True, True]])
      >>> print(f"{ppo_clip_loss(new, old, jnp.array([-1.0]), mask):.2f}")
      -1.70
    """
    _check_number("clip_low", clip_low, lambda x: 0 < x <= 1, "in (0, 1]")
    _check_number("clip_high", clip_high, lambda x: x > 0, "above 0")
    c = _per_token(coefficients, mask)
    dtype, _, (lp, old, c) = _masked(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, coefficients=c
    )
    log_ratio = lp - jax.lax.stop_gradient(old)
    # The maximum picks one bound by the sign of c; in logs no ratio beyond it can overflow.
    log_ratio = jnp.where(
        c <= 0,
        jnp.minimum(log_ratio, jnp.log1p(clip_high)),
        jnp.maximum(log_ratio, jnp.log1p(-clip_low)),
    )
    return jnp.sum(c * jnp.exp(log_ratio)).astype(dtype)


def cispo_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    coefficients: ArrayLike,
    mask: ArrayLike,
    *,
    max_ratio: float = 5.0,
) -> jax.Array:
    """CISPO's surrogate (MiniMax-M1): Σ c_i min(ρ, max_ratio) log π, with the ratio held constant.

    The sum is over tokens and ρ = π / π_old is the token's likelihood ratio. Unlike with PPO's
    clip, no token loses its gradient: only its importance weight is bounded.

    Args:
      logprobs: (..., T) log-probabilities of the tokens under the policy.
      old_logprobs: (..., T), the same under the policy that sampled them.
      coefficients: (...,), each sequence's weight in the loss gradient.
      mask: (..., T), the response tokens.
      max_ratio: bound of the importance weight, above 0; 5.0 is TRL's recommendation, after
        ScaleRL. MiniMax-M1 gives no number.

    Returns:
      The loss, a scalar.

    Raises:
      ValueError: shapes that do not fit, arrays that are not floating, max_ratio not positive.

    Example:
      >>> logprobs = jnp.array([[-1.0, -2.0]])
      >>> print(cispo_loss(logprobs, logprobs, jnp.array([-0.5]), jnp.array([[1, 1]])))
      1.5
    """
    _check_number("max_ratio", max_ratio, lambda x: x > 0, "above 0")
    c = _per_token(coefficients, mask)
    dtype, _, (lp, old, c) = _masked(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, coefficients=c
    )
    weight = jnp.exp(jnp.minimum(lp - old, jnp.log(max_ratio)))
    return jnp.sum(c * jax.lax.stop_gradient(weight) * lp).astype(dtype)


def kl_k1(logprobs: ArrayLike, other_logprobs: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Estimates KL(π ‖ other) per token by the mean of log π − log other: unbiased, any sign.

    k1, k2 and k3 are the estimators of Schulman's "Approximating KL divergence". Their means over
    samples estimate the divergence, their gradients in general do not.

    Args:
      logprobs: (..., T) log-probabilities of the tokens under π, which sampled them.
      other_logprobs: (..., T), the same under the other policy.
      mask: (..., T), the tokens to count.

    Returns:
      The mean over the tokens counted, a scalar, in nats.

    Raises:
      ValueError: shapes that do not fit or log-probabilities that are not floating.

    Example:
      >>> print(kl_k1(jnp.array([-1.0, -2.0]), jnp.array([-1.5, -1.0]), jnp.array([1, 1])))
      -0.25
    """
    dtype, mask, (lp, other) = _masked(mask, logprobs=logprobs, other_logprobs=other_logprobs)
    return _masked_mean(lp - other, mask).astype(dtype)


def kl_k2(logprobs: ArrayLike, other_logprobs: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Estimates KL(π ‖ other) per token by the mean of ½ (log π − log other)²: biased, ≥ 0.

    Arguments, result and errors are those of `kl_k1`.

    Example:
      >>> print(kl_k2(jnp.array([-1.0, -2.0]), jnp.array([-1.5, -1.0]), jnp.array([1, 1])))
      0.3125
    """
    dtype, mask, (lp, other) = _masked(mask, logprobs=logprobs, other_logprobs=other_logprobs)
    return _masked_mean(0.5 * (lp - other) ** 2, mask).astype(dtype)


def kl_k3(logprobs: ArrayLike, other_logprobs: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Estimates KL(π ‖ other) per token by the mean of ρ − 1 − log ρ, ρ = other / π: unbiased, ≥ 0.

    Arguments, result and errors are those of `kl_k1`.

    Example:
      >>> logprobs, other = jnp.log(jnp.array([0.25])), jnp.log(jnp.array([0.5]))
      >>> print(f"{kl_k3(logprobs, other, jnp.array([1])):.4f}")
      0.3069
    """
    dtype, mask, (lp, other) = _masked(mask, logprobs=logprobs, other_logprobs=other_logprobs)
    return _masked_mean(_expm1_minus(other - lp), mask).astype(dtype)


def token_logprobs(logits: ArrayLike, tokens: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Log-probabilities of the tokens, 0 where masked out.

    Args:
      logits: (..., T, V); position t holds the logits that predict `tokens` at t, so a language
        model's outputs are already shifted by one. -inf rules a token out.
      tokens: (..., T) integers in [0, V); anything where masked out.
      mask: (..., T), the response tokens.

    Returns:
      Log-probabilities (..., T).

    Raises:
      ValueError: shapes that do not fit, logits not floating, tokens not integers.

    Example:
      >>> logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
      >>> print(token_logprobs(logits, jnp.array([1, -100]), jnp.array([1, 0])).round(4))
      [-0.2877  0.    ]
    """
    dtype, mask, (z,) = _masked(mask, extra_axes=1, logits=logits)
    tokens = jnp.asarray(tokens)
    _check_shape("tokens", tokens, mask.shape, "mask")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    chosen = jnp.take_along_axis(z, jnp.where(mask, tokens, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(mask, chosen - jax.nn.logsumexp(z, axis=-1), 0).astype(dtype)


def chunked_token_logprobs(
    hidden: ArrayLike,
    head: ArrayLike,
    tokens: ArrayLike,
    mask: ArrayLike,
    *,
    chunk_size: int = 512,
) -> jax.Array:
    """`token_logprobs` of `hidden @ head`, without the logits of all tokens at once.

    The logits of a long sequence over a large vocabulary are the largest array of a step. Here they
    are made for some tokens at a time, and again in the backward pass. `sequence_scores` sees one
    use of the head, of as many tokens; in `accumulated_gradient` a head that is not projected, a
    tied table for one, is added to chunk by chunk, so that nothing holds all gradients of logits.

    Args:
      hidden: (..., T, d), what the head is applied to, already shifted as for `token_logprobs`.
      head: (d, V).
      tokens: (..., T) integers in [0, V); anything where masked out.
      mask: (..., T), the response tokens.
      chunk_size: how many tokens' logits are made at a time. Default: 512.

    Returns:
      Log-probabilities (..., T), 0 where masked out.

    Raises:
      ValueError: as `token_logprobs`; hidden and head do not fit; chunk_size is not at least 1.

    Example:
      >>> hidden, head = jnp.eye(2), jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
      >>> tokens, mask = jnp.array([1, 0]), jnp.array([1, 0])
      >>> print(chunked_token_logprobs(hidden, head, tokens, mask, chunk_size=1).round(4))
      [-0.2877  0.    ]
    """
    hidden, head = _floating("hidden", hidden), _floating("head", head)
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    if hidden.ndim < 2 or head.ndim != 2 or hidden.shape[-1] != head.shape[0]:
        raise ValueError(
            "hidden must have shape (..., T, d) and head (d, V), got "
            f"hidden {hidden.shape} and head {head.shape}"
        )
    _check_shape("mask", mask, hidden.shape[:-1], "hidden without its last axis")
    _check_shape("tokens", tokens, mask.shape, "mask")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer of at least 1, got {chunk_size!r}")
    axis, length = mask.ndim - 1, mask.shape[-1]

    def in_chunks(x: jax.Array) -> jax.Array:
        """(chunks, ..., chunk_size, ...), with zeros behind the last token."""
        pads = [(0, -length % chunk_size if i == axis else 0) for i in range(x.ndim)]
        num_chunks = -(-length // chunk_size)
        shape = *x.shape[:axis], num_chunks, chunk_size, *x.shape[axis + 1 :]
        x = jnp.pad(x, pads).reshape(shape)
        return jnp.moveaxis(x, axis, 0)

    @jax.checkpoint
    def of_chunk(head: jax.Array, chunk: tuple[jax.Array, ...]) -> jax.Array:
        hidden, tokens, mask = chunk
        hidden = jnp.where(mask[..., None].astype(bool), hidden, 0)
        return token_logprobs(hidden @ head, tokens, mask)

    chunks = tuple(map(in_chunks, (hidden, tokens, mask)))
    logprobs = jax.lax.map(lambda chunk: of_chunk(head, chunk), chunks)
    logprobs = jnp.moveaxis(logprobs, 0, axis)
    return logprobs.reshape(*mask.shape[:-1], -1)[..., :length]


def exact_kl(logits: ArrayLike, other_logits: ArrayLike, mask: ArrayLike) -> jax.Array:
    """The exact KL(π ‖ other) over the whole vocabulary, a mean over positions.

    It is computed so that a small divergence between close distributions keeps its digits: in
    float32, Σ π (log π − log other) is 2 % off at 5e-7 and can be negative below.

    Args:
      logits: (..., T, V) of π. -inf rules a token out.
      other_logits: (..., T, V) of the other policy. What it rules out and π does not makes the
        divergence infinite.
      mask: (..., T), the positions to count.

    Returns:
      The mean over the positions counted, a scalar ≥ 0, in nats.

    Raises:
      ValueError: shapes that do not fit or logits that are not floating.

    Example:
      >>> p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
      >>> print(f"{exact_kl(p, q, jnp.array([True])):.4f}")
      0.1438
    """
    dtype, mask, (z, other) = _masked(mask, extra_axes=1, logits=logits, other_logits=other_logits)
    log_p, log_q = jax.nn.log_softmax(z), jax.nn.log_softmax(other)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    log_ratio = jnp.where(p > 0, log_q, 0) - jnp.where(p > 0, log_p, 0)
    # Since Σ q − Σ p = 0, the divergence is Σ p (ρ − 1 − log ρ), ρ = q / p, whose terms are ≥ 0.
    close = (p > 0) & (jnp.abs(log_ratio) < 1)
    terms = jnp.where(
        close,
        p * _expm1_minus(jnp.where(close, log_ratio, 0)),
        q - p - p * log_ratio,
    )
    return _masked_mean(jnp.sum(terms, axis=-1), mask).astype(dtype)


def entropy(logits: ArrayLike, mask: ArrayLike) -> jax.Array:
    """The exact entropy −Σ π log π over the whole vocabulary, a mean over positions.

    Args:
      logits: (..., T, V). -inf rules a token out.
      mask: (..., T), the positions to count.

    Returns:
      The mean over the positions counted, a scalar ≥ 0, in nats.

    Raises:
      ValueError: shapes that do not fit or logits that are not floating.

    Example:
      >>> print(f"{entropy(jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.array([True])):.4f}")
      0.6931
    """
    dtype, mask, (z,) = _masked(mask, extra_axes=1, logits=logits)
    log_p = jax.nn.log_softmax(z)
    p = jnp.exp(log_p)
    terms = -p * jnp.where(p > 0, log_p, 0)
    return _masked_mean(jnp.sum(terms, axis=-1), mask).astype(dtype)


def _expm1_minus(x: jax.Array) -> jax.Array:
    """exp(x) − 1 − x."""
    return jnp.expm1(x) - x


def _divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient, 0 where the denominator is 0."""
    nonzero = denominator != 0
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1), 0)


def _masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    return _divide(jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask, dtype=values.dtype))


def _compute_dtype(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays in float32, or in float64 if one of them is."""
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32
    return tuple(x.astype(dtype) for x in arrays)


def _per_token(coefficients: ArrayLike, mask: ArrayLike) -> jax.Array:
    """Coefficients (...,) repeated along the mask's token axis."""
    coefficients, shape = jnp.asarray(coefficients), jnp.asarray(mask).shape
    _check_shape("coefficients", coefficients, shape[:-1], "mask without its token axis")
    return jnp.broadcast_to(coefficients[..., None], shape)


def _masked(
    mask: ArrayLike, *, extra_axes: int = 0, **arrays: ArrayLike
) -> tuple[jnp.dtype, jax.Array, list[jax.Array]]:
    """Puts 0 wherever the mask does, so that nothing there reaches a value or a gradient.

    Args:
      mask: (..., T).
      extra_axes: the axes that the arrays have beyond the mask's: 1 for logits.
      **arrays: floating arrays of one shape, by name.

    Returns:
      The dtype of the first array, the mask as bools, and the masked arrays in the dtype to
      compute in.
    """
    mask = jnp.asarray(mask)
    if not (mask.dtype == jnp.bool_ or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise ValueError(f"mask must be bool or 0/1 integers, got {mask.dtype}: pass mask > 0")
    if mask.ndim == 0:
        raise ValueError("mask must have a token axis, got a scalar")
    checked = [_floating(name, x) for name, x in arrays.items()]
    first_name, first = next(iter(arrays)), checked[0]
    if first.ndim != mask.ndim + extra_axes:
        axes = "(..., T, V)" if extra_axes else "(..., T)"
        raise ValueError(
            f"{first_name} must have shape {axes} for a mask (..., T), got {first_name} "
            f"{first.shape} and mask {mask.shape}"
        )
    _check_shape("mask", mask, first.shape[: mask.ndim], first_name)
    for name, x in zip(arrays, checked, strict=True):
        _check_shape(name, x, first.shape, first_name)
    mask = mask.astype(bool)
    where = mask.reshape(mask.shape + (1,) * extra_axes)
    return first.dtype, mask, [jnp.where(where, x, 0) for x in _compute_dtype(*checked)]


def _floating(name: str, x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got {x.dtype}: cast it first")
    return x


def _check_shape(name: str, x: jax.Array, expected: tuple[int, ...], reference: str) -> None:
    if x.shape != expected:
        raise ValueError(
            f"{name} has shape {x.shape}, but {reference} calls for {expected}: they must agree"
        )


def _check_number(
    name: str, value: ArrayLike, holds: Callable[[Any], bool], requirement: str
) -> None:
    """Checks that a number is a scalar and, unless it is traced, within its range."""
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}")
    if not isinstance(value, jax.core.Tracer) and not holds(value):
        raise ValueError(f"{name} must be {requirement}, got {value}")
