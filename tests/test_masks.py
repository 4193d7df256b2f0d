"""Masks of detections: drawn a few at a time, packed, and ranked with their boxes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from pycocotools import mask as coco_mask
from torch import Tensor

from detrellis import masks
from detrellis.masks import draw_masks, tight_boxes
from detrellis.overlay import _shrunk, paint_masks
from detrellis.postprocess import Postprocess
from detrellis.predictions.record import Prediction
from detrellis.rle import area, decode, encode, polygons
from detrellis.types import DecoderOutput, MaskFeatures

SIZES = torch.tensor([[40, 60], [33, 20]])
PADDED = (32, 48)


def output_of(queries: int = 6, classes: int = 3) -> DecoderOutput:
    """Two images, the second padded, whose features are smooth enough for masks with an inside."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.nn.functional.avg_pool2d(torch.randn(2, 4, 10, 14, generator=generator), 3, 1) * 4
    padding = torch.zeros(2, *PADDED, dtype=torch.bool)
    padding[1, 25:] = padding[1, :, 15:] = True
    logits, boxes, embeds = (
        torch.randn(1, 2, queries, n, generator=generator) for n in (classes, 4, 4)
    )
    return DecoderOutput(
        logits,
        boxes.sigmoid(),
        logits,
        mask_embeds=embeds,
        masks=MaskFeatures(maps, PADDED, padding),
    )


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
    monkeypatch.setattr(
        masks, "_packed", lambda logits: sizes.append(len(logits)) or packed(logits)
    )
    monkeypatch.setattr(masks, "AT_ONCE", 2 * 40 * 60)
    apart = draw_masks(*arguments)
    assert sizes == [2, 2, 2]
    assert apart.runs == together.runs
    assert torch.equal(apart.boxes, together.boxes)
    assert draw_masks(output.mask_embeds[0, 0, :0], *arguments[1:]).runs == ()


def test_a_box_detector_keeps_its_boxes() -> None:
    """Masks change the order and, where asked, the scores;
    suppression is what it is without masks.
    """
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
            assert sorted(map(tuple, one.boxes.tolist())) == sorted(
                map(tuple, other.boxes.tolist())
            )


def test_suppression_reads_the_boxes_of_masks() -> None:
    output = output_of()
    postprocess = Postprocess(18, boxes_of_masks=True)
    every = postprocess(output, SIZES)[0]
    kept = Postprocess(18, boxes_of_masks=True, nms=0.5)(output, SIZES)[0]
    assert 0 < len(kept.scores) < len(every.scores)
    assert kept.masks is not None
    assert every.masks is not None
    for boxes, runs in ((every.boxes, every.masks), (kept.boxes, kept.masks)):
        for box, mask in zip(boxes, runs, strict=True):
            drawn = torch.from_numpy(decode(mask, (40, 60)))
            assert torch.equal(tight_boxes(drawn[None])[0].to(box), box)


def test_padding_is_cut_before_the_second_resize() -> None:
    """What stands in the padded part of the features reaches the mask's border alone,
    through the first resize.
    """
    output = output_of()
    assert output.masks is not None
    changed: Tensor = output.masks.map.clone()
    changed[1, :, :, 6:] = 50
    other = output._replace(masks=output.masks._replace(map=changed))
    (_, before), (_, after) = (Postprocess(8)(o, SIZES) for o in (output, other))
    assert before.masks
    assert before.masks == after.masks


def test_polygons_run_along_the_pixels() -> None:
    """Parts apart, a hole that is filled, and parts that touch at a corner."""
    mask = np.zeros((20, 24), dtype=np.bool_)
    mask[2:9, 3:12], mask[4:6, 5:8], mask[9:12, 12:20], mask[15, 2] = True, False, True, True
    outlines = polygons(mask)
    assert sorted(map(len, outlines)) == [8, 8, 8]
    runs = coco_mask.merge(coco_mask.frPyObjects(outlines, 20, 24))
    mask[4:6, 5:8] = True
    assert np.array_equal(coco_mask.decode(runs), mask)
    assert polygons(mask[:2]) == []
    assert area(encode(mask), (20, 24)) == mask.sum()
    y, x = np.mgrid[:40, :50]
    disc = (x - 25) ** 2 + (y - 20) ** 2 < 300
    (ring,) = polygons(disc)
    assert np.mean(coco_mask.decode(coco_mask.frPyObjects([ring], 40, 50))[..., 0] != disc) < 0.01


def test_a_prediction_gives_its_masks() -> None:
    drawn = np.random.default_rng(0).random((3, 8, 9)) < 0.5
    plain = Prediction(
        None, (8, 9), [0.9, 0.8, 0.7], ["a"] * 3, [0] * 3, [1] * 3, [(0.0, 0.0, 9.0, 8.0)] * 3
    )
    found = replace(
        plain, runs=tuple(map(encode, drawn)), pixels=torch.zeros(3, 8, 9, dtype=torch.uint8)
    )
    assert found.masks is not None
    assert np.array_equal(found.masks, drawn)
    assert np.array_equal(found.mask(1), drawn[1])
    assert np.array_equal(found.to_supervision().mask, drawn)
    for row, mask in zip(found.to_coco(4), drawn, strict=True):
        assert np.array_equal(coco_mask.decode(row["segmentation"]), mask)
    rows = found.to_coco(4, polygons=True)
    assert [len(row["segmentation"]) for row in rows] == [len(polygons(mask)) for mask in drawn]
    assert plain.masks is None
    assert "segmentation" not in plain.to_coco(4)[0]
    assert found.draw(["a"]) != replace(found, runs=None).draw(["a"])
    assert replace(found, scores=[], runs=()).masks.shape == (0, 8, 9)  # type: ignore[union-attr]


@pytest.mark.parametrize("by", [1, 2, 4, 7])
def test_masks_are_shrunk_from_all_sides(by: int) -> None:
    mask = np.random.default_rng(0).random((30, 40)) < 0.97
    plain = Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MinFilter(2 * by + 1))
    assert np.array_equal(_shrunk(mask, by), np.asarray(plain) > 0)


def test_masks_are_painted_inside_alone() -> None:
    """Small ones lie on large ones; far from them the picture is what it was."""
    picture = Image.fromarray(np.full((60, 80, 3), 200, dtype=np.uint8))
    large, small = np.zeros((30, 40), dtype=np.bool_), np.zeros((30, 40), dtype=np.bool_)
    large[5:25, 5:25], small[10:20, 10:20] = True, True
    masks = [
        (encode(small), (255, 0, 0)),
        (encode(large), (0, 0, 255)),
        (encode(large & False), (0, 255, 0)),
    ]
    paint_masks(picture, (30, 40), masks, 1)
    pixels = np.asarray(picture).astype(int)
    assert (pixels[:, 54:] == 200).all()
    assert pixels[14, 14].tolist() == [116, 116, 223]  # within the large one, away from its outline
    assert pixels[30, 30, 0] > pixels[30, 30, 2]
    assert (pixels[..., 1] <= 200).all()
