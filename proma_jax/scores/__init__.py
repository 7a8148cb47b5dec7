"""Scores of parameter leaves: their classes, and how they stand beside updates."""
