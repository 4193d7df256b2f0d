"""Outlines of the formats beside COCO's, as masks of the picture."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detrellis.data.annotations import Annotations
from detrellis.data.dataset import DetectionDataset
from detrellis.data.layout import resolve
from detrellis.data.records import to_annotations
from detrellis.data.transforms import train_transform
from detrellis.errors import UserError

from ..sets import HEIGHT, WIDTH, write_images

TRIANGLE = [(4.0, 4.0), (28.0, 4.0), (28.0, 20.0)]
CIRCLE = (30.0, 16.0, 10.0)


def bitmaps(annotations: Annotations) -> np.ndarray:
    sample = DetectionDataset(annotations, train_transform("none", HEIGHT), bitmaps=True)[0, 0]
    assert sample.bitmaps is not None
    return sample.bitmaps.numpy()


def areas(annotations: Annotations) -> list[int]:
    return [int(mask.sum()) for mask in bitmaps(annotations)]


def read(root: Path) -> Annotations:
    return to_annotations(resolve(root).load("train"))


def test_yolo_polygons(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "train", "train")
    labels = tmp_path / "labels" / "train"
    labels.mkdir(parents=True)
    shares = " ".join(f"{x / WIDTH} {y / HEIGHT}" for x, y in TRIANGLE)
    (labels / "train_0.txt").write_text(f"\n1 {shares}\n0 {shares} {4 / WIDTH} {20 / HEIGHT}\n")
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\nkpt_shape: []\ntrain: images/train\n")
    assert areas(read(tmp_path)) == pytest.approx([24 * 16 / 2, 24 * 16], rel=0.06)
    with (labels / "train_0.txt").open("a") as file:
        file.write("0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(UserError, match=r"annotation 3 in train_0.jpg has no mask.*\(1 such\)"):
        bitmaps(read(tmp_path))


def labelme(root: Path, *shapes: dict[str, Any]) -> Annotations:
    write_images(root, "train")
    content = {
        "shapes": shapes,
        "imagePath": "train_0.jpg",
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
    }
    for name in ("train_0", "train_1"):
        (root / f"{name}.json").write_text(json.dumps(content | {"imagePath": f"{name}.jpg"}))
    return to_annotations(resolve(None, root).load("train"))


def test_labelme(tmp_path: Path) -> None:
    (cx, cy, r), corners = CIRCLE, [[2, 2], [12, 8]]
    polygon = {"label": "a", "shape_type": "polygon", "points": TRIANGLE}
    circle = {"label": "b", "shape_type": "circle", "points": [[cx, cy], [cx + r, cy]]}
    box = {"label": "b", "shape_type": "rectangle", "points": corners}
    parts = [box | {"group_id": 1, "label": "c"}, polygon | {"group_id": 1, "label": "c"}]
    found = areas(labelme(tmp_path / "all", polygon, circle, box, *parts))
    assert found[:3] == pytest.approx([24 * 16 / 2, math.pi * r * r, 60], rel=0.06)
    assert found[3] > found[0]
    with pytest.raises(UserError, match="boxes without masks"):
        bitmaps(labelme(tmp_path / "boxes", box, box))


def png(bitmap: np.ndarray) -> str:
    """A picture of 0 and 1 in base64, as labelme writes it."""
    file = io.BytesIO()
    Image.fromarray(bitmap.astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_labelmes_masks(tmp_path: Path) -> None:
    """Pixel for pixel with their holes, cut where they leave the picture,
    and together with shapes of their group.
    """
    ring = np.zeros((8, 12), dtype=np.bool_)
    ring[1:7, 1:11], ring[3:5, 4:7] = True, False
    mask = {"label": "a", "shape_type": "mask", "points": [[4, 3], [15, 10]], "mask": png(ring)}
    cut = mask | {"points": [[WIDTH - 6, -4], [WIDTH + 5, 3]]}
    box = {"label": "b", "shape_type": "rectangle", "points": [[20, 12], [30, 18]], "group_id": 1}
    annotations = labelme(tmp_path, mask, cut, mask | {"label": "b", "group_id": 1}, box)
    found, expected = bitmaps(annotations), np.zeros((2, HEIGHT, WIDTH), dtype=np.bool_)
    expected[0, 3:11, 4:16], expected[1, :4, WIDTH - 6 :] = ring, ring[4:, :6]
    assert np.array_equal(found[:2], expected)
    assert found[2].sum() == pytest.approx(ring.sum() + 60, abs=8)
    assert annotations.boxes[:3].tolist() == [[5, 4, 10, 6], [WIDTH - 5, 0, 5, 3], [5, 4, 25, 14]]
    labelme(tmp_path / "damaged", mask | {"mask": "no picture"})
    damaged = resolve(None, tmp_path / "damaged").load("train")
    assert "shape 1 has a `mask` that is no picture in base64" in " ".join(
        f.what for f in damaged.findings
    )


def test_via(tmp_path: Path) -> None:
    write_images(tmp_path / "images", "train")
    cx, cy, r = CIRCLE
    shapes: list[dict[str, Any]] = [
        {
            "name": "polygon",
            "all_points_x": [x for x, _ in TRIANGLE],
            "all_points_y": [y for _, y in TRIANGLE],
        },
        {"name": "circle", "cx": cx, "cy": cy, "r": r},
        {"name": "ellipse", "cx": 20, "cy": 16, "rx": 12, "ry": 5, "theta": math.pi / 2},
        {"name": "rect", "x": 2, "y": 2, "width": 10, "height": 6},
    ]
    regions = [
        {"shape_attributes": shape, "region_attributes": {"class": "cat"}} for shape in shapes
    ]
    entries = {
        f"train_{n}.jpg1": {"filename": f"train_{n}.jpg", "regions": regions} for n in range(5)
    }
    (tmp_path / "train.json").write_text(json.dumps(entries))
    masks = bitmaps(read(tmp_path))
    expected = [24 * 16 / 2, math.pi * r * r, math.pi * 60, 60]
    assert [int(mask.sum()) for mask in masks] == pytest.approx(expected, rel=0.06)
    assert masks[2].any(axis=1).sum() > 22  # it stands upright
