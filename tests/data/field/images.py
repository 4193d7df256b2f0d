"""Picture files that are broken, or that say more than their pixels."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from detrellis.data.decode import ORIENTATION
from tests.data.field.cases import Arguments, Case, Finds, Reads
from tests.data.field.pictures import (
    OBJECTS,
    PICTURES,
    TRUTH,
    coco,
    name_of,
    picture,
    save,
    save_all,
    write_json,
    yolo_set,
)


def cut_off(root: Path) -> Arguments:
    save_all(root / "images")
    file = root / "images" / name_of(0)
    file.write_bytes(file.read_bytes()[:600])
    write_json(root / "train.json", coco())
    return {"data": root}


def png_with_a_wrong_byte(root: Path) -> Arguments:
    yolo_set(root)
    folder = root / "images" / "train"
    (folder / name_of(0)).unlink()
    data = bytearray(save(0, folder / name_of(0, ".png")).read_bytes())
    data[data.index(b"IDAT") + 40] ^= 255
    (folder / name_of(0, ".png")).write_bytes(data)
    return {"data": root}


def without_its_middle(root: Path) -> Arguments:
    save_all(root / "images")
    file = root / "images" / name_of(0)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 3] + data[len(data) * 3 // 4 :])
    write_json(root / "train.json", coco())
    return {"data": root}


def broken_link(root: Path) -> Arguments:
    save_all(root / "images")
    file = root / "images" / name_of(0)
    file.unlink()
    file.symlink_to(root / "elsewhere" / name_of(0))
    write_json(root / "train.json", coco())
    return {"data": root}


def a_pipe(root: Path) -> Arguments:
    arguments = broken_link(root)
    (root / "images" / name_of(0)).unlink()
    os.mkfifo(root / "images" / name_of(0))
    return arguments


def turned_tiffs(root: Path) -> Arguments:
    """As a scanner stores them: lying on their side, with a tag that says so."""
    yolo_set(root)
    for file in sorted(root.glob("images/*/*.jpg")):
        number = int(file.stem[1:])
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        lying = picture(TRUTH[number], number).transpose(Image.Transpose.ROTATE_90)
        lying.save(file.with_suffix(".tif"), exif=exif)
        file.unlink()
    return {"data": root}


ONE_LESS = (PICTURES - 1, OBJECTS - len(TRUTH[0]))

CASES = [
    Case(
        "img_wrong_byte", png_with_a_wrong_byte, Finds(frozenset({"unreadable-image"}), *ONE_LESS)
    ),
    Case(
        "img_without_middle", without_its_middle, Finds(frozenset({"unreadable-image"}), *ONE_LESS)
    ),
    Case("img_broken_link", broken_link, Finds(frozenset({"missing-image"}), *ONE_LESS)),
    Case("img_pipe", a_pipe, Finds(frozenset({"missing-image"}), *ONE_LESS)),
    Case("img_turned_tiff", turned_tiffs, Reads()),
    Case(
        "img_cut_off",
        cut_off,
        Finds(frozenset({"unreadable-image"}), PICTURES - 1, OBJECTS - len(TRUTH[0])),
    ),
]
