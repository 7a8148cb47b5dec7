"""Proximal policy updates for JAX without a reference policy: PROMA as optax transformations."""

from proma_jax import policy_gradient

__all__ = ["policy_gradient"]
