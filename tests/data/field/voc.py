"""Pascal VOC: folders, encodings, lists and names as tools write them."""

from __future__ import annotations

from pathlib import Path

from tests.data.field.cases import Arguments, Case, Reads
from tests.data.field.pictures import PICTURES, name_of, save_all, write_voc


def plain(root: Path) -> Arguments:
    save_all(root / "JPEGImages")
    write_voc(root / "Annotations")
    return {"data": root}


def annots(root: Path) -> Arguments:
    save_all(root / "images")
    write_voc(root / "annots")
    return {"data": root}


def appledouble(root: Path) -> Arguments:
    arguments = plain(root)
    for file in (root / "JPEGImages" / "._p1.jpg", root / "Annotations" / "._p1.xml", root / ".DS_Store"):
        file.write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    return arguments


def spaces_in_a_list(root: Path) -> Arguments:
    arguments = plain(root)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for split, numbers in (("train", range(4)), ("val", range(4, PICTURES))):
        for number in numbers:
            old, new = name_of(number, ""), f"IMG (copy) {number}"
            xml = root / "Annotations" / f"{old}.xml"
            xml.write_text(xml.read_text().replace(f"{old}.jpg", f"{new}.jpg"))
            xml.rename(xml.with_name(f"{new}.xml"))
            (root / "JPEGImages" / f"{old}.jpg").rename(root / "JPEGImages" / f"{new}.jpg")
        (lists / f"{split}.txt").write_text("".join(f"IMG (copy) {n}\n" for n in numbers))
    return arguments


CASES = [
    Case("voc", plain, Reads()),
    Case("voc_annots", annots, Reads()),
    Case("voc_appledouble", appledouble, Reads(), pending="hidden files are read"),
    Case("voc_list_spaces", spaces_in_a_list, Reads(), pending="the list is split at spaces"),
]
