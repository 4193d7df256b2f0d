"""Masks follow their boxes, from COCO's files through every augmentation to the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from detrellis.data.annotations import Annotations
from detrellis.data.augmentation import Augmentation, Strong, augmentation
from detrellis.data.batch import Batch, Collate
from detrellis.data.dataset import DetectionDataset
from detrellis.data.doctor.check import prepare
from detrellis.data.drawing import Affine, Object, Part, patches
from detrellis.data.drawing import grids as drawn_grids
from detrellis.data.layout import resolve
from detrellis.data.loader import build_loader
from detrellis.data.masks import SIDE
from detrellis.data.operations import crop
from detrellis.data.records import to_annotations
from detrellis.data.sampler import EvalSampler
from detrellis.data.transforms import Transform, train_transform
from detrellis.distributed import World
from detrellis.engine.batches import train_loader
from detrellis.engine.card import Card
from detrellis.engine.state import TrainJob
from detrellis.errors import UserError
from detrellis.recipes import find_recipe

from ..small import SMALL
from .sets import CocoSet, write_voc, write_yolo
from .test_loader import assert_same

PLAIN = train_transform("none", 32)  # the size that the sets' images have
STAIRS = [2, 4, 14, 4, 14, 10, 8, 10, 8, 16, 2, 16]  # an L, the corners of which are whole pixels


def loaded(data: CocoSet) -> Annotations:
    return to_annotations(resolve(data.write()).load("train"))


def masks_of(data: CocoSet, transform: Transform = PLAIN, number: int = 0) -> Tensor:
    masks = DetectionDataset(loaded(data), transform, masks=True)[0, number].masks
    assert masks is not None
    assert masks.dtype == torch.bool
    return masks


def outlined(root: Path, segmentation: Any, box: tuple[float, ...] = (2, 4, 12, 12)) -> CocoSet:
    """The set with another outline and box for the first object."""
    data = CocoSet(root)
    data.box(0).update(segmentation=segmentation, bbox=list(box))
    return data


def bitmap(*corners: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Rectangles in an image of the sets' size."""
    image = np.zeros((32, 48), dtype=np.uint8)
    for x1, y1, x2, y2 in corners:
        image[y1:y2, x1:x2] = 1
    return image


def run_lengths(image: NDArray[np.uint8]) -> dict[str, Any]:
    """Uncompressed, column by column, from the definition."""
    flat = image.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(image.shape), "counts": [0, *counts] if flat[0] else counts}


def compressed(image: NDArray[np.uint8]) -> dict[str, Any]:
    packed = coco_mask.encode(np.asfortranarray(image))
    return {"size": packed["size"], "counts": packed["counts"].decode()}


def differing(a: Tensor, b: Tensor) -> float:
    return float((a != b).float().mean())


def test_a_triangle_over_its_box(tmp_path: Path) -> None:
    """The sets' own outlines: the half of each box that is above its diagonal."""
    masks = masks_of(CocoSet(tmp_path))
    assert masks.shape == (2, SIDE, SIDE)
    above = torch.ones(SIDE, SIDE).triu().bool()
    for mask in masks:
        assert differing(mask, above) < 0.01


