"""Masks of detections: drawn a few at a time, packed, and ranked with their boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from detrellis import masks
from detrellis.masks import draw_masks, tight_boxes
from detrellis.postprocess import Postprocess
from detrellis.rle import decode, encode
from detrellis.types import DecoderOutput, MaskFeatures

SIZES = torch.tensor([[40, 60], [33, 20]])
PADDED = (32, 48)


def output_of(queries: int = 6, classes: int = 3) -> DecoderOutput:
    """Two images, the second padded, whose features are smooth enough for masks with an inside."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.nn.functional.avg_pool2d(torch.randn(2, 4, 10, 14, generator=generator), 3, 1) * 4
    padding = torch.zeros(2, *PADDED, dtype=torch.bool)
    padding[1, 25:] = padding[1, :, 15:] = True
    logits, boxes, embeds = (torch.randn(1, 2, queries, n, generator=generator) for n in (classes, 4, 4))
    return DecoderOutput(logits, boxes.sigmoid(), logits, mask_embeds=embeds, masks=MaskFeatures(maps, PADDED, padding))


def test_run_lengths_are_cocos() -> None:
    mask = np.random.default_rng(0).random((9, 13)) < 0.4
    assert encode(mask) == coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    assert np.array_equal(decode(encode(mask), (9, 13)), mask)


def test_boxes_are_tight() -> None:
    drawn = torch.zeros(3, 8, 9, dtype=torch.bool)
    drawn[0, 2, 3] = drawn[2, 7, 0] = drawn[2, 0, 8] = True
    assert tight_boxes(drawn).tolist() == [[3, 2, 4, 3], [0, 0, 0, 0], [0, 0, 9, 8]]
    assert tight_boxes(drawn[:0]).shape == (0, 4)


def test_a_few_at_a_time_or_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    output = output_of()
    assert output.mask_embeds is not None
    assert output.masks is not None
    arguments = (output.mask_embeds[0, 0], output.masks.map[0], PADDED, PADDED, (40, 60))
    together, sizes = draw_masks(*arguments), []
    packed = masks._packed
    monkeypatch.setattr(masks, "_packed", lambda logits: sizes.append(len(logits)) or packed(logits))
    monkeypatch.setattr(masks, "AT_ONCE", 2 * 40 * 60)
    apart = draw_masks(*arguments)
    assert sizes == [2, 2, 2]
    assert apart.runs == together.runs
    assert torch.equal(apart.boxes, together.boxes)
    assert draw_masks(output.mask_embeds[0, 0, :0], *arguments[1:]).runs == ()


def test_a_box_detector_keeps_its_boxes() -> None:
    """Masks change the order and, where asked, the scores; suppression is what it is without masks."""
    output = output_of()
    bare = output._replace(mask_embeds=None, masks=None)
    for options in ({}, {"nms": 0.4}, {"soft_nms": 0.4}):
        plain = Postprocess(8, **options)(bare, SIZES)
        kept = Postprocess(8, mask_scores=False, **options)(output, SIZES)
        for one, other, size in zip(plain, kept, SIZES.tolist(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
            assert other.masks is not None
            assert len(other.masks) == len(other.scores)
            assert all(decode(runs, tuple(size)).shape == tuple(size) for runs in other.masks)
        weighed = Postprocess(8, **options)(output, SIZES)
        for one, other in zip(plain, weighed, strict=True):
            assert (other.scores <= one.scores.max()).all()
            assert (other.scores.diff() <= 0).all()
            assert sorted(map(tuple, one.boxes.tolist())) == sorted(map(tuple, other.boxes.tolist()))


def test_suppression_reads_the_boxes_of_masks() -> None:
    output = output_of()
    postprocess = Postprocess(18, boxes_of_masks=True)
    every, kept = postprocess(output, SIZES)[0], Postprocess(18, boxes_of_masks=True, nms=0.5)(output, SIZES)[0]
    assert 0 < len(kept.scores) < len(every.scores)
    assert kept.masks is not None
    assert every.masks is not None
    for boxes, runs in ((every.boxes, every.masks), (kept.boxes, kept.masks)):
        for box, mask in zip(boxes, runs, strict=True):
            drawn = torch.from_numpy(decode(mask, (40, 60)))
            assert torch.equal(tight_boxes(drawn[None])[0].to(box), box)


def test_padding_is_cut_before_the_second_resize() -> None:
    """What stands in the padded part of the features reaches the mask's border alone, through the first resize."""
    output = output_of()
    assert output.masks is not None
    changed: Tensor = output.masks.map.clone()
    changed[1, :, :, 6:] = 50
    other = output._replace(masks=output.masks._replace(map=changed))
    (_, before), (_, after) = (Postprocess(8)(o, SIZES) for o in (output, other))
    assert before.masks
    assert before.masks == after.masks
