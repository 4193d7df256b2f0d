"""Tiny data sets on disk in every layout,
all with the same images and boxes, for the reader and doctor tests.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("cat", "dog", "emu")
IDS = (3, 17, 90)  # COCO's categories have gaps
WIDTH, HEIGHT = 48, 32
# (image number, index into NAMES, x, y, width, height)
BOXES = {
    "train": [
        (0, 0, 4, 6, 10, 8),
        (0, 1, 20, 2, 12, 16),
        (1, 2, 0, 0, 48, 32),
        (2, 0, 8, 8, 16, 16),
        (3, 1, 2, 4, 6, 8),
    ],
    "val": [(0, 2, 6, 6, 20, 12), (1, 0, 10, 4, 8, 8), (1, 1, 30, 10, 12, 20)],
}
COUNTS = {"train": 5, "val": 3}  # the last image of each has no boxes


def picture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    noise = np.random.default_rng(seed).integers(
        0, 256, (height // 4, width // 4, 3), dtype=np.uint8
    )
    return Image.fromarray(noise.repeat(4, axis=0).repeat(4, axis=1))


def image_name(split: str, number: int) -> str:
    return f"{split}_{number}.jpg"


def write_images(folder: Path, split: str, suffix: str = ".jpg") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(COUNTS[split]):
        path = (folder / image_name(split, number)).with_suffix(suffix)
        picture(number + 100 * (split == "val")).save(path)


def coco_content(split: str) -> dict[str, Any]:
    """Image ids 10, 20, ...; annotation ids 1, 2, ..."""
    size = {"height": HEIGHT, "width": WIDTH}
    return {
        "info": {},
        "images": [
            {"id": 10 * (n + 1), "file_name": image_name(split, n), **size}
            for n in range(COUNTS[split])
        ],
        "annotations": [
            {
                "id": row + 1,
                "image_id": 10 * (image + 1),
                "category_id": IDS[label],
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h]],
            }
            for row, (image, label, x, y, w, h) in enumerate(BOXES[split])
        ],
        "categories": [
            {"id": i, "name": n, "supercategory": "animal"} for i, n in zip(IDS, NAMES, strict=True)
        ],
    }


class CocoSet:
    """A COCO folder whose content a test spoils before `write`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content = {split: coco_content(split) for split in COUNTS}
        for split in COUNTS:
            write_images(root / "images" / split, split)

    def image(self, split: str, number: int) -> Path:
        return self.root / "images" / split / image_name(split, number)

    def file(self, split: str) -> Path:
        return self.root / "annotations" / f"instances_{split}.json"

    def box(self, row: int, split: str = "train") -> dict[str, Any]:
        found: dict[str, Any] = self.content[split]["annotations"][row]
        return found

    def listed(self, number: int, split: str = "train") -> dict[str, Any]:
        found: dict[str, Any] = self.content[split]["images"][number]
        return found

    def add_box(self, row: int, split: str = "train", **changes: Any) -> None:
        rows = self.content[split]["annotations"]
        rows.append(copy.deepcopy(rows[row]) | {"id": len(rows) + 1} | changes)

    def add_image(self, number: int, split: str = "train", **changes: Any) -> None:
        rows = self.content[split]["images"]
        rows.append(dict(rows[number]) | changes)

    def write(self) -> Path:
        for split, content in self.content.items():
            self.file(split).parent.mkdir(parents=True, exist_ok=True)
            self.file(split).write_text(json.dumps(content))
        return self.root


def yolo_lines(split: str, number: int) -> list[str]:
    rows = [row for row in BOXES[split] if row[0] == number]
    return [
        f"{label} {(x + w / 2) / WIDTH} {(y + h / 2) / HEIGHT} {w / WIDTH} {h / HEIGHT}"
        for _, label, x, y, w, h in rows
    ]


def write_yolo(images: Path, labels: Path, split: str) -> None:
    write_images(images, split)
    labels.mkdir(parents=True, exist_ok=True)
    for number in range(COUNTS[split]):
        lines = yolo_lines(split, number)
        if lines:  # an image without boxes has no file
            (labels / f"{split}_{number}.txt").write_text("\n".join(lines) + "\n")


def voc_xml(
    file_name: str, rows: Iterable[tuple[int, ...]], first: int = 1, extra: str = ""
) -> str:
    objects = "".join(
        f"<object><name>{NAMES[label]}</name><difficult>0</difficult><part><name>head</name></part><bndbox>"
        f"<xmin>{x + first}</xmin><ymin>{y + first}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for _, label, x, y, w, h in rows
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation><filename>{file_name}</filename>{size}{objects}{extra}</annotation>"


def write_voc(xml: Path, images: Path, split: str, first: int = 1) -> None:
    write_images(images, split)
    xml.mkdir(parents=True, exist_ok=True)
    for number in range(COUNTS[split]):
        rows = [row for row in BOXES[split] if row[0] == number]
        (xml / f"{split}_{number}.xml").write_text(voc_xml(image_name(split, number), rows, first))
