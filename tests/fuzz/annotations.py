"""Annotation files of every format, spoilt; and what must hold of whatever becomes of them."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from detrellis.data.dataset import DetectionDataset
from detrellis.data.doctor.check import check, prepare
from detrellis.data.doctor.fix import fix
from detrellis.data.layout import resolve
from detrellis.data.masks import read_outlines
from detrellis.data.transforms import eval_transform
from detrellis.errors import UserError
from detrellis.terminal import Terminal
from tests.data import sets
from tests.data.field import others
from tests.fuzz.harness import refusal
from tests.fuzz.values import spoil_file

Writer = Callable[[Path], object]


def coco(root: Path) -> None:
    """The usual folders, with outlines."""
    sets.CocoSet(root).write()


def lvis(root: Path) -> None:
    """URLs instead of names, and lists."""
    data = sets.CocoSet(root)
    for content in data.content.values():
        for row in content["images"]:
            name = row.pop("file_name")
            row["coco_url"] = f"http://images.cocodataset.org/{name.split('_')[0]}/{name}"
            row["neg_category_ids"], row["not_exhaustive_category_ids"] = [], []
        for category, letter in zip(content["categories"], "rcf", strict=True):
            category["frequency"] = letter
    data.content["train"]["images"][0].update(
        neg_category_ids=[90], not_exhaustive_category_ids=[3]
    )
    data.write()


def run_lengths(root: Path) -> None:
    """COCO with bitmaps as run lengths, a crowd region, and numbers as texts."""
    data = sets.CocoSet(root)
    area = sets.HEIGHT * sets.WIDTH
    data.box(0)["segmentation"] = {"size": [sets.HEIGHT, sets.WIDTH], "counts": [area - 40, 40]}
    data.box(1).update(
        segmentation={"size": [sets.HEIGHT, sets.WIDTH], "counts": [0, area]}, iscrowd=1
    )
    data.box(2)["bbox"] = [str(v) for v in data.box(2)["bbox"]]
    del data.box(3)["bbox"]
    data.write()


def roboflow(root: Path) -> None:
    """A folder a split, the file among the images."""
    for split, folder in (("train", "train"), ("val", "valid")):
        sets.write_images(root / folder, split)
        (root / folder / "_annotations.coco.json").write_text(json.dumps(sets.coco_content(split)))


def _yolo(root: Path, yaml: str, line: Callable[[str], str]) -> None:
    for split in sets.COUNTS:
        sets.write_yolo(root / "images" / split, root / "labels" / split, split)
        for file in (root / "labels" / split).iterdir():
            file.write_text("".join(f"{line(each)}\n" for each in file.read_text().splitlines()))
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\n{yaml}")


def yolo(root: Path) -> None:
    """Boxes."""
    _yolo(root, "nc: 3\nnames:\n  0: cat\n  1: dog\n  2: emu\n", lambda line: line)


def yolo_outlines(root: Path) -> None:
    """Polygons."""

    def outline(line: str) -> str:
        name, *box = line.split()
        x, y, w, h = map(float, box)
        corners = [
            (x - w / 2, y - h / 2),
            (x + w / 2, y - h / 2),
            (x + w / 2, y + h / 2),
            (x, y),
            (x - w / 2, y),
        ]
        return " ".join([name, *(f"{v:.5f}" for corner in corners for v in corner)])

    _yolo(root, "names: [cat, dog, emu]\n", outline)


def yolo_angles(root: Path) -> None:
    """Boxes at an angle: four corners."""

    def corners(line: str) -> str:
        name, *box = line.split()
        x, y, w, h = map(float, box)
        ring = [(x - w / 2, y), (x, y - h / 2), (x + w / 2, y), (x, y + h / 2)]
        return " ".join([name, *(f"{v:.5f}" for corner in ring for v in corner)])

    _yolo(root, "names: 'cat, dog, emu'\n", corners)


def yolo_keypoints(root: Path) -> None:
    """Boxes with keypoints behind them, and lists of images."""

    def points(line: str) -> str:
        _, x, y, _, _ = line.split()
        return f"{line} {x} {y} 2 0 0 0"

    _yolo(root, "names: [cat, dog, emu]\nkpt_shape: [2, 3]\n", points)
    for split in sets.COUNTS:
        names = sorted(path.name for path in (root / "images" / split).iterdir())
        (root / f"{split}.txt").write_text("".join(f"./images/{split}/{name}\n" for name in names))
    (root / "data.yaml").write_text(
        (root / "data.yaml").read_text().replace("images/train", "train.txt")
    )


def voc(root: Path) -> None:
    """The usual folders, with lists."""
    for split in sets.COUNTS:
        sets.write_voc(root / "Annotations", root / "JPEGImages", split)
        lists = root / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text(
            "".join(f"{split}_{n}\n" for n in range(sets.COUNTS[split]))
        )


def via_csv(root: Path) -> None:
    """VIA's export as CSV."""
    others.via_csv(root)


