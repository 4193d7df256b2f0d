"""COCO: names that other machines wrote, folders that look alike, records that are half right."""

from __future__ import annotations

from pathlib import Path

from tests.data.field.cases import Arguments, Case, Finds, Reads
from tests.data.field.pictures import PICTURES, coco, name_of, picture, save, save_all, write_json


def plain(root: Path) -> Arguments:
    save_all(root / "images")
    write_json(root / "train.json", coco())
    return {"data": root}


def backslashes(root: Path) -> Arguments:
    save_all(root / "JPEGImages")
    write_json(root / "train.json", coco(names=[f"JPEGImages\\{name_of(n)}" for n in range(PICTURES)]))
    return {"data": root}


def some_backslashes(root: Path) -> Arguments:
    save_all(root / "images")
    names = [rf"..\label\{name_of(n)}" if n % 2 else name_of(n) for n in range(PICTURES)]
    write_json(root / "train.json", coco(names=names))
    return {"data": root}


def other_case(root: Path) -> Arguments:
    for number in range(PICTURES):
        name = name_of(number)
        save(number, root / "images" / (name.upper() if number < 4 else name))
    write_json(root / "train.json", coco())
    return {"data": root}


def drawn_beside(root: Path) -> Arguments:
    save_all(root / "Images")
    (root / "Annotated").mkdir()
    for number in range(PICTURES):
        picture((), number).save(root / "Annotated" / name_of(number))  # the objects are painted over
    write_json(root / "train.json", coco())
    return {"data": root}


def category_twice(root: Path) -> Arguments:
    arguments = plain(root)
    content = coco()
    content["categories"].append({"id": 2, "name": "emu"})
    write_json(root / "train.json", content)
    return arguments


def some_only_outlined(root: Path) -> Arguments:
    arguments = plain(root)
    content = coco()
    for row in content["annotations"][:3]:
        x, y, w, h = row.pop("bbox")
        row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    write_json(root / "train.json", content)
    return arguments


CASES = [
    Case("coco", plain, Reads()),
    Case("coco_backslash", backslashes, Reads()),
    Case("coco_backslash_mixed", some_backslashes, Reads()),
    Case("coco_case", other_case, Reads()),
    Case("coco_two_folders", drawn_beside, Reads()),
    Case("coco_dup_cat_id", category_twice, Finds(frozenset({"duplicate-category-id"}), 2, 2)),
    Case("coco_seg_some", some_only_outlined, Reads()),
]
