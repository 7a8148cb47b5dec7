"""Where Tunix's GRPO loss is a weighted sum of sequence log-probabilities, and its weights.

On-policy and without a KL term all likelihood ratios are one, so that the gradient of a token's
loss is −advantage times that of its log-probability, and the loss is a sum over tokens with one
weight for each sequence. Then the scores give the gradient, and the loss needs no backward pass.
"""

from typing import Any

import jax
import jax.numpy as jnp
from tunix.rl import common
from tunix.rl.grpo import grpo_learner

ONE_WEIGHT_PER_SEQUENCE = (
    "token-mean",
    "sequence-mean-token-mean",
    "sequence-mean-token-scale",
    "seq-mean-token-sum",
    "sequence-mean-token-sum-norm",
)


def is_weighted_sum(loss_fn: Any, algo_config: Any, example: Any) -> bool:
    """Whether a learner's loss is such a sum on this microbatch."""
    epsilon = algo_config.epsilon
    upper = getattr(algo_config, "epsilon_high", epsilon)
    dual = getattr(algo_config, "epsilon_c", None)
    return (
        loss_fn.__module__ == grpo_learner.__name__
        and algo_config.policy_loss_fn == "grpo"
        and algo_config.loss_algo == "grpo"
        and algo_config.loss_agg_mode in ONE_WEIGHT_PER_SEQUENCE
        and (not algo_config.beta or example.ref_per_token_logps is None)
        and min(epsilon, upper) > 0
        and (dual is None or dual > 1)
        and example.old_per_token_logps is None
        and example.sampler_is_weights is None
        and example.advantages.ndim == 1
    )


def coefficients(algo_config: Any, example: Any) -> jax.Array:
    """(b,) float32, the weights: the gradient of the loss is the sum of them times the scores."""
    mask = example.completion_mask
    token_losses = jnp.zeros(mask.shape, jnp.float32)
    weights = jax.grad(common.aggregate_loss)(token_losses, mask, algo_config.loss_agg_mode)
    return -example.advantages.astype(jnp.float32) * jnp.max(weights, axis=-1)