def test_polygons_and_run_lengths_agree(tmp_path: Path) -> None:
    image = bitmap((2, 4, 14, 10), (2, 10, 8, 16))
    forms = ([STAIRS], run_lengths(image), compressed(image))
    polygon, plain, packed = (
        masks_of(outlined(tmp_path / str(i), form))[0] for i, form in enumerate(forms)
    )
    expected = torch.ones(SIDE, SIDE, dtype=torch.bool)
    expected[SIDE // 2 :, SIDE // 2 :] = False
    assert torch.equal(plain, expected)
    assert torch.equal(packed, expected)
    assert differing(polygon, expected) < 0.01


def test_objects_of_both_kinds_side_by_side(tmp_path: Path) -> None:
    """Run lengths have odd numbers of bytes, after which polygons are not aligned."""
    data = outlined(tmp_path, compressed(bitmap((2, 4, 14, 10))))
    data.add_box(1)
    first, second, third = masks_of(data)
    assert first[: SIDE // 2].all()
    assert not first[SIDE // 2 :].any()
    assert differing(second, torch.ones(SIDE, SIDE).triu().bool()) < 0.01
    assert torch.equal(second, third)


def test_several_parts(tmp_path: Path) -> None:
    left = [2, 4, 6, 4, 6, 16, 2, 16]
    right = [10, 4, 14, 4, 14, 16, 10, 16]
    across = [2, 4, 14, 4, 14, 8, 2, 8]
    (mask, _) = masks_of(outlined(tmp_path / "apart", [left, right]))
    expected = torch.ones(SIDE, SIDE, dtype=torch.bool)
    expected[:, SIDE // 3 : 2 * SIDE // 3 + 1] = False
    assert differing(mask, expected) < 0.02
    (mask, _) = masks_of(outlined(tmp_path / "overlapping", [left, right, across, [3, 3, 4, 4]]))
    expected[: SIDE // 3] = True
    assert differing(mask, expected) < 0.02


@pytest.mark.parametrize(("hflip", "vflip"), [(1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("form", ["polygon", "run lengths"])
def test_flips_flip_them(tmp_path: Path, hflip: float, vflip: float, form: str) -> None:
    stairs = bitmap((2, 4, 14, 10), (2, 10, 8, 16))
    segmentation = [STAIRS] if form == "polygon" else run_lengths(stairs)
    upright, flipped = (
        masks_of(
            outlined(tmp_path / str(i), segmentation), train_transform("detr", 32, hflip=h, vflip=v)
        )[0]
        for i, (h, v) in enumerate([(0, 0), (hflip, vflip)])
    )
    sides = [side for side, flip in ((1, hflip), (0, vflip)) if flip]
    assert differing(flipped, upright.flip(sides)) < 0.02
    assert differing(flipped, upright) > 0.1


class Window:
    """A crop that is no accident."""

    pad_to = None

    def __init__(self, top: int, left: int, height: int, width: int, visible: float = 0.0) -> None:
        self.window, self.visible = (top, left, height, width), visible

    def __call__(
        self, image: Tensor, boxes: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return crop(image, boxes, labels, self.window, self.visible)


@pytest.mark.parametrize("form", ["polygon", "run lengths"])
def test_a_crop_shows_what_is_left_of_the_box(tmp_path: Path, form: str) -> None:
    stairs = bitmap((2, 4, 14, 10), (2, 10, 8, 16))
    data = outlined(tmp_path, [STAIRS] if form == "polygon" else run_lengths(stairs))
    sample = DetectionDataset(loaded(data), Window(7, 5, 20, 12), masks=True)[0, 0]
    assert sample.boxes.tolist() == [[0, 0, 9, 9]]  # the second object is outside
    assert sample.labels.tolist() == [0]
    expected = torch.ones(SIDE, SIDE, dtype=torch.bool)
    # 3 of the 9 pixels are left of the step, and 3 are above it
    expected[SIDE // 3 :, SIDE // 3 :] = False
    assert sample.masks is not None
    assert sample.masks.shape == (1, SIDE, SIDE)
    assert differing(sample.masks[0], expected) < 0.02
    second = DetectionDataset(loaded(data), Window(0, 18, 32, 20), masks=True)[0, 0]
    assert second.labels.tolist() == [1]
    assert second.masks is not None
    assert differing(second.masks[0], torch.ones(SIDE, SIDE).triu().bool()) < 0.01
    nothing = DetectionDataset(loaded(data), Window(7, 5, 20, 12, visible=0.9), masks=True)[0, 0]
    assert nothing.labels.shape == (0,)
    assert nothing.masks is not None
    assert nothing.masks.shape == (0, SIDE, SIDE)


AUGMENTATIONS: dict[str, Callable[[], Transform]] = {
    "detr": lambda: train_transform("detr", 240, vflip=0.5),
    "fixed": lambda: train_transform("fixed", (192, 256), jitter=0.0, zoom=(0.5, 2.5), vflip=0.5),
    "fixed, stretched": lambda: train_transform("fixed", (256, 160), jitter=0.0, keep_aspect=False),
    "none": lambda: train_transform("none", 200),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_masks_follow_the_pixels(tmp_path: Path, name: str) -> None:
    """White ellipses on black: what a mask says of a place in its box, the picture says there."""
    height, width = 150, 200
    y, x = np.mgrid[:height, :width] + 0.5
    places = [(50, 60, 40, 50), (145, 90, 50, 30)]
    inside = [((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1 for cx, cy, rx, ry in places]
    data = CocoSet(tmp_path)
    Image.fromarray((255 * np.any(inside, axis=0)).astype(np.uint8)).save(
        data.image("train", 0).with_suffix(".png")
    )
    data.listed(0).update(file_name="train_0.png", height=height, width=width)
    turn = np.linspace(0, 2 * np.pi, 60)
    for row, (cx, cy, rx, ry) in enumerate(places):
        ring = np.stack([cx + rx * np.cos(turn), cy + ry * np.sin(turn)], axis=1).ravel().tolist()
        segmentation = [ring] if row else run_lengths(inside[0].astype(np.uint8))
        data.box(row).update(segmentation=segmentation, bbox=[cx - rx, cy - ry, 2 * rx, 2 * ry])
    dataset = DetectionDataset(loaded(data), AUGMENTATIONS[name](), masks=True)
    seen = 0
    for epoch in range(25):
        image, boxes, _, _, _, masks, _ = dataset[epoch, 0]
        assert masks is not None
        for (x1, y1, x2, y2), mask in zip(boxes.tolist(), masks, strict=True):
            if min(x2 - x1, y2 - y1) < 40:
                continue  # much of a small box is edge
            columns, rows = (
                torch.linspace(a, b, 2 * SIDE + 1)[1::2].long() for a, b in ((x1, x2), (y1, y2))
            )
            assert differing(image[0][rows[:, None], columns] > 127, mask) < 0.06
            seen += 1
    assert seen > 20


def strong(**on: Any) -> Augmentation:
    usual = train_transform("fixed", (150, 200), jitter=0.0, zoom=(1.0, 1.5), vflip=0.5)
    return augmentation(usual, Strong(**on), epochs=99, calm=0)


MIXES: dict[str, Callable[[], Augmentation]] = {
    "usual": strong,
    "rotated": lambda: strong(rotate=30.0),
    "cropped": lambda: strong(iou_crop=1.0),
    "zoomed out": lambda: strong(zoom_out=1.0),
    "mosaic": lambda: strong(mosaic=1.0, rotate=20.0),
    "pasted": lambda: strong(copy_paste=1.0),
    "pasted and turned": lambda: strong(copy_paste=1.0, rotate=20.0),
    "blended": lambda: strong(mixup=1.0, mosaic=0.3),
}
FRAME = (150, 200)


def ellipses(root: Path) -> Annotations:
    """Four black images with white ellipses,
    outlined by turns with polygons and run lengths, and one without.
    """
    data = CocoSet(root)
    y, x = np.mgrid[: FRAME[0], : FRAME[1]] + 0.5
    turn = np.linspace(0, 2 * np.pi, 60)
    places = [
        (50, 60, 40, 50),
        (145, 90, 50, 30),
        (100, 75, 60, 30),
        (60, 100, 35, 45),
        (120, 60, 50, 50),
    ]
    owners = [data.content["train"]["images"].index(data.listed(n)) for n in range(5)]
    images = {number: np.zeros(FRAME, dtype=np.uint8) for number in owners}
    numbers = {image["id"]: number for number, image in enumerate(data.content["train"]["images"])}
    for row, (cx, cy, rx, ry) in enumerate(places):
        inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
        images[numbers[data.box(row)["image_id"]]][inside] = 255
        ring = np.stack([cx + rx * np.cos(turn), cy + ry * np.sin(turn)], axis=1).ravel().tolist()
        segmentation = [ring] if row % 2 else run_lengths(inside.astype(np.uint8))
        data.box(row).update(segmentation=segmentation, bbox=[cx - rx, cy - ry, 2 * rx, 2 * ry])
    for number, pixels in images.items():
        Image.fromarray(pixels).save(data.image("train", number).with_suffix(".png"))
        data.listed(number).update(file_name=f"train_{number}.png", height=FRAME[0], width=FRAME[1])
    return loaded(data)


@pytest.mark.parametrize("name", MIXES)
def test_bitmaps_follow_the_pixels(tmp_path: Path, name: str) -> None:
    """White is where an object is seen, and nowhere else; the grids over the boxes say the same."""
    dataset = DetectionDataset(ellipses(tmp_path), MIXES[name](), masks=True, bitmaps=True)
    seen = 0
    for epoch in range(7):
        sample = dataset[epoch, epoch % 4]
        assert sample.bitmaps is not None
        assert sample.masks is not None
        assert sample.bitmaps.shape == (len(sample.labels), *sample.image.shape[1:])
        assert sample.bitmaps.flatten(1).any(dim=1).all()
        white = sample.image.amin(dim=0) > (64 if name == "blended" else 190)
        masked = sample.bitmaps.any(dim=0)
        assert (masked & ~white).float().mean() < 0.012
        # Of some objects so little is left that they are dropped.
        assert (white & ~masked).float().mean() < (
            0.08 if name in ("cropped", "mosaic", "blended") else 0.012
        )
        for box, grid, mask in zip(sample.boxes, sample.masks, sample.bitmaps, strict=True):
            if (box[2:] - box[:2]).min() < 30:
                continue  # much of a small box is edge
            columns, rows = (
                torch.linspace(box[i], box[i + 2], 2 * SIDE + 1)[1::2].long() for i in (0, 1)
            )
            assert differing(mask[rows[:, None], columns], grid) < 0.06
            seen += 1
    assert seen > 2


MAPS = {
    "enlarged": [[1.7, 0.0], [0.0, 2.3]],
    "mirrored": [[-0.6, 0.0], [0.0, 0.9]],
    "turned": [[0.8, -0.7], [0.5, 1.1]],
}


@pytest.mark.parametrize("name", MAPS)
def test_run_lengths_go_where_the_map_takes_them(name: str) -> None:
    """A pixel is what lies under its centre, if that is in the window, and else nothing;
    also where picture and window end inside the result.
    """
    random = np.random.default_rng(3)
    blobs = random.random((20, 26)) < 0.5
    blobs[:4], blobs[:, 21:] = False, False
    window = np.array([3.2, 1.4, 22.7, 15.1])
    matrix = np.array(MAPS[name])
    affine = Affine(matrix, np.array([20.3, 11.6]) - matrix @ [13.0, 10.0])
    outline = coco_mask.encode(np.asfortranarray(blobs))["counts"]
    shown = Object(outline, blobs.shape, Part(affine, window, False, ()), ())
    size = (24, 40)
    (patch,) = patches([shown], size)
    assert patch is not None
    seen = np.zeros(size, dtype=bool)
    seen[patch.window] = patch.inside
    back = affine.inverse()
    unlike = 0
    for y, x in np.ndindex(size):
        place = back(np.array([x + 0.5, y + 0.5]))
        column, row = np.floor(place).astype(int)
        inside = (place >= window[:2]).all() and (place < window[2:]).all()
        unlike += seen[y, x] != bool(inside and blobs[row, column])
    # Where a map turns, hotcoco draws the window: a pixel or two at its edge are others
    assert unlike <= (20 if name == "turned" else 0)
    assert seen.sum() > 50


@pytest.mark.parametrize("name", MIXES)
def test_mixing_draws_the_same_numbers_with_masks(tmp_path: Path, name: str) -> None:
    annotations = ellipses(tmp_path)
    plain, masked = (
        DetectionDataset(annotations, MIXES[name](), 5, masks=m) for m in (False, True)
    )
    for epoch in range(4):
        assert_same(masked[epoch, epoch % 5]._replace(masks=None), plain[epoch, epoch % 5])


def test_bitmaps_of_untouched_images_are_cocos(tmp_path: Path) -> None:
    """Each is what pycocotools makes of the outline;
    batches pad them, and an object without a pixel is dropped.
    """
    data = outlined(tmp_path, [STAIRS])
    data.box(1).update(segmentation=[[20.1, 9.2, 20.2, 9.2, 20.2, 9.3]])
    annotations = loaded(data)
    dataset = DetectionDataset(annotations, PLAIN, bitmaps=True)
    first, second = dataset[0, 0], dataset[0, 1]
    assert first.bitmaps is not None
    assert first.masks is None
    assert len(first.labels) == len(first.boxes) == len(first.bitmaps) == 1
    (expected,) = coco_mask.decode(coco_mask.frPyObjects([STAIRS], 32, 48)).transpose(2, 0, 1)
    assert np.array_equal(first.bitmaps[0].numpy(), expected)
    batch = Collate(pad_to=(40, 64))([first, second, dataset[0, 4]])
    assert isinstance(batch, Batch)
    assert batch.targets.bitmaps is not None
    assert second.bitmaps is not None
    assert batch.targets.bitmaps.shape == (len(batch.targets.labels), 40, 64)
    assert torch.equal(batch.targets.bitmaps[:1, :32, :48], first.bitmaps)
    assert batch.targets.bitmaps.sum() == first.bitmaps.sum() + second.bitmaps.sum()
    assert_same(batch.to("cpu"), batch)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_they_change_nothing_else(tmp_path: Path, name: str) -> None:
    """With and without masks the same random numbers are drawn,
    and image, boxes and labels are the same bits.
    """
    annotations = loaded(CocoSet(tmp_path))
    plain, masked = (
        DetectionDataset(annotations, AUGMENTATIONS[name](), 5, masks=m) for m in (False, True)
    )
    for index in range(len(plain)):
        for epoch in range(4):
            without, sample = plain[epoch, index], masked[epoch, index]
            assert without.masks is None
            assert sample.masks is not None
            assert sample.masks.shape == (len(sample.labels), SIDE, SIDE)
            assert_same(sample._replace(masks=None), without)


def test_batches(tmp_path: Path) -> None:
    annotations = loaded(CocoSet(tmp_path))
    dataset = DetectionDataset(annotations, PLAIN, masks=True)
    samples = [dataset[0, index] for index in range(len(dataset))]
    (batch,) = build_loader(dataset, EvalSampler(len(dataset), 99), workers=1)
    assert batch.targets.sizes == (2, 1, 1, 1, 0)
    assert batch.targets.masks is not None
    assert torch.equal(
        batch.targets.masks, torch.cat([s.masks for s in samples if s.masks is not None])
    )
    assert_same(batch.to("cpu"), batch)
    moved = batch.targets.to("meta").masks
    assert moved is not None
    assert moved.device.type == "meta"
    empty = Collate()([samples[4]])
    assert isinstance(empty, Batch)
    assert empty.targets.masks is not None
    assert empty.targets.masks.shape == (0, SIDE, SIDE)
    plain = Collate()([s._replace(masks=None) for s in samples])
    assert isinstance(plain, Batch)
    assert plain.targets.masks is None
    assert plain.targets.to("cpu").masks is None


def test_pinning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = DetectionDataset(loaded(CocoSet(tmp_path)), PLAIN, masks=True)
    batch = Collate()([dataset[0, 0]])
    assert isinstance(batch, Batch)
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    assert_same(batch.pin_memory(), batch)
    assert any(t is batch.targets.masks for t in pinned)


def test_boxes_at_the_border_and_slivers(tmp_path: Path) -> None:
    """A box beyond its image is clipped, and its mask with it;
    what is left after a crop may be very thin.
    """
    beyond = [-6, 4, 18, 4, 18, 16, -6, 16]
    (mask, _) = masks_of(outlined(tmp_path / "border", [beyond], (-6, 4, 24, 12)))
    assert differing(mask, torch.ones(SIDE, SIDE, dtype=torch.bool)) < 0.02
    whole = Part(Affine(np.eye(2), np.zeros(2)), np.array([0, 0, 1e5, 1e5]), False, (0,))
    triangle = [np.array([0, 0, 1e5, 0, 1e5, 1e5], dtype=np.float32)]
    for width in (1.0, 0.1, 0.01):
        box = torch.tensor([[5e4, 0, 5e4 + width, 1e5]], dtype=torch.float64)
        (mask,) = drawn_grids([Object(triangle, (100_000, 100_000), whole, ())], box, SIDE)
        assert differing(mask[: SIDE // 2 - 1], torch.ones(SIDE // 2 - 1, SIDE)) < 0.02
        assert differing(mask[SIDE // 2 + 1 :], torch.zeros(SIDE // 2 - 1, SIDE)) < 0.02


def test_masks_stay_with_boxes_that_the_doctor_renumbers(tmp_path: Path) -> None:
    data = outlined(tmp_path, [STAIRS])
    data.content["train"]["annotations"].insert(
        0, copy.deepcopy(data.box(0)) | {"bbox": [5, 5, 0, 0]}
    )
    data.box(2)["id"] = data.box(1)["id"]  # used again, after a box that is dropped
    annotations, _, _, report = prepare(resolve(data.write()), skip_bad="boxes")
    assert report.skipped["train"] == {"duplicate-annotation-id": 2, "empty-box": 1}
    masks = DetectionDataset(annotations, PLAIN, masks=True)[0, 0].masks
    assert masks is not None
    assert differing(masks[1], torch.ones(SIDE, SIDE).triu().bool()) < 0.01
    assert masks[0, : SIDE // 2].all()


# Sets without masks

DAMAGED: dict[str, Any] = {
    "null": None,
    "empty": [],
    "two points": [[2, 4, 14, 4]],
    "half a point": [[2, 4, 14, 4, 14, 16, 2]],
    "text": [["2", "4", "14", "4", "14", "sixteen"]],
    "not finite": [[2, 4, 14, 4, 14, float("nan")]],
    "no list of lists": STAIRS,
    "a number": 3,
    "no size": {"counts": [4, 4]},
    "of another image": run_lengths(np.zeros((48, 32), dtype=np.uint8)),
    "too long": {"size": [32, 48], "counts": [32 * 48, 1]},
    "no run lengths": {"size": [32, 48], "counts": None},
    "garbage": {"size": [32, 48], "counts": "o"},
}


@pytest.mark.parametrize("name", ["missing", *DAMAGED])
def test_an_object_without_a_mask_is_named(tmp_path: Path, name: str) -> None:
    data = CocoSet(tmp_path)
    for row in (2, 1):
        data.box(row).update(id=row + 40, segmentation=DAMAGED.get(name))
        if name == "missing":
            del data.box(row)["segmentation"]
    annotations = loaded(data)
    with pytest.raises(UserError, match=r"annotation 41 in .* has no mask.*\(2 such\)") as error:
        DetectionDataset(annotations, PLAIN, masks=True)
    assert error.value.message.startswith(str(data.file("train")))
    assert "`segmentation`" in error.value.remedy
    assert "branch `rcnn` instead of `mask`" in error.value.remedy
    assert DetectionDataset(annotations, PLAIN)[0, 0].masks is None  # and nobody else minds


def test_crowd_regions_need_no_mask(tmp_path: Path) -> None:
    data = outlined(tmp_path, None)
    data.box(0)["iscrowd"] = 1
    (mask,) = masks_of(data)
    assert differing(mask, torch.ones(SIDE, SIDE).triu().bool()) < 0.01


def test_a_set_without_any_objects(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    data.content["train"]["annotations"].clear()
    assert masks_of(data).shape == (0, SIDE, SIDE)


@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_layouts_without_masks(tmp_path: Path, kind: str) -> None:
    if kind == "yolo":
        write_yolo(tmp_path / "images" / "train", tmp_path / "labels" / "train", "train")
        named = tmp_path / "data.yaml"
        named.write_text("names: [cat, dog, emu]\ntrain: images/train\n")
    else:
        named = tmp_path / "Annotations"
        write_voc(named, tmp_path / "JPEGImages", "train")
    annotations = to_annotations(resolve(tmp_path).load("train"))
    with pytest.raises(UserError, match="boxes without masks") as error:
        DetectionDataset(annotations, PLAIN, masks=True)
    assert error.value.message.startswith(str(named))
    assert "branch `rcnn` instead of `mask`" in error.value.remedy
    with pytest.raises(UserError, match="boxes without masks"):
        DetectionDataset(replace(annotations, source=None), PLAIN, bitmaps=True)


# Training

MASKED = [
    *SMALL,
    "data.size=[64, 64]",
    "optim.batch_size=4",
    "data.masks=true",
    "schemes.co.branches=[mask]",
]
ALONE = World(0, 1, torch.device("cpu"))


def job_of(folder: Path, override: list[str]) -> TrainJob:
    recipe, source = find_recipe("tiny").override(override), resolve(folder)
    annotations = to_annotations(source.load("train"))
    return TrainJob(
        Card(recipe, annotations.classes, source.to_dict()),
        annotations,
        None,
        folder / "run",
        workers=0,
    )


def test_training_that_needs_masks_does_not_start_without(shapes: Path) -> None:
    with pytest.raises(
        UserError, match=r"instances_train\.json: annotation 1 in .* has no mask.* \(\d+ such\)"
    ):
        train_loader(job_of(shapes, MASKED), ALONE)


@pytest.mark.parametrize("asked", [True, False])
def test_the_recipe_decides(tmp_path: Path, asked: bool) -> None:
    job = job_of(CocoSet(tmp_path).write(), MASKED if asked else MASKED[:-2])
    assert job.card.recipe.needs_masks is job.card.recipe.needs_bitmaps is asked
    for batch in train_loader(job, ALONE)[0]:
        assert (batch.targets.masks is not None) is asked
        if batch.targets.masks is not None:
            assert batch.targets.masks.shape == (len(batch.targets.labels), SIDE, SIDE)
        assert (batch.targets.bitmaps is not None) is asked
        if batch.targets.bitmaps is not None:
            assert batch.targets.bitmaps.shape == (
                len(batch.targets.labels),
                *batch.images.pixels.shape[2:],
            )
