"""The real-time recipes have the parameters of transformers' detectors, and cost what
docs/detectors.md says.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from detrellis.engine.multiply_adds import MultiplyAdds
from detrellis.nn.undrawn import Undrawn
from detrellis.recipes import find_recipe
from detrellis.recipes.backbones import WindowViTConfig
from detrellis.recipes.build import build
from detrellis.training import TrainableDetector
from detrellis.types import ImageBatch

# Of the detector in transformers (frozen norms too, no table of denoising); and published, in
# millions, with what only training has
COUNTS = {
    "rtdetr-r18": (20163728, 20),
    "rtdetr-r34": (31420932, 31),
    "rtdetr-r50": (42923884, 42),
    "rtdetr-r101": (76641004, 76),
    "rtdetrv2-r18": (20163728, 20),
    "dfine-n": (3772323, 4),
    "dfine-s": (10301139, 10),
    "dfine-m": (19569326, 19),
    "dfine-l": (31269110, 31),
    "dfine-x": (62694742, 62),
    "lwdetr-tiny": (9072366, 12.1),
    "lwdetr-small": (10953742, 14.6),
    "lwdetr-medium": (24633742, 28.2),
    "lwdetr-large": (39656494, 46.8),
    "rfdetr-nano": (26863278, 30.5),
    "rfdetr-small": (28507150, 32.1),
    "rfdetr-medium": (30083438, 33.7),
}
# Of one image, fused, two a multiply-add: ours exactly, and published; RF-DETR's authors give none
GFLOPS = {
    "rtdetr-r18": (58.4, 60),
    "rtdetr-r50": (131.7, 136),
    "dfine-s": (25.5, 25),
    "lwdetr-tiny": (20.9, 2 * 11.2),
    "lwdetr-large": (133.2, 2 * 71.6),
    "rfdetr-nano": (31.8, None),
}


@cache
def built(name: str) -> TrainableDetector:
    """Without memory for weights, for as many classes as published."""
    classes = 91 if name.startswith(("lw", "rf")) else 80
    with torch.device("meta"), Undrawn():
        return build(find_recipe(name).untrained(), classes)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name: str) -> None:
    model, backbone = built(name), find_recipe(name).detector.backbone
    count = sum(p.numel() for p in model.detector.parameters())
    count += sum(
        b.numel() for key, b in model.detector.named_buffers() if key.endswith((".weight", ".bias"))
    )
    if isinstance(backbone, WindowViTConfig) and backbone.style == "cae":  # its keys have no bias
        count -= max(backbone.taps) * backbone.width
    inference, published = COUNTS[name]
    assert count == inference
    trained = sum(p.numel() for p in model.parameters()) / 1e6
    whole = isinstance(published, int)  # and rounded either way
    assert trained == pytest.approx(published, **({"abs": 1} if whole else {"rel": 0.01}))


@pytest.mark.parametrize("name", ["lwdetr-tiny", "lwdetr-large", "rfdetr-nano"])
def test_what_of_the_vit_goes_without_weight_decay_as_published(name: str) -> None:
    """By the rules of the released codes, on the names that the parameters have there."""
    model, optim = built(name), find_recipe(name).optim
    vit = "detector.backbone."
    for key, _ in model.named_parameters():
        theirs = key.removeprefix(vit).replace("positions", "pos_embed")
        if name.startswith("rf"):
            theirs = theirs.replace("embedding.", "embeddings.").replace("gamma", "lambda1")
        rule = ("gamma", "pos_embed", "bias", "norm", "embeddings")
        expected = key.startswith(vit) and any(part in theirs for part in rule)
        assert any(part in key for part in optim.undecayed) == expected, key


def test_rfdetr_averages_as_published() -> None:
    optim = find_recipe("rfdetr-nano").optim
    assert (optim.ema, optim.ema_ramp) == (0.993, 100)


@pytest.mark.parametrize("name", GFLOPS)
def test_gflops(name: str) -> None:
    detector, size = built(name).detector.fused(), find_recipe(name).data.size
    assert not isinstance(size, int)
    with MultiplyAdds() as counter, torch.no_grad():
        detector(ImageBatch(torch.empty(1, 3, *size, device="meta")))
    ours, published = GFLOPS[name]
    assert counter.total / 1e9 == pytest.approx(ours, abs=0.05)
    assert published is None or ours == pytest.approx(published, rel=0.075)