def via(root: Path) -> None:
    """VIA's project."""
    others.via(lambda box: {"class": box.name})(root)


FORMATS: dict[str, Writer] = {
    "coco": coco,
    "lvis": lvis,
    "run lengths": run_lengths,
    "roboflow": roboflow,
    "yolo": yolo,
    "yolo outlines": yolo_outlines,
    "yolo angles": yolo_angles,
    "yolo keypoints": yolo_keypoints,
    "voc": voc,
    "labelme": others.labelme,
    "via": via,
    "via csv": via_csv,
    "csv": others.csv_splits,
}


@cache
def _whole(name: str) -> Path:
    """The data set of a format before anything is spoilt."""
    root = Path(mkdtemp(prefix="fuzz-"))
    FORMATS[name](root)
    return root


def spoilt(seed: int, folder: Path) -> Path:
    """A data set of the seed's format with one to three things wrong."""
    random = np.random.default_rng(seed)
    root = folder / "data"
    shutil.copytree(_whole(list(FORMATS)[seed % len(FORMATS)]), root, copy_function=os.link)
    for _ in range(int(random.integers(1, 4))):
        files = sorted(
            p for p in root.rglob("*") if p.is_file() and p.suffix not in (".jpg", ".png")
        )
        if files:
            spoil_file(random, files[int(random.integers(len(files)))])
    return root


def attempt(seed: int, folder: Path) -> None:
    """`check`, with its report for people and programs,
    `train`'s reading, and the clean copy of a spoilt data set.
    """
    root = spoilt(seed, folder)
    try:
        source = resolve(root)
        report = check(source, workers=1)
    except UserError as error:
        return refusal(error, str(root), str(root.resolve()))
    said = io.StringIO()
    Terminal(file=said, width=120).print(report.table())
    assert plain(said.getvalue()), "control characters reach the terminal"
    json.dumps(report.to_dict()).encode()
    splits = [split for split in ("train", "val") if split in source.splits]
    bad = check(source, fast=True, workers=1, splits=splits).errors
    try:
        read = prepare(source)
        assert not bad, f"train takes what check calls an error: {bad[0]}"
    except UserError as error:
        refusal(error, str(root))
    try:
        read = prepare(source, skip_bad=True)
    except UserError as error:
        refusal(error, str(root))
    else:
        for part in (read[0], read[1]):
            _train_on(part, root)
    try:
        fix(source, report, folder / "clean")
    except UserError as error:
        return refusal(error, str(root))
    again = check(resolve(folder / "clean"), workers=1)
    assert not again.errors, f"the clean copy is not clean: {again.errors[0]}"


def _train_on(part: object, root: Path) -> None:
    if part is None:
        return
    data = DetectionDataset(part, eval_transform(32))  # type: ignore[arg-type]
    assert all(len(data[0, row].boxes) == len(data[0, row].labels) for row in range(len(data)))
    try:
        read_outlines(part)  # type: ignore[arg-type]
    except UserError as error:
        refusal(error, str(root))


def plain(text: str) -> bool:
    """Whether a terminal shows this as letters, lines and nothing else."""
    return not any((ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 for c in text)
