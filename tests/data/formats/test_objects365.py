"""Objects365 as it is unpacked:
patch folders, names that begin elsewhere, and files that are missing or broken.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detrellis.data.dataset import DetectionDataset
from detrellis.data.doctor.check import prepare
from detrellis.data.layout import resolve
from detrellis.data.transforms import train_transform
from detrellis.errors import UserError

from ..sets import HEIGHT, WIDTH, picture

CATEGORIES = [
    {"id": 3, "name": "Sneakers"},
    {"id": 1, "name": "Person"},
    {"id": 7, "name": "tissue "},
]
# Of each split: name in the file, and where the picture is; None: nowhere.
FILES: dict[str, list[tuple[str, str | None]]] = {
    "train": [
        ("images/v1/patch8/objects365_v1_00420917.jpg", "train/patch8/objects365_v1_00420917.jpg"),
        ("images/v1/patch8/objects365_v1_00066778.jpg", "train/patch8/objects365_v1_00066778.jpg"),
        (
            "images/v2/patch16/objects365_v2_00908726.jpg",
            "train/patch16/objects365_v2_00908726.jpg",
        ),
        ("images/v2/patch17/objects365_v2_00000001.jpg", None),
    ],
    "val": [
        ("images/v1/patch0/objects365_v1_00000016.jpg", "val/patch0/objects365_v1_00000016.jpg"),
        ("images/v2/patch43/objects365_v2_02045000.jpg", "val/patch43/objects365_v2_02045000.jpg"),
    ],
}


def objects365(root: Path, images: str) -> Path:
    (root / "annotations").mkdir(parents=True)
    for split, files in FILES.items():
        rows = [
            {"id": i + 1, "file_name": n, "height": HEIGHT, "width": WIDTH}
            for i, (n, _) in enumerate(files)
        ]
        box = {
            "category_id": 1,
            "bbox": [4.5, 6.0, 60.0, 8.0],
            "area": 80.0,
            "iscrowd": 0,
            "isfake": 0,
        }
        boxes = [
            {"id": i + 1, "image_id": i + 1, "isreflected": 0, **box} for i in range(len(files))
        ]
        content = {"images": rows, "annotations": boxes, "categories": CATEGORIES, "licenses": []}
        (root / "annotations" / f"zhiyuan_objv2_{split}.json").write_text(json.dumps(content))
        for i, (_, place) in enumerate(files):
            if place is not None:
                path = root / images / place
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(i).save(path)
    return root


@pytest.mark.parametrize("images", ["", "images"])
def test_pictures_in_patch_folders_are_found_and_missing_ones_are_one_line(
    images: str, tmp_path: Path
) -> None:
    source = resolve(objects365(tmp_path / "o365", images))
    with pytest.raises(UserError, match="missing-image"):
        prepare(source)
    training, validation, classes, report = prepare(source, skip_bad=True)
    assert (len(training), validation and len(validation)) == (3, 2)
    assert report.skipped == {"train": {"missing-image": 1, "boxes of dropped images": 1}}
    assert (classes.ids, classes.names) == ((1, 3, 7), ("Person", "Sneakers", "tissue "))
    assert (training.boxes[:, 0] + training.boxes[:, 2]).max() == WIDTH  # cut to the picture


def test_a_broken_picture_is_replaced_and_named(tmp_path: Path) -> None:
    source = resolve(objects365(tmp_path / "o365", ""))
    broken = tmp_path / "o365" / "train" / "patch8" / "objects365_v1_00066778.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    training, *_ = prepare(source, skip_bad=True, undecoded=("train",))
    assert len(training) == 3  # nothing was decoded
    transform, log = train_transform(policy="none", size=32), tmp_path / "unreadable.txt"
    stopping = DetectionDataset(training, transform)
    going_on = DetectionDataset(training, transform, unreadable=log)
    with pytest.raises(UserError, match="objects365_v1_00066778"):
        stopping[0, 1]
    assert going_on[0, 1].image.equal(stopping[0, 2].image)
    assert going_on[0, 0].image.equal(stopping[0, 0].image)
    (line,) = log.read_text().splitlines()
    assert str(broken) in line
