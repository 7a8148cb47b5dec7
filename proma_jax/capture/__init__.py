"""Scores from any JAX function: `sequence_scores`, and what tells about them.

api.py has what users call, and checks.py what is checked first. search.py finds the uses of each
parameter in a traced program; access.py says what one of them reads, and layout.py how the scores
of a leaf are laid out, from all its uses. taps.py and program.py run the program again so that its
backward pass reports their factors, which reading.py and factors.py put together. pieces.py says
what a variable holds of a parameter, and known.py which numbers are known while a program is
traced. The modules with an underscore read JAX's programs.
"""

from proma_jax.capture.api import check_scores, describe_scores, sequence_scores

__all__ = ["check_scores", "describe_scores", "sequence_scores"]
