"""Picture files that are broken, or that say more than their pixels."""

from __future__ import annotations

from pathlib import Path

from tests.data.field.cases import Arguments, Case, Finds
from tests.data.field.pictures import OBJECTS, PICTURES, TRUTH, coco, name_of, save_all, write_json


def cut_off(root: Path) -> Arguments:
    save_all(root / "images")
    file = root / "images" / name_of(0)
    file.write_bytes(file.read_bytes()[:600])
    write_json(root / "train.json", coco())
    return {"data": root}


CASES = [
    Case("img_cut_off", cut_off, Finds(frozenset({"unreadable-image"}), PICTURES - 1, OBJECTS - len(TRUTH[0]))),
]
