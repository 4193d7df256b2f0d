"""Invariant 6 of docs/architecture.md:
padding is never read, and more of it changes no prediction.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from detrellis.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detrellis.detector import padded_to_multiple
from detrellis.nn.hybrid import HybridNeck
from detrellis.nn.neck import MultiScaleNeck, SingleScaleNeck
from detrellis.nn.projector import Projector
from detrellis.nn.pyramid import PyramidNeck
from detrellis.nn.spatial import AnchorPosition
from detrellis.training import TrainableDetector
from detrellis.types import ImageBatch, MaskFeatures, Memory, Queries, Spatial

from ..small import images, small
from .models import every_detector, make, maps_for_neck, predict, with_mask_features

# Stacks of two that do the same work
pytestmark = pytest.mark.filterwarnings("ignore::detrellis.errors.Advice")


class KeptInside(nn.Module):
    """Semantic attention reads whole regions, and what RoIAlign finds there beyond the image's
    edge, padding or nothing at all, as its reference code does. Here they end at the centres of the
    outermost cells, so that the rest can be shown to be independent."""

    def __init__(self, position: nn.Module) -> None:
        super().__init__()
        self.position = position

    def forward(
        self, layer: int, x: Tensor, queries: Queries, boxes: Tensor, memory: Memory
    ) -> Spatial:
        where: Spatial = self.position(layer, x, queries, boxes, memory)
        assert where.references is not None
        # The smallest map below has two cells of image
        inside = cxcywh_to_xyxy(where.references).clamp(0.25, 0.75)
        return where._replace(references=xyxy_to_cxcywh(inside))


def keep_inside(model: TrainableDetector, name: str) -> None:
    decoder = model.detector.decoder
    if small(name).detector.cross_attention.kind == "semantic":
        decoder.position = KeptInside(decoder.position)


@every_detector
@torch.no_grad()
def test_what_stands_in_padding_is_never_read(name: str) -> None:
    model = make(name).eval()
    keep_inside(model, name)
    batch = images(((64, 96), (48, 64)))
    memory = model.detector.neck(maps_for_neck(model.detector, batch.pixels), batch.padding)
    memory = with_mask_features(model.detector, memory, batch)
    assert memory.padding is not None
    dirty = memory._replace(tokens=memory.tokens + 100 * memory.padding.unsqueeze(-1))
    outputs = [predict(model, m) for m in (memory, dirty)]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=0)


class WithoutRatios(nn.Module):
    """DINO's query position reads boxes relative to the padded image, as its reference code does:
    the one place where the amount of padding enters the transformer. Taken out here, so that the
    rest can be shown to be independent."""

    def __init__(self, position: nn.Module) -> None:
        super().__init__()
        self.position = position

    def forward(
        self, layer: int, x: Tensor, queries: Queries, boxes: Tensor, memory: Memory
    ) -> Spatial:
        out: Spatial = self.position(layer, x, queries, boxes, memory._replace(valid_ratios=None))
        return out


@every_detector
@torch.no_grad()
def test_padding_further_changes_no_prediction(name: str) -> None:
    """From the projected maps on:
    convolutions and GroupNorm before them see padding, as in the reference codes.
    """
    model = make(name).double().eval()
    decoder = model.detector.decoder
    if isinstance(decoder.position, AnchorPosition):
        decoder.position = WithoutRatios(decoder.position)
    keep_inside(model, name)
    batch = images(((128, 128), (128, 64)))
    neck, maps = model.detector.neck, maps_for_neck(model.detector, batch.pixels.double())
    if isinstance(neck, PyramidNeck):
        neck, maps = neck.neck, neck.pyramid(maps[-1])
    assert isinstance(neck, MultiScaleNeck | SingleScaleNeck | HybridNeck | Projector)
    levels = neck.project(maps)
    assert batch.padding is not None
    plain = with_mask_features(model.detector, neck.flatten(levels, batch.padding), batch)
    grown = [nn.functional.pad(m, (0, m.shape[3], 0, m.shape[2]), value=7.0) for m in levels]
    further = neck.flatten(grown, nn.functional.pad(batch.padding, (0, 128, 0, 128), value=True))
    if plain.masks is not None:
        map_, hidden = nn.functional.pad(plain.masks.map, (0, 32, 0, 32)), plain.masks.padding
        assert hidden is not None
        hidden = nn.functional.pad(hidden, (0, 128, 0, 128), value=True)
        further = further._replace(masks=MaskFeatures(map_, (256, 256), hidden))
    torch.testing.assert_close(predict(model, plain), predict(model, further), atol=1e-5, rtol=0)


@torch.no_grad()
def test_parts_of_cells_are_padded_to_whole_ones() -> None:
    detector = make("tiny").eval().detector
    assert detector.size_divisor == 32
    for sizes in (((70, 90), (70, 90)), ((70, 64), (33, 90))):
        given = images(sizes)
        by_hand = images((*sizes, (96, 96)))
        assert by_hand.padding is not None
        expected = detector(ImageBatch(by_hand.pixels[:2], by_hand.padding[:2]))
        output = detector(given)
        assert torch.equal(output.boxes, expected.boxes)
        assert torch.equal(output.logits, expected.logits)
        assert padded_to_multiple(given, 1) is given
    whole = images(((64, 96), (64, 96)))
    assert padded_to_multiple(whole, 32) is whole
