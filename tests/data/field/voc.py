"""Pascal VOC: folders, encodings, lists and names as tools write them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.data.field.cases import Arguments, Case, Finds, Reads, Refused
from tests.data.field.pictures import (
    OBJECTS,
    PICTURES,
    TRUTH,
    name_of,
    picture,
    save,
    save_all,
    voc_xml,
    write_voc,
)

ONE_LESS = (PICTURES - 1, OBJECTS - len(TRUTH[0]))  # without the first picture


def plain(root: Path) -> Arguments:
    save_all(root / "JPEGImages")
    write_voc(root / "Annotations")
    return {"data": root}


def folders(xml: str, images: str) -> Callable[[Path], Arguments]:
    def build(root: Path) -> Arguments:
        save_all(root / images)
        write_voc(root / xml)
        return {"data": root}

    return build


def fiftyone(root: Path) -> Arguments:
    return folders("labels", "data")(root)


def given_images(root: Path) -> Arguments:
    folders("a/b/c/set/xml", "elsewhere/x")(root)
    images = root / "elsewhere" / "x"
    return {"data": root / "a" / "b" / "c" / "set", "train_images": images, "val_images": images}


def folder_of_xml(root: Path) -> Arguments:
    folders("somewhere", "elsewhere/x")(root)
    return {"train": root / "somewhere", "train_images": root / "elsewhere" / "x"}


def subfolders(root: Path) -> Arguments:
    for place, numbers in (("seq1", range(3)), ("seq2", range(3, PICTURES))):
        for number in numbers:
            name = f"{number % 3:04d}"  # the same names in both
            save(number, root / "JPEGImages" / place / f"{name}.jpg")
            (root / "Annotations" / place).mkdir(parents=True, exist_ok=True)
            (root / "Annotations" / place / f"{name}.xml").write_text(
                voc_xml(number, f"{name}.jpg")
            )
    return {"data": root}


def subfolders_of_splits(root: Path) -> Arguments:
    subfolders(root)
    for old, new in (("seq1", "train"), ("seq2", "val")):
        for folder in ("Annotations", "JPEGImages"):
            (root / folder / old).rename(root / folder / new)
    return {"data": root}


def upper_case(root: Path) -> Arguments:
    arguments = plain(root)
    for number in range(3):
        file = root / "Annotations" / name_of(number, ".xml")
        file.rename(file.with_suffix(".XML"))
    return arguments


def flat(root: Path) -> Arguments:
    save_all(root)
    write_voc(root)
    return {"data": root}


def stray_picture(root: Path) -> Arguments:
    arguments = plain(root)
    save(0, root / "Annotations" / "preview.png")
    return arguments


def drawn_beside(root: Path) -> Arguments:
    folders("Annotations", "pics")(root)
    for number in range(PICTURES):
        (root / "Annotated").mkdir(exist_ok=True)
        picture((), number).save(root / "Annotated" / name_of(number, ".png"))
    return {"data": root}


def drawn_beside_alike(root: Path) -> Arguments:
    folders("Annotations", "pics")(root)
    shutil.copytree(root / "pics", root / "Annotated")
    return {"data": root}


def appledouble(root: Path) -> Arguments:
    arguments = plain(root)
    for file in (
        root / "JPEGImages" / "._p1.jpg",
        root / "Annotations" / "._p1.xml",
        root / ".DS_Store",
    ):
        file.write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    return arguments


def paths_in_gbk(root: Path) -> Arguments:
    """As tools on Windows write them:
    the path of their machine in its own encoding, which nothing declares.
    """
    arguments = plain(root)
    for number in range(PICTURES):
        text = voc_xml(number).replace("<size>", "<path>C:\\数据\\猫.jpg</path><size>", 1)
        (root / "Annotations" / name_of(number, ".xml")).write_bytes(text.encode("gb18030"))
    return arguments


def names_in_gbk(root: Path) -> Arguments:
    arguments = plain(root)
    text = voc_xml(0).replace("<name>cat", "<name>狗")
    (root / "Annotations" / name_of(0, ".xml")).write_bytes(text.encode("gb18030"))
    return arguments


def suffix_left_out(root: Path) -> Arguments:
    """`<filename>p0</filename>`, which p0.jpg and p0.png both may be."""
    arguments = plain(root)
    picture((), 0).save(root / "JPEGImages" / name_of(0, ".png"))
    (root / "Annotations" / name_of(0, ".xml")).write_text(voc_xml(0, "p0"))
    return arguments


def odd_first(content: bytes) -> Callable[[Path], Arguments]:
    def build(root: Path) -> Arguments:
        arguments = plain(root)
        (root / "Annotations" / name_of(0, ".xml")).write_bytes(content)
        return arguments

    return build


def unlabelled(root: Path) -> Arguments:
    arguments = plain(root)
    (root / "Annotations" / name_of(0, ".xml")).unlink()
    return arguments


def no_picture(root: Path) -> Arguments:
    arguments = plain(root)
    (root / "JPEGImages" / name_of(0)).unlink()
    return arguments


def same_stem(root: Path) -> Arguments:
    arguments = plain(root)
    picture((), 9).save(root / "JPEGImages" / name_of(0, ".png"))
    return arguments


def same_stem_stale(root: Path) -> Arguments:
    arguments = same_stem(root)
    (root / "Annotations" / name_of(0, ".xml")).write_text(voc_xml(0, "IMG_1.jpg"))
    return arguments


def renamed(root: Path) -> Arguments:
    """`filename` says what the pictures were called once; the XML files were renamed with them."""
    arguments = plain(root)
    for number in range(PICTURES):
        old = name_of((number + 1) % PICTURES)
        (root / "Annotations" / name_of(number, ".xml")).write_text(
            voc_xml(number, f"C:\\pics\\{old}")
        )
    return arguments


def by_file_name(root: Path) -> Arguments:
    """The XML files are called otherwise, and `filename` counts, in another case too."""
    save_all(root / "images")
    for number in range(PICTURES):
        (root / "xml").mkdir(exist_ok=True)
        (root / "xml" / f"anno_{number}.xml").write_text(
            voc_xml(number, name_of(number, ".JPG" if number else ".png"))
        )
    return {"data": root}


def decimals(root: Path) -> Arguments:
    """As CVAT writes them: corners are edges."""
    save_all(root / "JPEGImages")
    (root / "Annotations").mkdir()
    for number, boxes in enumerate(TRUTH):
        objects = "".join(
            f"<object><name>{b.name}</name><bndbox><xmin>{b.x + 0.25}</xmin><ymin>{b.y + 0.25}</ymin>"
            f"<xmax>{b.x + b.w}.0</xmax><ymax>{b.y + b.h}.0</ymax></bndbox></object>"
            for b in boxes
        )
        xml = f"<annotation><filename>{name_of(number)}</filename>{objects}</annotation>"
        (root / "Annotations" / name_of(number, ".xml")).write_text(xml)
    return {"data": root}


def encoded(root: Path) -> Arguments:
    save_all(root / "JPEGImages")
    for number in range(PICTURES):
        encoding, declared = (("gb18030", "gb2312"), ("utf-16", "utf-16"), ("utf-8", "utf-16"))[
            number % 3
        ]
        xml = f'<?xml version="1.0" encoding="{declared}"?>' + voc_xml(number).replace(
            "<size>", "<x>狗</x><size>"
        )
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / name_of(number, ".xml")).write_bytes(xml.encode(encoding))
    return {"data": root}


def listed(old: str, train: str, val: str = "") -> Callable[[Path], Arguments]:
    """Names and the lines of the lists by pattern, "{}" for the number."""

    def build(root: Path) -> Arguments:
        arguments = plain(root)
        lists = root / "ImageSets" / "Main"
        lists.mkdir(parents=True)
        for split, numbers, line in (
            ("train", range(4), train),
            ("val", range(4, PICTURES), val or train),
        ):
            for number in numbers:
                stem, new = name_of(number, ""), old.format(number)
                xml = root / "Annotations" / f"{stem}.xml"
                xml.write_text(xml.read_text().replace(f"{stem}.jpg", f"{new}.jpg"))
                xml.rename(xml.with_name(f"{new}.xml"))
                (root / "JPEGImages" / f"{stem}.jpg").rename(root / "JPEGImages" / f"{new}.jpg")
            text = "".join(f"{line.format(n)}\r\n" for n in numbers)
            (lists / f"{split}.txt").write_bytes(text.encode("utf-8-sig"))
        return arguments

    return build


def listed_but_missing(root: Path) -> Arguments:
    arguments = listed("p{}", "p{}")(root)
    (root / "Annotations" / name_of(0, ".xml")).unlink()
    return arguments


def listed_by_name_alone(root: Path) -> Arguments:
    """0000 of a list could be in either sub-folder."""
    subfolders(root)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0000\nseq1/0001\nseq2/0001\n")
    return {"data": root}


def lists_at(name: str, line: str = "p{}") -> Callable[[Path], Arguments]:
    """Lists in other places: `name` has the split, "{}"."""

    def build(root: Path) -> Arguments:
        arguments = plain(root)
        for split, numbers in (("train", range(4)), ("val", range(4, PICTURES))):
            file = root / name.format(split)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{line.format(n)}\n" for n in numbers))
        return arguments

    return build


def lists_of_classes(root: Path) -> Arguments:
    lists_at("ImageSets/Main/cat_{}.txt", "p{}  1")(root)
    return lists_at("ImageSets/Main/dog_{}.txt", "p{} -1")(root)


def lists_of_classes_that_differ(root: Path) -> Arguments:
    lists_of_classes(root)
    (root / "ImageSets" / "Main" / "dog_train.txt").write_text("p0 1\n")
    return {"data": root}


def dialect(
    old: str, new: str, numbers: Iterable[int] = range(PICTURES)
) -> Callable[[Path], Arguments]:
    """Something in the XML is written in another way."""

    def build(root: Path) -> Arguments:
        arguments = plain(root)
        for number in numbers:
            file = root / "Annotations" / name_of(number, ".xml")
            text = file.read_text()
            assert old in text
            file.write_text(text.replace(old, new))
        return arguments

    return build


def by_path(root: Path) -> Arguments:
    """The XML has names of its own, and `path` in place of `filename`."""
    dialect("filename>", "path>")(root)
    for number in range(PICTURES):
        file = root / "Annotations" / name_of(number, ".xml")
        file.rename(file.with_name(f"ann_{number}.xml"))
    return {"data": root}


SPLITS = frozenset({"unused-files"})  # the lists of other classes, and not "layout"
UNKNOWN = Finds(frozenset({"unreadable-labels"}), *ONE_LESS)
SIMILAR = frozenset({"similar-class-names"})
LISTED = len(TRUTH[1]) + len(TRUTH[4])
NAMELESS = b"<annotation><filename>p0.jpg</filename><object><name/></object></annotation>"

CASES = [
    Case("voc", plain, Reads()),
    Case("voc_annots", folders("annots", "images"), Reads()),
    Case("voc_xmls", folders("annotations/xmls", "images"), Reads()),
    Case("voc_own_names", folders("my_boxes", "my_pics"), Reads()),
    Case("voc_deeper", folders("set/Annotations", "set/JPEGImages"), Reads()),
    Case("voc_fiftyone", fiftyone, Reads()),
    Case("voc_given_images", given_images, Reads()),
    Case("voc_folder_of_xml", folder_of_xml, Reads()),
    Case("voc_subfolders", subfolders, Reads()),
    Case("voc_subfolders_of_splits", subfolders_of_splits, Reads()),
    Case("voc_upper_case", upper_case, Reads()),
    Case("voc_flat", flat, Reads()),
    Case("voc_stray_picture", stray_picture, Reads()),
    Case("voc_drawn_beside", drawn_beside, Reads()),
    Case(
        "voc_drawn_beside_alike",
        drawn_beside_alike,
        Refused(("Annotated", "pics", "--train-images")),
    ),
    Case("voc_appledouble", appledouble, Reads()),
    Case("voc_malformed", odd_first(b"<annotation><object>"), UNKNOWN),
    Case("voc_other_xml", odd_first(b"<project/>"), UNKNOWN),
    Case("voc_nameless", odd_first(NAMELESS), UNKNOWN),
    Case("voc_empty_file", odd_first(b""), UNKNOWN),
    Case(
        "voc_unknown_encoding",
        odd_first(b'<?xml version="1.0" encoding="x"?><annotation/>'),
        UNKNOWN,
    ),
    Case("voc_listed_but_missing", listed_but_missing, UNKNOWN),
    Case("voc_unlabelled", unlabelled, Finds(frozenset({"unlabelled-images"}), *ONE_LESS)),
    Case("voc_no_picture", no_picture, Finds(frozenset({"missing-image"}), *ONE_LESS)),
    Case("voc_same_stem", same_stem, Reads(finds=frozenset({"unlabelled-images"}))),
    Case(
        "voc_same_stem_stale",
        same_stem_stale,
        Finds(frozenset({"missing-image", "unclear-file"}), *ONE_LESS),
    ),
    Case("voc_undeclared_path", paths_in_gbk, Reads()),
    Case("voc_undeclared_name", names_in_gbk, UNKNOWN),
    Case(
        "voc_suffix_left_out",
        suffix_left_out,
        Finds(frozenset({"missing-image", "unclear-file"}), *ONE_LESS),
    ),
    Case("voc_renamed", renamed, Reads()),
    Case("voc_by_file_name", by_file_name, Reads(finds=frozenset({"renamed-file"}))),
    Case("voc_decimals", decimals, Reads()),
    Case("voc_encoded", encoded, Reads()),
    Case("voc_list_spaces", listed("IMG (copy) {}", "IMG (copy) {}"), Reads()),
    Case("voc_list_flags", listed("my photo {}", "my photo {}  1", "my photo {} -1"), Reads()),
    Case(
        "voc_list_unclear", listed_by_name_alone, Finds(frozenset({"unreadable-labels"}), 2, LISTED)
    ),
    Case("voc_lists_upper_case", lists_at("IMAGESETS/MAIN/{}.TXT"), Reads()),
    Case(
        "voc_lists_at_the_top",
        lists_at("{}.txt", "JPEGImages/p{0}.jpg Annotations/p{0}.xml"),
        Reads(),
    ),
    Case("voc_lists_of_classes", lists_of_classes, Reads(finds=SPLITS)),
    Case(
        "voc_lists_differ",
        lists_of_classes_that_differ,
        Refused(("cat_train.txt", "train.txt, one image a line")),
    ),
    Case("voc_namespace", dialect("<annotation>", '<annotation xmlns="http://a.b/c">'), Reads()),
    Case("voc_capitals", dialect("name>", "Name>"), Reads()),
    Case("voc_by_path", by_path, Reads()),
    Case(
        "voc_comma", dialect("</xmin>", ",0</xmin>", (0,)), Finds(frozenset({"bad-box"}), *ONE_LESS)
    ),
    Case("voc_letters_not_seen", dialect("<name>cat<", "<name>cat\u200b<", (0,)), Finds(SIMILAR)),
    Case("voc_list_suffix", listed("a.b {}", "a.b {}.jpg"), Reads()),
    Case(
        "voc_list_paths",
        listed("p{}", "/home/me/JPEGImages/p{}.jpg", "JPEGImages\\p{}.jpg"),
        Reads(),
    ),
]
