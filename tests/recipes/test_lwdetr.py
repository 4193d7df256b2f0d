"""LW-DETR's and RF-DETR's recipes have the published numbers of parameters."""

from __future__ import annotations

import pytest
import torch

from detrellis.recipes import find_recipe
from detrellis.recipes.backbones import WindowViTConfig
from detrellis.recipes.build import build

# Of the detector for 91 classes in transformers, and published in millions, with the 13 groups of
# training.
COUNTS = {
    "lwdetr-tiny": (9072366, 12.1),
    "lwdetr-small": (10953742, 14.6),
    "lwdetr-medium": (24633742, 28.2),
    "lwdetr-large": (39656494, 46.8),
    "rfdetr-nano": (26863278, 30.5),
    "rfdetr-small": (28507150, 32.1),
    "rfdetr-medium": (30083438, 33.7),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name: str) -> None:
    recipe = find_recipe(name).untrained()
    backbone = recipe.detector.backbone
    assert isinstance(backbone, WindowViTConfig)
    with torch.device("meta"):
        model = build(recipe, 91)
    count = sum(p.numel() for p in model.detector.parameters())
    if backbone.style == "cae":  # its keys have no bias
        count -= max(backbone.taps) * backbone.width
    inference, published = COUNTS[name]
    assert count == inference
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(published, rel=0.01)
