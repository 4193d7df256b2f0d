"""Strong augmentation: pixels and boxes move together,
whatever is drawn and mixed, and calm comes when it should.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from detrellis.boxes import pairwise_iou
from detrellis.data.annotations import Annotations
from detrellis.data.augmentation import (
    Augmentation,
    Mixing,
    Strong,
    augmentation,
    blended,
    mosaic,
    pasted,
)
from detrellis.data.batch import Batch
from detrellis.data.dataset import DetectionDataset
from detrellis.data.loader import build_loader
from detrellis.data.operations import MEAN_COLOUR, photometric_distort
from detrellis.data.sampler import BatchSampler
from detrellis.data.strong import (
    VISIBLE,
    Window,
    cropped,
    cropped_as_detr,
    rotated,
    show,
    zoomed_out,
)
from detrellis.data.transforms import Resize, train_transform
from detrellis.errors import UserError
from detrellis.recipes import find_recipe
from detrellis.recipes.data import DataConfig
from detrellis.recipes.refuse import refuse

from .test_loader import annotate, annotations, assert_same
from .test_transforms import painted, red_extent

__all__ = ["annotations"]  # a fixture

FRAME = (96, 128)
PLAIN = train_transform("fixed", FRAME, jitter=0.0, zoom=(1.0, 1.0))
STRONG = {
    "rotate": Strong(rotate=20.0),
    "zoom-out": Strong(zoom_out=1.0),
    "crop": Strong(iou_crop=1.0),
    "DETR's crop": Strong(detr_crop=1.0),
    "zoom-out and crop": Strong(zoom_out=0.7, iou_crop=0.7),
    "mosaic": Strong(mosaic=1.0),
    "mixup": Strong(mixup=1.0),
    "copy-paste": Strong(copy_paste=1.0),
    "all": Strong(
        0.5,
        10.0,
        0.5,
        (1.0, 2.0),
        0.5,
        mosaic=0.5,
        mixup=0.5,
        copy_paste=0.5,
        multi_scale=(0.5, 1.5),
    ),
}


def strong(dials: Strong, epochs: int = 10, calm: float = 0.0) -> Augmentation:
    return augmentation(PLAIN, dials, epochs=epochs, calm=calm)


@pytest.mark.parametrize(
    "name", ["zoom-out", "crop", "DETR's crop", "zoom-out and crop", "mosaic", "copy-paste"]
)
def test_boxes_follow_the_pixels(name: str) -> None:
    """Partners are black: the red rectangle is where its box is,
    and where it has none little of it is left.
    """
    transform, box = strong(STRONG[name]).strong[0], (40, 25, 95, 80)
    assert isinstance(transform, Mixing)
    empty = (painted(120, 150, (0, 0, 0, 0)), torch.zeros(0, 4), torch.zeros(0).long())
    found = 0
    for seed in range(60):
        torch.manual_seed(seed)
        image, boxes, labels = transform(
            painted(120, 150, box),
            torch.tensor([box]).float(),
            torch.tensor([3]),
            partner=lambda: empty,
        )
        assert image.dtype == torch.uint8
        assert image.shape[1] <= FRAME[0]
        assert image.shape[2] <= FRAME[1]
        if len(boxes):
            assert labels.tolist() == [3]
            torch.testing.assert_close(red_extent(image), boxes[0], atol=1.01, rtol=0)
            found += 1
        else:
            assert ((image[0] > 127) & (image[1] < 60)).float().mean() < VISIBLE
    assert found > 30


def test_rotation_encloses_the_turned_ellipse() -> None:
    y, x = torch.meshgrid(torch.arange(200.0), torch.arange(300.0), indexing="ij")
    inside = ((x + 0.5 - 120) / 60) ** 2 + ((y + 0.5 - 90) / 25) ** 2 < 1
    image = inside.to(torch.uint8).mul(255).expand(3, -1, -1).clone()
    image[1:] = 0
    boxes = torch.tensor([[60.0, 65, 180, 115]])
    for degrees in (-20.0, 7.0, 30.0):
        out, moved, _ = rotated(image, boxes, torch.tensor([0]), degrees)
        torch.testing.assert_close(red_extent(out), moved[0], atol=1.5, rtol=0)
    # What is beyond the picture is the mean colour, without a seam.
    white = torch.full((3, 100, 100), 255, dtype=torch.uint8)
    out, _, _ = rotated(white, torch.zeros(0, 4), torch.zeros(0).long(), 20.0)
    assert out[:, 0, 0].tolist() == list(MEAN_COLOUR)
    assert (out.flatten(1) >= torch.tensor(MEAN_COLOUR).view(3, 1)).all()


def test_rotation_drops_what_leaves_the_picture() -> None:
    image = torch.zeros(3, 100, 400, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 20, 20], [190, 40, 210, 60]])
    _, moved, labels = rotated(image, boxes, torch.arange(2), 40.0)
    assert labels.tolist() == [1]
    assert (moved >= 0).all()


def test_windows_are_those_of_torchvision() -> None:
    """The crops that are drawn meet SSD's conditions,
    and what they look like on average is what torchvision's do.
    """
    boxes = torch.tensor([[30.0, 20, 130, 140], [160, 50, 230, 120]])
    whole = Window(0, 0, 200, 300)
    torch.manual_seed(0)
    ours = [window for _ in range(400) if (window := cropped(whole, boxes, (0.3, 1.0))) != whole]
    for top, left, height, width in ours:
        assert min(top, left) >= 0
        assert top + height <= 200
        assert left + width <= 300
        assert 0.5 <= width / height <= 2
    reference = v2.RandomIoUCrop()
    given = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(200, 300))
    drawn = [
        reference.make_params([tv_tensors.Image(torch.zeros(1).expand(3, 200, 300)), given])
        for _ in range(100)
    ]
    theirs = [Window(p["top"], p["left"], p["height"], p["width"]) for p in drawn if p]
    assert abs(len(ours) / 400 - len(theirs) / 100) < 0.15

    def measured(windows: list[Window]) -> tuple[float, float]:
        """Mean area, and mean of the highest IoU with a box whose centre is inside."""
        corners = torch.tensor(
            [[left, top, left + width, top + height] for top, left, height, width in windows]
        )
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((corners[:, None, :2] < centres) & (centres < corners[:, None, 2:])).all(dim=2)
        assert inside.any(dim=1).all()
        best = (pairwise_iou(corners.float(), boxes) * inside).amax(dim=1).mean()
        return sum(w.height * w.width for w in windows) / len(windows) / 60000, float(best)

    assert measured(ours) == pytest.approx(measured(theirs), abs=0.07)


def test_crops_are_detrs() -> None:
    """Of a picture at a short side of 400, 500 or 600 pixels, 384 to 600 of each side;
    a strip keeps its short side.
    """
    torch.manual_seed(0)
    drawn = [cropped_as_detr(Window(0, 0, 800, 1600)) for _ in range(200)]
    for top, left, height, width in drawn:
        assert min(top, left) >= 0
        assert top + height <= 800
        assert left + width <= 1600
        assert min(height, width) >= 384 / 600 * 800 - 1
        assert width <= 600 / 400 * 800 + 1
    assert len({window.height for window in drawn}) > 20
    assert cropped_as_detr(Window(5, 7, 1, 3000))[2] == 1


def test_a_crop_without_objects_is_the_whole_picture() -> None:
    whole = Window(-3, -5, 40, 60)
    assert all(cropped(whole, torch.zeros(0, 4), (0.3, 1.0)) == whole for _ in range(20))
    # A box that is no box, or beyond the picture, is none to crop around.
    transform = strong(Strong(iou_crop=1.0, zoom_out=1.0)).strong[0]
    assert isinstance(transform, Mixing)
    bad = torch.tensor([[200.0, 10, 240, 30], [5, 5, 5, 9]])
    for _ in range(20):
        _, boxes, _ = transform(
            painted(60, 90, (0, 0, 0, 0)), bad, torch.arange(2), partner=lambda: None
        )
        assert boxes.shape == (0, 4)


def test_zoom_out_holds_the_picture() -> None:
    ratios = []
    for seed in range(200):
        torch.manual_seed(seed)
        top, left, height, width = zoomed_out(Window(0, 0, 60, 80), (1.0, 4.0))
        assert top <= 0 <= 60 <= top + height
        assert left <= 0 <= 80 <= left + width
        ratios.append(height / 60)
    assert 1 <= min(ratios) < 1.1
    assert 3.9 < max(ratios) <= 4
    image, boxes, _ = show(
        (painted(60, 80, (0, 0, 80, 60)), torch.tensor([[0.0, 0, 80, 60]]), torch.zeros(1)),
        Window(-30, -40, 120, 160),
        FRAME,
    )
    assert boxes.tolist() == [[32, 24, 96, 72]]
    assert image[:, 0, 0].tolist() == list(MEAN_COLOUR)


def test_what_nearly_vanishes_is_dropped() -> None:
    boxes = torch.tensor([[0.0, 0, 20, 20], [0, 20, 20, 40]])
    picture = (painted(60, 80, (0, 0, 1, 1)), boxes, torch.arange(2))
    # 6 of 20 rows of the first are left
    _, moved, labels = show(picture, Window(14, 0, 40, 60), (40, 60))
    assert labels.tolist() == [0, 1]
    assert moved[0].tolist() == [0, 0, 20, 6]
    # A quarter, which is too little
    assert show(picture, Window(15, 0, 40, 60), (40, 60))[2].tolist() == [1]
    tiny = (
        painted(600, 800, (0, 0, 1, 1)),
        torch.tensor([[9.0, 9, 14, 300], [9, 9, 16, 300]]),
        torch.arange(2),
    )
    transform = strong(Strong(mosaic=1e-12)).strong[0]
    assert isinstance(transform, Mixing)
    assert transform(*tiny, partner=lambda: tiny)[2].tolist() == [1]  # 0.8 and 1.1 pixels wide


def test_mosaic_shows_four_pictures_and_no_canvas() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)]
    shapes = [(100, 150), (30, 40), (500, 90), (64, 64)]
    pictures = []
    for (height, width), colour in zip(shapes, colours, strict=True):
        image = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).repeat(1, height, width)
        pictures.append(
            (image, torch.tensor([[0.0, 0, width, height]]), torch.tensor([len(pictures)]))
        )
    for seed in range(20):
        torch.manual_seed(seed)
        image, boxes, labels = mosaic(pictures, Resize(FRAME), (0.5, 1.0))
        assert image.shape == (3, *FRAME)
        assert {tuple(c) for c in image.flatten(1).T.tolist()} == set(colours)
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            cell = image[:, round(y1) : round(y2), round(x1) : round(x2)]
            assert (cell == torch.tensor(colours[label]).view(3, 1, 1)).all()


def test_mixup_has_the_boxes_of_both() -> None:
    one = (
        torch.full((3, 10, 20), 200, dtype=torch.uint8),
        torch.tensor([[1.0, 2, 3, 4]]),
        torch.tensor([0]),
    )
    other = (
        torch.zeros(3, 15, 12, dtype=torch.uint8),
        torch.tensor([[5.0, 6, 7, 8]]),
        torch.tensor([1]),
    )
    image, boxes, labels = blended(one, other, 0.25)
    assert image.shape == (3, 15, 20)
    assert boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert labels.tolist() == [0, 1]
    assert image[:, 0, 0].tolist() == [50, 50, 50]
    expected = [round(0.75 * 0 + 0.25 * colour) for colour in MEAN_COLOUR]
    assert image[:, 14, 0].tolist() == expected


def test_pasted_rectangles_hide_little() -> None:
    red = (painted(60, 80, (10, 10, 40, 40)), torch.tensor([[10.0, 10, 40, 40]]), torch.tensor([0]))
    grey = torch.full((3, 60, 80), 90, dtype=torch.uint8)
    grey[1, 20:35, 30:50] = 255
    other = (grey, torch.tensor([[30.0, 20, 50, 35], [0, 0, 4, 60]]), torch.tensor([5, 6]))
    seen = 0
    for seed in range(40):
        torch.manual_seed(seed)
        image, boxes, labels = pasted(red, other)
        assert labels.tolist() in ([0], [0, 5])  # the other one is too thin
        if len(boxes) == 2:
            x1, y1, x2, y2 = boxes[1].int().tolist()
            assert (x2 - x1, y2 - y1) == (20, 15)
            assert (image[1, y1:y2, x1:x2] == 255).all()
            assert int((image[0] == 255).sum()) >= (1 - VISIBLE) * 900
            seen += 1
    assert seen > 10


def test_photometric_distortion() -> None:
    image = torch.randint(40, 200, (3, 9, 11), dtype=torch.uint8)
    assert torch.equal(photometric_distort(image, 0.0), image)
    outs = []
    for seed in range(30):
        torch.manual_seed(seed)
        outs.append(photometric_distort(image, 0.5))
        torch.manual_seed(seed)
        assert torch.equal(outs[-1], photometric_distort(image, 0.5))
    assert sum(bool((a != b).any()) for a, b in pairwise(outs)) > 20
    assert any(
        sorted(o.float().mean(dim=(1, 2)).tolist()) != o.float().mean(dim=(1, 2)).tolist()
        for o in outs
    )


@pytest.mark.parametrize("name", STRONG)
def test_a_sample_is_a_function_of_seed_epoch_and_index(
    annotations: Annotations, name: str
) -> None:
    first, second = (DetectionDataset(annotations, strong(STRONG[name]), seed=3) for _ in range(2))
    differing = 0
    for index in range(len(first)):
        torch.manual_seed(index)  # the state around it is of no concern
        sample = first[1, index]
        assert_same(sample, second[1, index])
        height, width = sample.image.shape[1:]
        assert (sample.boxes >= 0).all()
        assert (sample.boxes <= torch.tensor([width, height, width, height])).all()
        assert ((sample.boxes[:, 2:] - sample.boxes[:, :2]) >= 1).all()
        other = first[2, index].image
        differing += other.shape != sample.image.shape or bool((other != sample.image).any())
    assert differing > 5  # an image without boxes is not cropped


def test_workers_and_resuming_change_nothing(annotations: Annotations) -> None:
    dataset = DetectionDataset(annotations, strong(STRONG["all"], epochs=4, calm=0.5), seed=1)
    sampler = BatchSampler(len(dataset), 3, seed=1)
    inline, forked = (build_loader(dataset, sampler, workers=workers) for workers in (0, 2))
    for epoch in (1, 2):  # the last strong one, and the first calm one
        sampler.set_position(epoch)
        whole = list(inline)
        assert_same(list(forked), whole)
        sampler.set_position(epoch, 2)
        assert_same(list(forked), whole[2:])


@pytest.mark.parametrize(
    ("epochs", "calm", "until"),
    [(40, 0.15, 34), (20, 0.15, 17), (1, 0.15, 1), (10, 0.0, 10), (10, 1.0, 0), (7, 0.3, 5)],
)
def test_calm_is_the_last_part(
    annotations: Annotations, epochs: int, calm: float, until: int
) -> None:
    usual = DetectionDataset(annotations, PLAIN, seed=2)
    dataset = DetectionDataset(annotations, strong(Strong(mosaic=1.0), epochs, calm), seed=2)
    assert dataset.augmentation.until == until
    for epoch in range(epochs):
        same = torch.equal(dataset[epoch, 1].image, usual[epoch, 1].image)
        assert same == (epoch >= until)


def test_without_strong_augmentation_nothing_changes(annotations: Annotations) -> None:
    assert augmentation(PLAIN, Strong(), epochs=9, calm=0.5) == Augmentation(PLAIN)
    detr = train_transform("detr", 64, jitter=0.3)
    coloured = augmentation(detr, Strong(photometric=0.5), epochs=9, calm=0.5)
    plain = DetectionDataset(annotations, detr)
    assert_same(DetectionDataset(annotations, coloured)[8, 1], plain[8, 1])
    assert not torch.equal(DetectionDataset(annotations, coloured)[0, 1].image, plain[0, 1].image)
    with pytest.raises(UserError, match="one size"):
        augmentation(detr, Strong(mosaic=0.5), epochs=9, calm=0.5)


def test_multi_scale_gives_a_batch_one_size(annotations: Annotations) -> None:
    square = train_transform("fixed", (640, 640), keep_aspect=False, jitter=0.0)
    scaled = augmentation(square, Strong(multi_scale=(0.75, 1.25)), epochs=5, calm=0.2)
    sizes = [t.each.frame.size for t in scaled.strong if isinstance(t, Mixing)]
    assert sorted(sizes) == sorted([(s, s) for s in range(480, 801, 32)] + [(640, 640)] * 2)
    small = augmentation(replace(PLAIN), Strong(multi_scale=(0.5, 1.5)), epochs=5, calm=0.2)
    dataset = DetectionDataset(annotations, small, seed=0)
    sampler = BatchSampler(len(dataset), 2, seed=0)
    seen: set[tuple[int, int]] = set()
    for epoch in range(5):
        sampler.set_position(epoch)
        for keys, batch in zip(sampler, build_loader(dataset, sampler), strict=True):
            assert isinstance(batch, Batch)
            shape = tuple(batch.images.pixels.shape[2:])
            samples = dataset.__getitems__(keys)
            assert isinstance(samples, list)
            assert shape == tuple(max(s.image.shape[d] for s in samples) for d in (1, 2))
            seen |= {shape} if epoch < 4 else set()
            assert epoch < 4 or all(side <= limit for side, limit in zip(shape, FRAME, strict=True))
    assert len({max(shape) for shape in seen}) > 2


def test_what_is_mixed_has_the_orientation_of_the_first_picture() -> None:
    turned = train_transform("fixed", (32, 48), jitter=0.0, zoom=(1.0, 1.0), match_orientation=True)
    (mixing,) = augmentation(turned, Strong(mosaic=1.0, iou_crop=1.0), epochs=2, calm=0.0).strong
    assert isinstance(mixing, Mixing)
    tall, wide = (
        (
            torch.zeros(3, *size, dtype=torch.uint8),
            torch.tensor([[5.0, 5, 30, 30]]),
            torch.tensor([0]),
        )
        for size in ((60, 40), (40, 60))
    )
    assert mixing(*tall, partner=lambda: wide)[0].shape == (3, 48, 32)
    assert mixing(*wide, partner=lambda: tall)[0].shape == (3, 32, 48)


def test_a_partner_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for index in range(2):
        Image.new("RGB", (50, 40)).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes(b"text")
    dataset = DetectionDataset(
        annotate(tmp_path, [(40, 50)] * 2, [[], []]), strong(Strong(mosaic=1.0))
    )
    with pytest.raises(UserError, match=r"1\.png.*not an image"):
        [dataset[epoch, 0] for epoch in range(10)]


def test_policies() -> None:
    assert DataConfig(augment="fixed", size=FRAME).strong() == {}
    assert DataConfig(augment="detr").usual()["policy"] == "detr"
    realtime = DataConfig(augment="realtime", size=(640, 640))
    assert realtime.usual()["policy"] == "fixed"
    assert (realtime.usual()["jitter"], realtime.usual()["zoom"]) == (0.0, (1.0, 1.0))
    expected = Strong(photometric=0.5, zoom_out=0.5, iou_crop=0.8, multi_scale=(0.75, 1.25))
    assert Strong(**realtime.strong()) == expected
    off = realtime.replace(photometric=0.0, zoom_out=0.0, iou_crop=0.0, multi_scale=(1.0, 1.0))
    assert Strong(**off.strong()) == Strong()
    assert Strong(**DataConfig(augment="fixed", size=FRAME, mosaic=0.4).strong()) == Strong(
        mosaic=0.4
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.augment=small", "data.size=640"], "needs one size"),
        (["data.size=64"], "fixed needs one size"),
        (["data.augment=none", "data.photometric=0.5"], "goes without data.photometric"),
        (["data.augment=detr", "data.size=640", "data.mosaic=0.5"], "goes without data.mosaic"),
        (["data.rotate=90"], "data.rotate=90 has to be at least 0 and at most 45"),
        (["data.zoom_out_range=[0.5, 2]"], "at least 1 and at most 10"),
        (["data.iou_crop_range=[0.9, 0.2]"], "lowest, highest"),
    ],
)
def test_what_does_not_fit_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        refuse(find_recipe("tiny").override(settings))


def centre_of(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def test_an_angle_is_turned_the_same_way_by_pixels_and_boxes() -> None:
    image, boxes = painted(100, 100, (70, 45, 80, 55)), torch.tensor([[70.0, 45, 80, 55]])
    out, moved, _ = rotated(image, boxes, torch.tensor([0]), 30.0)
    extent = red_extent(out).unsqueeze(0)
    torch.testing.assert_close(centre_of(extent), centre_of(moved), atol=1.0, rtol=0)
    assert math.isclose(
        float(centre_of(moved)[0, 1]), 50 - 25 * math.sin(math.radians(30)), abs_tol=0.1
    )
