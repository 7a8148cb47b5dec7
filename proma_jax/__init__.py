"""Proximal policy updates for JAX without a reference policy: PROMA as optax transformations."""

from proma_jax import policy_gradient
from proma_jax._mesh.scores import SpreadScores
from proma_jax.accumulation import AccumulateState, accumulate, has_updated
from proma_jax.capture import check_scores, describe_scores, sequence_scores
from proma_jax.checkpoints import check_restorable
from proma_jax.fused import GradientMetrics, accumulated_gradient
from proma_jax.intra import ProjectIntraState, project_intra
from proma_jax.scores.leaf import View
from proma_jax.scores.leaves import DenseScores, LayerFactors
from proma_jax.scores.match import weighted_sum
from proma_jax.scores.tables import LookupFactors, SumScores
from proma_jax.settings import Accumulation, Intra

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
