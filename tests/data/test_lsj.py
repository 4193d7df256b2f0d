"""Large-scale jitter, copy-paste by masks, and padding that is a part of the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from detrellis.data.augmentation import Augmentation
from detrellis.data.batch import Batch, Collate
from detrellis.data.dataset import DetectionDataset
from detrellis.data.loader import build_loader
from detrellis.data.lsj import LargeScale, LargeScaleJitter, Style
from detrellis.data.paste import Cutouts, drawn_objects, paste
from detrellis.data.patches import Patch, whole
from detrellis.data.sampler import EvalSampler
from detrellis.data.transforms import Finish, detr_between, eval_transform
from detrellis.errors import UserError
from detrellis.masks import tight_boxes
from detrellis.recipes import find_recipe
from detrellis.recipes.config import Recipe
from detrellis.recipes.refuse import refuse

from .sets import BOXES, CocoSet
from .test_loader import assert_same
from .test_masks import ellipses, loaded

SIDE = 64


def jittered(
    root: Path, style: Style = "mmdet", copy_paste: float = 0.0, seed: int = 0, **kinds: bool
) -> DetectionDataset:
    transform = LargeScaleJitter(SIDE, LargeScale(style, copy_paste=copy_paste), Finish(), 114)
    return DetectionDataset(ellipses(root), Augmentation(transform), seed, **kinds)


@pytest.mark.parametrize("style", ["mmdet", "detectron2"])
def test_boxes_are_those_around_what_is_left(tmp_path: Path, style: Style) -> None:
    data = jittered(tmp_path, style, bitmaps=True)
    seen, sizes = 0, set()
    for epoch in range(30):
        sample = data[epoch, epoch % len(data)]
        assert sample.image.shape == (3, SIDE, SIDE)
        assert sample.bitmaps is not None
        assert torch.equal(sample.boxes, tight_boxes(sample.bitmaps))
        assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
        sizes |= {int((sample.image != 114).any(dim=0).any(dim=1).sum())}
        seen += len(sample.labels)
    assert seen
    assert len(sizes) > 10


def test_what_is_pasted_is_whole_and_what_is_left_is_seen(tmp_path: Path) -> None:
    plain, pasted = (jittered(tmp_path, copy_paste=share, bitmaps=True) for share in (0.0, 1.0))
    added = 0
    for epoch in range(12):
        alone, sample = plain[epoch, 0], pasted[epoch, 0]
        assert sample.bitmaps is not None
        assert sample.bitmaps.flatten(1).any(dim=1).all()
        assert torch.equal(sample.boxes, tight_boxes(sample.bitmaps))
        added += len(sample.labels) > len(alone.labels)
    assert added


def test_objects_that_are_pasted_come_last_and_hide_the_others() -> None:
    below, above = (
        Cutouts(
            torch.full((3, 40, 40), grey, dtype=torch.uint8),
            torch.tensor([box]),
            torch.tensor([label]),
            [patch],
        )
        for grey, box, label, patch in (
            (0, (5.0, 5.0, 35.0, 35.0), 3, Patch(np.ones((30, 30), dtype=np.bool_), 5, 5)),
            (9, (0.0, 0.0, 12.0, 12.0), 7, Patch(np.ones((12, 12), dtype=np.bool_), 0, 0)),
        )
    )
    masks = torch.cat([whole(picture.patches, (40, 40)) for picture in (below, above)])
    image, boxes, labels, patches = paste(below, above)
    bitmaps = whole(patches, (40, 40))
    assert labels.tolist() == [3, 7]
    assert torch.equal(bitmaps[1], masks[1])
    assert not (bitmaps[0] & masks[1]).any()
    assert torch.equal(image == 9, masks[1].expand(3, -1, -1))
    assert torch.equal(boxes, tight_boxes(bitmaps))
    assert paste(below, above.take(torch.tensor([], dtype=torch.long))) is below


def test_any_number_of_objects_is_drawn() -> None:
    counts = {len(drawn_objects(3)) for _ in range(100)}
    assert counts == {0, 1, 2, 3}
    assert max(len(drawn_objects(500)) for _ in range(300)) <= 99
    assert len(drawn_objects(0)) == 0


def test_samples_are_functions_of_seed_epoch_and_image(tmp_path: Path) -> None:
    data, same, other = (
        jittered(tmp_path, copy_paste=1.0, seed=seed, masks=True) for seed in (0, 0, 1)
    )
    assert data.bitmaps is False
    for key in ((0, 0), (3, 1)):
        assert data[key].bitmaps is None
        assert_same(data[key], same[key])
    assert any(not torch.equal(data[0, i].image, other[0, i].image) for i in range(len(data)))


def test_grids_after_pasting_are_those_of_the_bitmaps(tmp_path: Path) -> None:
    data = jittered(tmp_path, copy_paste=1.0, masks=True, bitmaps=True)
    for epoch in range(6):
        sample = data[epoch, 0]
        assert sample.masks is not None
        assert sample.bitmaps is not None
        for grid, mask, box in zip(
            sample.masks, sample.bitmaps, sample.boxes.long().tolist(), strict=True
        ):
            inside = mask[box[1] : box[3], box[0] : box[2]]
            assert abs(float(grid.float().mean()) - float(inside.float().mean())) < 0.1


def test_pasting_needs_masks(tmp_path: Path) -> None:
    data = CocoSet(tmp_path)
    for row in data.content["train"]["annotations"]:
        del row["segmentation"]
    transform = LargeScaleJitter(SIDE, LargeScale(copy_paste=1.0), Finish())
    with pytest.raises(UserError) as error:
        DetectionDataset(loaded(data), transform)
    assert "data.copy_paste=0" in error.value.remedy


def test_padding_that_is_a_part_of_the_picture(tmp_path: Path) -> None:
    transform = eval_transform((SIDE, SIDE), pad=114)
    annotations = loaded(CocoSet(tmp_path))
    (batch,) = build_loader(
        DetectionDataset(annotations, transform), EvalSampler(len(annotations), 5)
    )
    assert batch.images.padding is None
    height, width = annotations.sizes[0].tolist()
    assert width > height
    # The frame in the pixels of the image: the square that it is fitted to.
    assert batch.sizes[0].tolist() == pytest.approx([width, width], abs=0.5)
    first = batch.targets.boxes[0] * batch.sizes[0].flip(0).repeat(2)
    image, _, x, y, w, h = BOXES["train"][0]
    assert image == 0
    assert first.tolist() == pytest.approx([x + w / 2, y + h / 2, w, h], abs=1e-4)


def test_without_it_the_loader_pads(tmp_path: Path) -> None:
    transform = LargeScaleJitter(SIDE, LargeScale(scales=(0.5, 0.5)), Finish())
    annotations = loaded(CocoSet(tmp_path))
    data = DetectionDataset(annotations, transform)
    batch = Collate(data.augmentation.pad_to)([data[0, 0]])
    assert isinstance(batch, Batch)
    images = batch.images
    assert images.padding is not None
    assert int((~images.padding).any(dim=1).sum()) == SIDE // 2


@pytest.mark.parametrize(
    ("sides", "expected"), [((480, 512), {480, 512}), ("480-482", {480, 481, 482})]
)
def test_short_sides_as_a_list_or_a_range(sides: tuple[int, ...] | str, expected: set[int]) -> None:
    transform = detr_between(sides, 1000, Finish())
    assert set(transform.sides) == expected
    assert (transform.max_size, transform.crop_sides, transform.crop_range) == (
        1000,
        (400, 500, 600),
        (384, 600),
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.size=640"], "needs one size"),
        (["data.size=[640, 320]"], "needs a square"),
        (["data.mosaic=0.5"], "goes without data.mosaic"),
        (["data.sides=480-800"], "data.augment=detr"),
        (["data.augment=fixed", "data.copy_paste=null"], "data.pad=114 needs"),
        (["data.match_orientation=true"], "data.pad=114 needs"),
    ],
)
def test_what_does_not_go_together(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        refuse(lsj().override(overrides))


def test_sides_are_checked() -> None:
    for wrong in ("800-480", "[0]", "wide"):
        with pytest.raises(UserError, match="sides"):
            find_recipe("dino-r50").override(f"data.sides={wrong}")
    recipe = find_recipe("dino-r50").override(["data.sides=480-1536", "data.sides_max=2400"])
    assert recipe.data.sides == "480-1536"
    refuse(recipe)


def lsj() -> Recipe:
    return find_recipe("co-dino-r50-lsj")
