"""`--epochs auto`: the length of a run from the size of its data set.

What a small set needs is a number of optimizer steps, not of epochs: `tiny` on 205 pictures in
batches of 8 is level after 40 epochs, 1,040 steps (docs/experiments/tiny.md). So a run gets as many
epochs as make `STEPS`. A tiny set would be seen too often, a large one too seldom: never more than
`MOST` epochs, never fewer than `FEWEST`, the papers' short schedule, and all that a set of more
than 1,300 pictures gets in such batches.
"""

from __future__ import annotations

from detrellis.recipes.config import Recipe

STEPS = 1000
FEWEST, MOST = 12, 100  # epochs


def auto_epochs(recipe: Recipe, images: int) -> int:
    """Epochs for a recipe on so many training images."""
    return min(max(-(-STEPS // recipe.optim.steps(images)), FEWEST), MOST)


def describe_auto(recipe: Recipe, images: int) -> str:
    """What `auto` became and why, in words; `recipe` has its length already."""
    epochs, steps = recipe.schedule.epochs, recipe.optim.steps(images)
    return (
        f"--epochs auto: {epochs} epochs of {steps} steps, {epochs * steps:,} in all "
        f"({STEPS:,} steps, but from {FEWEST} to {MOST} epochs)"
    )
