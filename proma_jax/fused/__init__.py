"""PROMA inside the backward pass: `accumulated_gradient`, for large, scanned or remat models.

api.py is what users call, with the scan over the microbatches; plan.py says how each leaf's
gradient is made; slots.py which part of a leaf's total is made where; nodes.py what is put into the
program.
"""

from proma_jax.fused.api import GradientMetrics, accumulated_gradient

__all__ = ["GradientMetrics", "accumulated_gradient"]
