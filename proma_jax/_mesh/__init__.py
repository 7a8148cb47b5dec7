"""Meshes: the only folder that names one, or how an array is spread over it."""
