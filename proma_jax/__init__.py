"""Proximal policy updates for JAX without a reference policy: PROMA as optax transformations."""
