"""What a recipe costs: parameters, multiply-adds,
and what its training schemes add while training.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from detrellis.engine.multiply_adds import MultiplyAdds
from detrellis.nn.undrawn import Undrawn
from detrellis.recipes.build import build
from detrellis.recipes.config import Recipe
from detrellis.types import ImageBatch


@dataclass(frozen=True)
class SchemeCost:
    """What one training scheme adds to a recipe, in training only."""

    name: str
    parameters: int
    queries: int  # at most, for each image


@dataclass(frozen=True)
class RecipeInfo:
    """Sizes of a recipe's detector and of its training schemes."""

    recipe: str
    about: str
    classes: int
    parameters: int
    parameters_backbone: int  # without the neck, and a pyramid in it
    parameters_trainable: int
    gflops: float  # 10^9 multiply-adds of one image of `image_size`, as the papers count them
    image_size: tuple[int, int]  # height, width
    queries: int
    schemes: tuple[SchemeCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """The sizes as JSON holds them."""
        return asdict(self)


def count(module: nn.Module, *, trainable: bool = False) -> int:
    """The parameters of a module.
    A frozen BatchNorm's are buffers, and do not count, as in the papers.
    """
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def image_size(recipe: Recipe) -> tuple[int, int]:
    """Height and width of the recipe's largest evaluation image, in landscape."""
    size = recipe.data.size
    if not isinstance(size, int):
        return size
    return size, recipe.data.max_side or round(size * 1333 / 800)


def measure(recipe: Recipe, classes: int) -> RecipeInfo:
    """Build the recipe without memory for weights, on torch's meta device, and count."""
    with torch.device("meta"), Undrawn():
        model = build(recipe.untrained(), classes)
    detector = model.detector.eval()
    trainable = count(detector, trainable=True)
    detector.requires_grad_(False)  # the counter would follow gradients
    height, width = image_size(recipe)
    with MultiplyAdds() as counter, torch.no_grad():
        detector(ImageBatch(torch.empty(1, 3, height, width, device="meta")))
    costs = [SchemeCost(s.name, count(s), s.extra_queries) for s in model.training_schemes]
    return RecipeInfo(
        recipe.name,
        recipe.about,
        classes,
        count(detector),
        count(detector.backbone),
        trainable,
        round(counter.total / 2 / 1e9, 2),
        (height, width),
        recipe.detector.queries.count,
        tuple(costs),
    )
