"""How many objects of an image a recipe's detector can learn and find."""

from __future__ import annotations

from detrellis.data.doctor.boxes import Capacity
from detrellis.recipes.config import Recipe


def capacity(recipe: Recipe) -> Capacity:
    """The capacity of a recipe's detector, with which the doctor compares the fullest image."""
    detector, align = recipe.detector, recipe.schemes.align
    patterns = max(detector.queries.patterns, 1)
    each = 1 if align is None else align.k
    return Capacity(detector.queries.count * patterns, detector.top_k, each, patterns)
