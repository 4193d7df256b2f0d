"""What a detector gives at inference, besides the invariants."""

from __future__ import annotations

import pytest
import torch

from detrellis.types import ImageBatch

from ..small import CLASSES, images
from .models import compare, decoded, every_detector, make

# Stacks of two that do the same work
pytestmark = pytest.mark.filterwarnings("ignore::detrellis.errors.Advice")


@every_detector
@torch.no_grad()
def test_inference_is_the_last_layer_of_training(name: str) -> None:
    model = make(name).double().eval()
    batch = ImageBatch(images().pixels.double())
    last = model.detector(batch)
    assert last.logits.shape[0] == 1
    every = decoded(model.detector, model.detector.encode(batch))
    assert len(every.logits) > 1
    compare(last, every.map(lambda t: t[-1:]))


@every_detector
@torch.no_grad()
def test_detections_are_in_pixels_of_the_original(name: str) -> None:
    model = make(name).eval()
    sizes = torch.tensor([[640, 960], [320, 480]])
    found = model.detector.detect(images(), sizes)
    larger, smaller = (
        d.boxes
        for d in model.detector.detect(ImageBatch(images().pixels[:1].repeat(2, 1, 1, 1)), sizes)
    )
    rule = model.detector.postprocess
    # Boxes around pixels, which come in whole numbers; what has no pixel is dropped
    if rule.boxes_of_masks:
        assert all(
            (d.boxes <= s.flip(0).repeat(2)).all() for d, s in zip(found, sizes, strict=True)
        )
        assert all(0 < len(d.scores) == len(d.masks or ()) <= 20 for d in found)
        return
    torch.testing.assert_close(larger, smaller * 2, atol=1e-2, rtol=1e-4)
    for d in found:
        # One class a query, or several; soft-NMS looks at as many pairs as there are queries.
        few = rule.softmax or rule.soft_nms is not None
        assert d.scores.shape == (12 if few else 20,)
        assert (d.scores.diff() <= 0).all()
        assert d.labels.max() < CLASSES
