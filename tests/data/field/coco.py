"""COCO: names that other machines wrote, folders that look alike, records that are half right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.data.field.cases import Arguments, Case, Finds, Reads, Refused
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
)


def plain(root: Path) -> Arguments:
    save_all(root / "images")
    write_json(root / "train.json", coco())
    return {"data": root}


def backslashes(root: Path) -> Arguments:
    save_all(root / "JPEGImages")
    write_json(
        root / "train.json", coco(names=[f"JPEGImages\\{name_of(n)}" for n in range(PICTURES)])
    )
    return {"data": root}


def some_backslashes(root: Path) -> Arguments:
    save_all(root / "images")
    names = [rf"..\label\{name_of(n)}" if n % 2 else name_of(n) for n in range(PICTURES)]
    write_json(root / "train.json", coco(names=names))
    return {"data": root}


def no_suffix(root: Path) -> Arguments:
    save_all(root / "images")
    write_json(root / "train.json", coco(names=[name_of(n, "") for n in range(PICTURES)]))
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
        # The objects are painted over
        picture((), number).save(root / "Annotated" / name_of(number))
    write_json(root / "train.json", coco())
    return {"data": root}


def names_for_two_folders(root: Path) -> Arguments:
    """Paths of another machine, whose file names are in two folders, as different pictures."""
    save_all(root / "a" / "x")
    for number in range(PICTURES):
        save(PICTURES - 1 - number, root / "b" / "x" / name_of(number))
    write_json(
        root / "train.json", coco(names=[f"/elsewhere/{name_of(n)}" for n in range(PICTURES)])
    )
    return {"data": root}


def names_of_the_web(root: Path) -> Arguments:
    for number in range(PICTURES):
        save(number, root / "images" / f"é {number}.jpg")
    names = [f"https://example.org/bucket/e%CC%81%20{n}.jpg?alt=media" for n in range(PICTURES)]
    write_json(root / "train.json", coco(names=names))
    return {"data": root}


def any_name(root: Path) -> Arguments:
    save_all(root / "images" / "1")
    write_json(
        root / "result.json", coco(names=[f"/data/upload/1/{name_of(n)}" for n in range(PICTURES)])
    )
    write_json(root / "settings.json", {"images": "1"})
    return {"data": root}


def odd_rows(root: Path) -> Arguments:
    arguments = plain(root)
    content = coco()
    content["images"] += [None, {"id": 99}]
    content["annotations"][0]["bbox"] = [1, 2, "wide", None]
    content["annotations"][1]["bbox"] = [1, 2, 1e308, 1e308]
    content["annotations"].append("a note")
    write_json(root / "train.json", content)
    return arguments


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


def backslashes_in_folders(root: Path) -> Arguments:
    """The same file names in two folders."""
    names = [f"{'ab'[n % 2]}\\{n // 2}.jpg" for n in range(PICTURES)]
    for number, name in enumerate(names):
        save(number, root / "images" / name.replace("\\", "/"))
    write_json(root / "train.json", coco(names=names))
    return {"data": root}


def beside_captions(root: Path) -> Arguments:
    """COCO's other kinds of files:
    keypoints have boxes, captions and segments of the whole picture have not.
    """
    save_all(root / "images")
    kinds = {"person_keypoints": coco(), "captions": {"images": [], "annotations": []}}
    kinds["panoptic"] = coco() | {"annotations": [{"image_id": 1, "segments_info": []}]}
    for kind, content in kinds.items():
        write_json(root / "annotations" / f"{kind}_train2017.json", content)
    return {"data": root}


def malformed(old: str, new: str) -> Callable[[Path], Arguments]:
    def build(root: Path) -> Arguments:
        file = plain(root)["data"] / "train.json"
        file.write_text(file.read_text().replace(old, new, 1))
        return {"data": root}

    return build


BY_HAND = Refused(("malformed JSON", "line 1", "no comments, no comma behind the last entry"))
ODD = frozenset({"malformed-image", "malformed-annotation", "bad-box"})

CASES = [
    Case("coco", plain, Reads()),
    Case("coco_backslash", backslashes, Reads()),
    Case("coco_backslash_mixed", some_backslashes, Reads()),
    Case("coco_case", other_case, Reads()),
    Case("coco_no_suffix", no_suffix, Reads(finds=frozenset({"renamed-file"}))),
    Case("coco_two_folders", drawn_beside, Reads()),
    Case("coco_two_places", names_for_two_folders, Refused(("a/x", "b/x", "--train-images"))),
    Case("coco_url", names_of_the_web, Reads(finds=frozenset({"renamed-file"}))),
    Case("coco_any_name", any_name, Reads(finds=frozenset({"renamed-file", "layout"}))),
    Case("coco_odd_rows", odd_rows, Finds(ODD, PICTURES - 1, OBJECTS - len(TRUTH[0]))),
    Case("coco_dup_cat_id", category_twice, Finds(frozenset({"duplicate-category-id"}), 2, 2)),
    Case("coco_backslash_folders", backslashes_in_folders, Reads()),
    Case(
        "coco_beside_captions", beside_captions, Reads(finds=frozenset({"layout", "unused-files"}))
    ),
    Case("coco_comment", malformed("{", "// mine\n{"), BY_HAND),
    Case("coco_raw_backslash", malformed("p0", "sub\\p0"), BY_HAND),
    Case("coco_seg_some", some_only_outlined, Reads()),
]
