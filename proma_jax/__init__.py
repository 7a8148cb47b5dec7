"""Proximal policy updates for JAX without a reference policy: PROMA as optax transformations."""

from proma_jax import policy_gradient
from proma_jax.accumulation import AccumulateState, accumulate, has_updated
from proma_jax.capture import check_scores, describe_scores, sequence_scores
from proma_jax.checkpoints import check_restorable
from proma_jax.fused import GradientMetrics, accumulated_gradient
from proma_jax.intra import ProjectIntraState, project_intra
from proma_jax.match import weighted_sum
from proma_jax.scores import (
    DenseScores,
    LayerFactors,
    LookupFactors,
    SumScores,
    View,
)
from proma_jax.settings import Accumulation, Intra
from proma_jax.spread import SpreadScores

__all__ = [
    "AccumulateState",
    "Accumulation",
    "DenseScores",
    "GradientMetrics",
    "Intra",
    "LayerFactors",
    "LookupFactors",
    "ProjectIntraState",
    "SpreadScores",
    "SumScores",
    "View",
    "accumulate",
    "accumulated_gradient",
    "check_restorable",
    "check_scores",
    "describe_scores",
    "has_updated",
    "policy_gradient",
    "project_intra",
    "sequence_scores",
    "weighted_sum",
]
