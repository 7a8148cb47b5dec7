"""Proximal policy updates for JAX without a reference policy: PROMA as optax transformations."""

from proma_jax import policy_gradient
from proma_jax.capture import check_scores, describe_scores, sequence_scores
from proma_jax.scores import DenseScores, LayerFactors, LookupFactors, weighted_sum

__all__ = [
    "DenseScores",
    "LayerFactors",
    "LookupFactors",
    "check_scores",
    "describe_scores",
    "policy_gradient",
    "sequence_scores",
    "weighted_sum",
]
