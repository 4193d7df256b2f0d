"""YOLO: lists, yaml files and label files as tools write them."""

from __future__ import annotations

from pathlib import Path

from tests.data.field.cases import Arguments, Case, Reads
from tests.data.field.pictures import SPLITS, YAML, name_of, save, yolo_set


def plain(root: Path) -> Arguments:
    return {"data": yolo_set(root)}


def notebook_copies(root: Path) -> Arguments:
    yolo_set(root)
    for number in SPLITS["train"]:
        save(number, root / "images" / "train" / ".ipynb_checkpoints" / f"p{number}-checkpoint.jpg")
    return {"data": root}


def jfif(root: Path) -> Arguments:
    yolo_set(root)
    for number in SPLITS["train"][:2]:
        file = root / "images" / "train" / name_of(number)
        file.rename(file.with_suffix(".jfif"))
    return {"data": root}


def backslashes(root: Path) -> Arguments:
    return {"data": yolo_set(root, YAML.replace("/", "\\"))}


CASES = [
    Case("yolo", plain, Reads()),
    Case("yolo_ipynb", notebook_copies, Reads()),
    Case("yolo_jfif", jfif, Reads()),
    Case("yolo_yaml_backslash", backslashes, Reads(), pending="paths are taken as written"),
]
