"""The doctor: a data set spoiled in every way;
each is found, refused, survived with `skip_bad`, and fixed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from detrellis.data.annotations import Annotations
from detrellis.data.decode import ORIENTATION, read_image
from detrellis.data.doctor.boxes import Capacity
from detrellis.data.doctor.check import check, prepare, prepare_split
from detrellis.data.doctor.drop import PARTIAL, WITH_IMAGE
from detrellis.data.doctor.fix import AREA, SWAPPED, fix
from detrellis.data.doctor.report import Report
from detrellis.data.findings import RULES, Finding
from detrellis.data.layout import DataSource, resolve
from detrellis.errors import UserError
from tests.data.sets import COUNTS, HEIGHT, WIDTH, CocoSet, picture, write_voc, write_yolo

SHARED = Path(__file__).parents[4] / "shared" / "data"
Spoil = Callable[[CocoSet], object]


@dataclass
class Case:
    """One way to spoil a set, and what the doctor must say."""

    code: str
    spoil: Spoil
    file: str  # end of the file's path
    id: int | None
    what: str = ""  # part of the finding's text
    split: str = "train"
    full: bool = False  # only decoding shows it
    count: int = 1
    fixable: bool = True  # whether the copy is free of it


def set_box(row: int, **values: Any) -> Spoil:
    return lambda made: made.box(row).update(values)


def set_boxes(function: Callable[[list[float]], list[float]]) -> Spoil:
    def spoil(made: CocoSet) -> None:
        for row in made.content["train"]["annotations"]:
            row["bbox"] = function(row["bbox"])

    return spoil


def set_image(number: int, **values: Any) -> Spoil:
    return lambda made: made.listed(number).update(values)


def file_content(make: Callable[[bytes], bytes]) -> Spoil:
    def spoil(made: CocoSet) -> None:
        path = made.image("train", 1)
        path.write_bytes(make(path.read_bytes()))

    return spoil


def saved_as(image: Image.Image, **options: Any) -> Spoil:
    def spoil(made: CocoSet) -> None:
        made.listed(1)["file_name"] = "odd.png"
        image.save(made.image("train", 1).with_name("odd.png"), **options)

    return spoil


def turned(orientation: int, listed: tuple[int, int]) -> Spoil:
    """A 32 x 48 file with an EXIF tag; `listed` is (height, width) in the annotations."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation

    def spoil(made: CocoSet) -> None:
        saved_as(picture(9), exif=exif)(made)
        made.listed(1).update(height=listed[0], width=listed[1])

    return spoil


def listed_twice(made: CocoSet) -> None:
    made.add_image(2, id=777)
    made.add_box(3, image_id=777)  # the copy of a box that the first record has
    made.add_box(3, image_id=777, bbox=[1, 2, 3, 4])  # and one that it lacks


def no_boxes(split: str) -> Spoil:
    return lambda made: made.content[split].update(annotations=[])


def categories(*splits: str, **changes: str) -> Spoil:
    """Renames, e.g. `cat="kitten"`."""

    def spoil(made: CocoSet) -> None:
        for row in [row for split in splits for row in made.content[split]["categories"]]:
            row["name"] = changes.get(row["name"], row["name"])

    return spoil


def without(name: str) -> Spoil:
    def spoil(made: CocoSet) -> None:
        own = next(c["id"] for c in made.content["train"]["categories"] if c["name"] == name)
        content = made.content["train"]
        content["annotations"] = [
            row for row in content["annotations"] if row["category_id"] != own
        ]

    return spoil


def val_only_class(made: CocoSet) -> None:
    made.content["val"]["categories"].append({"id": 5, "name": "fox"})
    made.add_box(0, "val", category_id=5)


def unused_class(made: CocoSet) -> None:
    for split in COUNTS:
        made.content[split]["categories"].append({"id": 5, "name": "fox"})


def copy_image(to_split: str, name: str) -> Spoil:
    def spoil(made: CocoSet) -> None:
        shutil.copy(made.image("train", 1), made.root / "images" / to_split / name)
        made.listed(1, to_split)["file_name"] = name

    return spoil


def same_in_val_by_path(made: CocoSet) -> None:
    made.image("val", 1).unlink()
    os.link(made.image("train", 1), made.image("val", 1))


def shares(box: list[float]) -> list[float]:
    return [box[0] / WIDTH, box[1] / HEIGHT, box[2] / WIDTH, box[3] / HEIGHT]


def corners(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


TRAIN_JSON = "instances_train.json"
DARK = Image.fromarray(np.full((HEIGHT, WIDTH), 3000, dtype=np.uint16))

CASES = {
    "missing image": Case(
        "missing-image", lambda s: s.image("train", 1).unlink(), "train_1.jpg", 20, "no such file"
    ),
    "other suffix": Case(
        "missing-image", set_image(1, file_name="train_1.png"), "train_1.png", 20, "is train_1.jpg"
    ),
    "image is folder": Case("missing-image", set_image(1, file_name="../train"), "train", 20),
    "empty file": Case(
        "unreadable-image", file_content(lambda data: b""), "train_1.jpg", 20, "0 bytes"
    ),
    "truncated": Case(
        "unreadable-image",
        file_content(lambda data: data[: len(data) // 2]),
        "train_1.jpg",
        20,
        "truncated",
        full=True,
    ),
    "not an image": Case(
        "unreadable-image",
        file_content(lambda data: b"<html>"),
        "train_1.jpg",
        20,
        "not an image",
        full=True,
    ),
    "float image": Case(
        "unreadable-image",
        lambda s: Image.fromarray(np.ones((HEIGHT, WIDTH), dtype=np.float32)).save(
            s.image("train", 1), "TIFF"
        ),
        "train_1.jpg",
        20,
        "floating-point",
        full=True,
    ),
    "wrong size": Case("wrong-size", set_image(1, width=50), "train_1.jpg", 20, "48x32", full=True),
    "swapped size": Case(
        "wrong-size",
        set_image(0, width=HEIGHT, height=WIDTH),
        "train_0.jpg",
        10,
        "32x48",
        full=True,
    ),
    "image id twice": Case(
        "duplicate-image-id",
        lambda s: s.add_image(4, id=20),
        "train_4.jpg",
        20,
        "used 2 times",
        count=2,
    ),
    "image record twice": Case(
        "duplicate-image-id", lambda s: s.add_image(1), "train_1.jpg", 20, "used 2 times"
    ),
    "file twice": Case(
        "duplicate-file", listed_twice, "train_2.jpg", 777, "image 30 and image 777"
    ),
    "annotation id twice": Case(
        "duplicate-annotation-id", set_box(3, id=2), TRAIN_JSON, 2, "used 2 times"
    ),
    "unknown image": Case("unknown-image", set_box(1, image_id=999), TRAIN_JSON, 2, "image_id 999"),
    "unknown category": Case(
        "unknown-category", set_box(1, category_id=4), TRAIN_JSON, 2, "category 4"
    ),
    "nan box": Case("bad-box", set_box(1, bbox=[1, float("nan"), 2, 3]), TRAIN_JSON, 2, "nan"),
    "infinite box": Case("bad-box", set_box(1, bbox=[1, 2, float("inf"), 3]), TRAIN_JSON, 2, "inf"),
    "null box": Case("bad-box", set_box(1, bbox=None, segmentation=[]), TRAIN_JSON, 2, "but null"),
    "short box": Case("bad-box", set_box(1, bbox=[1, 2, 3]), TRAIN_JSON, 2),
    "text box": Case("bad-box", set_box(1, bbox=[1, 2, 3, "x"]), TRAIN_JSON, 2, '[1, 2, 3, "x"]'),
    "zero width": Case(
        "empty-box", set_box(1, bbox=[1, 2, 0, 3]), TRAIN_JSON, 2, "[1, 2, 0, 3] in train_0.jpg"
    ),
    "negative height": Case(
        "empty-box", set_box(1, bbox=[9, 9, 3, -3]), TRAIN_JSON, 2, "[9, 9, 3, -3]"
    ),
    "outside": Case("outside-box", set_box(1, bbox=[48, 2, 5, 5]), TRAIN_JSON, 2, "48x32"),
    "outside on the left": Case("outside-box", set_box(1, bbox=[-9, 2, 9, 5]), TRAIN_JSON, 2),
    "partly outside": Case(
        "clipped-box", set_box(1, bbox=[40, 2, 20, 5]), TRAIN_JSON, 2, "12 pixels beyond"
    ),
    "rounding": Case("clipped-rounding", set_box(1, bbox=[40, 2, 8.4, 5]), TRAIN_JSON, None),
    "normalised": Case(
        "normalised-boxes", set_boxes(shares), TRAIN_JSON, 1, "5 of 5", count=5, fixable=False
    ),
    "one normalised": Case(
        "normalised-boxes",
        set_box(1, bbox=[0.2, 0.3, 0.4, 0.4]),
        TRAIN_JSON,
        2,
        "1 of 5",
        fixable=False,
    ),
    "corners": Case("xyxy-boxes", set_boxes(corners), TRAIN_JSON, 2, "1 of 5", fixable=False),
    "no area": Case("missing-area", lambda s: s.box(1).pop("area"), TRAIN_JSON, None, "1 of 5"),
    "copied box": Case(
        "duplicate-box", lambda s: s.add_box(1), TRAIN_JSON, 6, "the same as annotation 2"
    ),
    "no boxes": Case(
        "no-annotations", no_boxes("train"), TRAIN_JSON, None, "5 images and not one", fixable=False
    ),
    "no boxes in val": Case(
        "no-annotations",
        no_boxes("val"),
        "instances_val.json",
        None,
        "3 images",
        split="val",
        fixable=False,
    ),
    "no images": Case(
        "no-images",
        lambda s: s.content["train"].update(images=[], annotations=[]),
        TRAIN_JSON,
        None,
        "no images",
        fixable=False,
    ),
    "other name": Case(
        "class-mismatch",
        categories("val", dog="wolf"),
        "instances_val.json",
        17,
        "'wolf' here and is 'dog'",
        split="val",
    ),
    "swapped names": Case(
        "class-mismatch",
        categories("val", dog="cat", cat="dog"),
        "instances_val.json",
        3,
        "there 'dog' is 17",
        split="val",
        count=2,
    ),
    "class of val": Case(
        "unknown-class", val_only_class, "instances_val.json", 5, "'fox'", split="val"
    ),
    "unused class": Case("class-never-seen", unused_class, TRAIN_JSON, 5, "'fox'", fixable=False),
    "class only in val": Case(
        "class-only-in-val",
        without("emu"),
        TRAIN_JSON,
        90,
        "'emu' (id 90; val has 1)",
        fixable=False,
    ),
    "one name twice": Case(
        "duplicate-class-name",
        categories("train", "val", dog="cat"),
        TRAIN_JSON,
        3,
        "ids 3, 17",
        count=2,
        fixable=False,
    ),
    "in val by path": Case("shared-image", same_in_val_by_path, "train_1.jpg", 20, "val_1.jpg"),
    "in val by name": Case(
        "shared-image", copy_image("val", "train_1.jpg"), "train_1.jpg", 20, "val/train_1.jpg"
    ),
    "in val by content": Case(
        "shared-image", copy_image("val", "x.jpg"), "train_1.jpg", 20, "val/x.jpg", full=True
    ),
    "same content": Case(
        "same-content",
        lambda s: shutil.copy(s.image("train", 1), s.image("train", 2)),
        "train_2.jpg",
        30,
        "as train_1.jpg",
        full=True,
        fixable=False,
    ),
    "grey": Case(
        "unusual-mode",
        saved_as(picture(9).convert("L")),
        "odd.png",
        20,
        "mode L",
        full=True,
        fixable=False,
    ),
    "alpha": Case(
        "unusual-mode",
        saved_as(picture(9).convert("RGBA")),
        "odd.png",
        20,
        "over white",
        full=True,
        fixable=False,
    ),
    "16 bits": Case(
        "unusual-mode", saved_as(DARK), "odd.png", 20, "of 16 bits", full=True, fixable=False
    ),
    "dark 16 bits": Case(
        "dark-16-bit", saved_as(DARK), "odd.png", 20, "0 to 11 of 255", full=True, fixable=False
    ),
    "exif upright": Case(
        "exif-rotated",
        turned(6, (WIDTH, HEIGHT)),
        "odd.png",
        20,
        "is applied",
        full=True,
        fixable=False,
    ),
    "exif as stored": Case(
        "exif-rotated",
        turned(6, (HEIGHT, WIDTH)),
        "odd.png",
        20,
        "not applied",
        full=True,
        fixable=False,
    ),
    "exif upside down": Case(
        "exif-ambiguous",
        turned(3, (HEIGHT, WIDTH)),
        "odd.png",
        20,
        "cannot tell",
        full=True,
        fixable=False,
    ),
    "exif wrong size": Case("wrong-size", turned(6, (30, 30)), "odd.png", 20, "32x48", full=True),
}

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
WRONG = {name: case for name, case in CASES.items() if RULES[case.code].severity == "error"}
QUICK = {name: case for name, case in WRONG.items() if not case.full}
errors = pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
quick_errors = pytest.mark.parametrize("case", QUICK.values(), ids=QUICK)


def spoiled(case: Case, root: Path) -> DataSource:
    made = CocoSet(root)
    case.spoil(made)
    return resolve(
        train=made.write() / "annotations" / TRAIN_JSON,
        train_images=root / "images" / "train",
        val=made.file("val"),
        val_images=root / "images" / "val",
    )


def printed(report: Report, width: int = 100) -> str:
    console = Console(width=width, file=StringIO())
    console.print(report.table())
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def with_code(report: Report, code: str) -> list[Finding]:
    return [f for f in report.findings if f.code == code]


def test_a_good_set_has_nothing_but_its_background_images(tmp_path: Path) -> None:
    report = check(resolve(data=CocoSet(tmp_path).write()))
    assert [(f.code, f.split, f.count) for f in report.findings] == [
        ("images-without-boxes", "train", 1),
        ("images-without-boxes", "val", 1),
    ]
    assert report.exit_code == 0


@cases
def test_it_is_found_and_named(tmp_path: Path, case: Case) -> None:
    source = spoiled(case, tmp_path)
    report = check(source, fast=not case.full)
    found = with_code(report, case.code)
    assert found, [f.code for f in report.findings]
    named = next(
        f for f in found if f.file.endswith(case.file) and f.id == case.id and case.what in f.what
    )
    assert sum(f.count for f in found) == case.count
    assert named.split == case.split
    assert named.remedy
    assert report.exit_code == (named.severity == "error" or bool(report.errors))
    assert case.code in printed(report)
    listed = json.loads(json.dumps(report.to_dict()))["findings"]
    told = {
        "code": named.code,
        "file": named.file,
        "id": named.id,
        "what": named.what,
        "remedy": named.remedy,
    }
    assert any(told.items() <= row.items() for row in listed)


@cases
def test_decoding_is_needed_only_where_said(tmp_path: Path, case: Case) -> None:
    found = with_code(check(spoiled(case, tmp_path), fast=True), case.code)
    assert bool(found) != case.full


def assert_trainable(annotations: Annotations) -> None:
    assert len(annotations.ids) > 0
    assert len(np.unique(annotations.image_ids)) == len(annotations)
    assert len(np.unique(annotations.ids)) == len(annotations.ids)
    assert annotations.starts[-1] == len(annotations.boxes)
    assert np.isfinite(annotations.boxes).all()
    assert (annotations.boxes[:, 2:] > 0).all()
    frames = annotations.sizes[np.repeat(np.arange(len(annotations)), np.diff(annotations.starts))]
    assert (annotations.boxes[:, :2] >= 0).all()
    assert (annotations.boxes[:, :2] + annotations.boxes[:, 2:] <= frames[:, ::-1]).all()
    assert (annotations.labels >= 0).all()
    assert (annotations.labels < len(annotations.classes)).all()
    for i, (height, width) in enumerate(annotations.sizes.tolist()):
        assert read_image(annotations.path(i), (height, width)).shape == (3, height, width)


@quick_errors
def test_training_is_refused_in_the_same_words(tmp_path: Path, case: Case) -> None:
    source = spoiled(case, tmp_path)
    found = next(f for f in check(source, fast=True).findings if f.code == case.code)
    with pytest.raises(UserError) as error:
        prepare(source)
    for words in (
        case.code,
        found.what,
        "" if found.id is None else f"id {found.id}",
        Path(found.file).name,
    ):
        assert words in error.value.message
    assert "--skip-bad" in error.value.remedy


@errors
def test_skip_bad_survives_it(tmp_path: Path, case: Case) -> None:
    source = spoiled(case, tmp_path)
    if case.code in ("no-annotations", "no-images"):
        with pytest.raises(UserError, match=f"no box of {case.split} is left"):
            prepare(source, skip_bad=True)
        return
    train, val, classes, report = prepare(source, skip_bad=True)
    assert val is not None
    assert_trainable(train)
    assert_trainable(val)
    assert train.classes is val.classes is classes
    assert case.code in report.skipped[case.split]


@pytest.mark.parametrize("case", [c for c in CASES.values() if RULES[c.code].severity != "error"])
def test_warnings_do_not_stop_training(tmp_path: Path, case: Case) -> None:
    train, val, _, report = prepare(spoiled(case, tmp_path))
    assert val is not None
    assert_trainable(train)
    assert_trainable(val)
    assert not report.skipped


@cases
def test_the_fixed_copy_is_clean(tmp_path: Path, case: Case) -> None:
    source = spoiled(case, tmp_path / "set")
    report = check(source)
    before = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}
    if case.code in ("no-annotations", "no-images"):
        with pytest.raises(UserError, match=f"nothing is left of {case.split}"):
            fix(source, report, tmp_path / "fixed")
        assert not (tmp_path / "fixed").exists()
        return
    fixed = fix(source, report, tmp_path / "fixed")
    again = check(resolve(data=tmp_path / "fixed"))
    assert {
        path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()
    } == before
    assert again.exit_code == 0
    if case.fixable:
        assert not with_code(again, case.code)
        changed = {"missing-area": AREA, "clipped-rounding": "clipped-box"}
        keys = {changed.get(case.code, case.code)} | ({SWAPPED} if "32x48" in case.what else set())
        assert keys & set(fixed.changes[case.split])
    train, val, _, _ = prepare(resolve(train=fixed.files["train"], val=fixed.files["val"]))
    assert val is not None
    assert_trainable(train)
    assert_trainable(val)


def ids_of(source: DataSource, split: str = "train") -> list[int]:
    ids: list[int] = source.load(split).ids.tolist()
    return ids


def kept(tmp_path: Path, name: str) -> DataSource:
    """The fixed copy of one case."""
    source = spoiled(CASES[name], tmp_path / "set")
    return resolve(data=fix(source, check(source), tmp_path / "fixed").out)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("missing image", [1, 2, 4, 5]),
        ("truncated", [1, 2, 4, 5]),
        ("unknown image", [1, 3, 4, 5]),
        ("nan box", [3, 4, 5]),  # 1 was in the same image
        ("outside", [3, 4, 5]),
        ("unknown category", [3, 4, 5]),
        ("partly outside", [1, 2, 3, 4, 5]),
        ("annotation id twice", [1, 2, 3, 6, 5]),
        ("image id twice", [1, 2, 4, 5]),  # nobody knows whose the box of image 20 is
        ("image record twice", [1, 2, 3, 4, 5]),
        ("file twice", [1, 2, 3, 4, 5, 7]),  # 6 is a copy of 4
        ("copied box", [1, 2, 3, 4, 5]),
        ("wrong size", [1, 2, 4, 5]),
        ("in val by name", [1, 2, 4, 5]),
        ("corners", [1, 2, 3, 4, 5]),
    ],
)
def test_nothing_else_is_dropped(tmp_path: Path, name: str, ids: list[int]) -> None:
    assert ids_of(kept(tmp_path, name)) == ids


def test_a_picture_that_lost_an_object_goes_unless_asked_for(tmp_path: Path) -> None:
    """Else it teaches that the object is not there."""
    source = spoiled(CASES["nan box"], tmp_path / "set")
    train, _, _, report = prepare(source, skip_bad=True)
    assert train.image_ids.tolist() == [20, 30, 40, 50]
    assert report.skipped == {"train": {"bad-box": 1, PARTIAL: 1, WITH_IMAGE: 1}}
    train, _, _, report = prepare(source, skip_bad="boxes")
    assert train.image_ids.tolist() == [10, 20, 30, 40, 50]
    assert train.ids.tolist() == [1, 3, 4, 5]
    assert report.skipped == {"train": {"bad-box": 1}}
    fixed = fix(source, check(source), tmp_path / "fixed", keep_partial=True)
    assert ids_of(resolve(data=fixed.out)) == [1, 3, 4, 5]


def test_a_crowd_region_is_no_lost_object(tmp_path: Path) -> None:
    spoil = set_box(1, bbox=[0, 0, -1, 5], iscrowd=1)
    train, _, _, report = prepare(
        spoiled(Case("empty-box", spoil, TRAIN_JSON, 2), tmp_path), skip_bad=True
    )
    assert train.ids.tolist() == [1, 3, 4, 5]
    assert report.skipped == {"train": {"empty-box": 1}}


def test_a_file_listed_twice_keeps_the_boxes_of_both(tmp_path: Path) -> None:
    raw = kept(tmp_path, "file twice").load("train")
    assert raw.boxes[raw.box_image_ids == 30].tolist() == [[8, 8, 16, 16], [1, 2, 3, 4]]
    assert 777 not in raw.image_ids


def test_a_file_listed_twice_is_no_copy(tmp_path: Path) -> None:
    assert not with_code(check(spoiled(CASES["file twice"], tmp_path)), "same-content")


def test_swapped_sizes_are_put_right(tmp_path: Path) -> None:
    raw = kept(tmp_path, "swapped size").load("train")
    assert raw.sizes.tolist() == [[HEIGHT, WIDTH]] * 5
    assert raw.ids.tolist() == [1, 2, 3, 4, 5]


def test_swapped_names_are_mapped_by_name(tmp_path: Path) -> None:
    source = spoiled(CASES["swapped names"], tmp_path / "set")
    _, val, classes, report = prepare(source, skip_bad=True)
    assert val is not None
    # What the val file calls dog has id 3, which is the cat in train.
    assert [classes.names[label] for label in val.labels] == ["emu", "dog", "cat"]
    assert report.skipped["val"] == {"class-mismatch": 2}


def test_one_split_for_a_trained_detector(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    source = resolve(data=made.write())
    classes = prepare(source)[2]
    val, report = prepare_split(source, "val", classes)
    assert val.classes is classes
    assert val.ids.tolist() == [1, 2, 3]
    assert not report.errors
    # The same boxes under other category ids, and one class that the detector has never heard of.
    categories("val", dog="cat", cat="dog", emu="fox")(made)
    made.write()
    with pytest.raises(UserError, match="3 class-mismatch in val"):
        prepare_split(source, "val", classes)
    val, report = prepare_split(source, "val", classes, skip_bad=True)
    assert [classes.names[label] for label in val.labels] == ["dog", "cat"]
    assert report.skipped["val"] == {"class-mismatch": 3}


def test_a_renamed_class_is_left_out(tmp_path: Path) -> None:
    _, val, classes, _ = prepare(spoiled(CASES["other name"], tmp_path), skip_bad=True)
    assert val is not None
    assert [classes.names[label] for label in val.labels] == ["emu", "cat"]


def test_the_copy_keeps_what_we_do_not_read(tmp_path: Path) -> None:
    source = spoiled(CASES["nan box"], tmp_path / "set")
    fixed = fix(source, check(source), tmp_path / "fixed")
    content = json.loads(fixed.files["train"].read_text())
    assert [row["segmentation"][0][0] for row in content["annotations"]] == [0, 8, 2]
    assert content["categories"][0]["supercategory"] == "animal"
    assert content["images"][0]["file_name"] == "train_1.jpg"
    assert content["info"]["image_root"] == str(tmp_path / "set" / "images" / "train")
    assert "bad-box: 1" in fixed.text()


def test_the_copy_overwrites_nothing(tmp_path: Path) -> None:
    source = resolve(data=CocoSet(tmp_path / "set").write())
    report = check(source, fast=True)
    for out in (tmp_path / "set", tmp_path):
        with pytest.raises(UserError, match=r"is there already|an input"):
            fix(source, report, out)
    fixed = fix(source, report, tmp_path / "fixed")
    again = fix(source, report, tmp_path / "fixed")  # over its own copy
    assert again.files == fixed.files
    copy = resolve(data=tmp_path / "fixed")
    with pytest.raises(UserError, match="an input"):
        fix(copy, check(copy, fast=True), tmp_path / "fixed")
    fixed.files["train"].write_text("{}")  # the user's now
    with pytest.raises(UserError, match="has been changed since"):
        fix(source, report, tmp_path / "fixed")


def test_train_as_its_own_val_stays(tmp_path: Path) -> None:
    made = CocoSet(tmp_path / "set")
    made.write()
    source = resolve(train=made.file("train"), val=made.file("train"))
    report = check(source, fast=True)
    assert len(with_code(report, "shared-image")) == 5
    assert report.exit_code == 0
    assert len(resolve(data=fix(source, report, tmp_path / "out").out).load("train")) == 5


def test_ten_thousand_findings_are_one_row_of_the_table(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    for number in range(10_000):
        made.add_box(1, bbox=[1, 2, 0, number + 1])
    report = check(resolve(data=made.write()), fast=True)
    text = printed(report)
    assert "10,000" in text
    assert "and 9,997 more" in text
    assert len(text.splitlines()) < 60
    assert all(len(line) <= 100 for line in text.splitlines())
    assert len(report.to_dict()["findings"]) >= 10_000
    with pytest.raises(UserError) as error:
        prepare(resolve(data=tmp_path))
    assert len(str(error.value)) < 1000


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    places = [made.image("train", n) for n in range(3)]
    for place in places:
        place.unlink()
    places[0].symlink_to("gone/away.jpg")
    places[1].mkdir()
    os.mkfifo(places[2])
    report = check(resolve(data=made.write()))
    said = [f.what for f in with_code(report, "missing-image")]
    assert said == [
        "a broken link to gone/away.jpg",
        "a folder, not a file",
        "a pipe or a device, not a file",
    ]


def test_an_animation_and_a_doubtful_jpeg_are_told(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    pages = [picture(n).convert("P") for n in range(2)]
    pages[0].save(made.image("train", 0), "GIF", save_all=True, append_images=pages[1:])
    data = made.image("train", 1).read_bytes()
    made.image("train", 1).write_bytes(data[:-2] + bytes(range(1, 200)) + data[-2:])
    report = check(resolve(data=made.write()))
    assert with_code(report, "several-pictures")[0].id == 10
    assert with_code(report, "doubtful-jpeg")[0].id == 20
    assert report.exit_code == 0


@pytest.mark.parametrize(
    ("capacity", "words", "helps"),
    [
        (
            Capacity(queries=1, detections=9),
            "2 objects, but the detector has 1 queries",
            "-o detector.queries.count=100 ",
        ),
        (Capacity(1, 1), "has 1 queries", "-o detector.queries.count=100 -o detector.top_k=100 "),
        (
            Capacity(7, 9, each=4),
            "7 queries, and training gives 4 to each object",
            "queries.count=100 ",
        ),
        (Capacity(9, 1), "the detector returns 1 of an image", "; -o detector.top_k=100 "),
        (Capacity(8, 2, each=4), None, ""),
    ],
)
def test_more_objects_than_queries(
    tmp_path: Path, capacity: Capacity, words: str | None, helps: str
) -> None:
    source = resolve(data=CocoSet(tmp_path).write())
    found = [
        f
        for f in check(source, fast=True, capacity=capacity).findings
        if f.code == "too-many-objects"
    ]
    assert len(found) == (2 if words else 0)  # in train and val
    if words:
        assert found[0].id == 10
        assert words in found[0].what
        assert helps in found[0].what
        assert prepare(source, capacity=capacity)[3].text("warning").count(words) == 2


def test_no_threads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="workers = 0"):
        check(resolve(data=CocoSet(tmp_path).write()), workers=0)


def test_all_images_missing_points_at_the_folder(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    made.write()
    source = resolve(data=tmp_path, train_images=tmp_path / "annotations")
    found = with_code(check(source, fast=True), "missing-image")
    assert [f.split for f in found] == ["train"] * 5
    assert "correct the image folder" in found[0].remedy


def test_brackets_in_file_names_are_no_markup(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    made.listed(1)["file_name"] = "a[red]b[/red].jpg"
    made.content["train"]["categories"][0]["name"] = made.content["val"]["categories"][0][
        "name"
    ] = "[/bold]"
    text = printed(check(resolve(data=made.write()), fast=True), width=300)
    assert "a[red]b[/red].jpg" in text
    assert "[/bold]" in text


def test_the_summary(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    made.box(0)["iscrowd"] = 1
    report = check(resolve(data=made.write()), fast=True)
    train = report.to_dict()["splits"][0]
    assert (train["images"], train["boxes"], train["crowd"], train["images_without_boxes"]) == (
        5,
        5,
        1,
        1,
    )
    assert train["box_sizes"] == (4, 1, 0)
    assert train["image_sizes"] == ((WIDTH, HEIGHT),) * 3
    assert {c["name"]: (c["boxes"], c["images"]) for c in train["classes"]} == {
        "cat": (2, 2),
        "dog": (2, 2),
        "emu": (1, 1),
    }


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(resolve(data=CocoSet(tmp_path).write()), progress=True, workers=2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "train images" in err


# YOLO and VOC: the label file and the line are named


def yolo_set(root: Path, line: str) -> DataSource:
    for split in COUNTS:
        write_yolo(root / "images" / split, root / "labels" / split, split)
    (root / "data.yaml").write_text(
        "names: [cat, dog, emu]\ntrain: images/train\nval: images/val\n"
    )
    file = root / "labels" / "train" / "train_0.txt"
    file.write_text(file.read_text() + line + "\n")
    return resolve(data=root)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("0 0.5 0.5 0.1", "malformed-label"),
        ("0 0.5 0.5 0.1 0.1 0.9", "malformed-label"),
        ("0 0.5 0.5 wide 0.1", "malformed-label"),
        ("0.5 0.5 0.5 0.1 0.1", "malformed-label"),
        ("nan 0.5 0.5 0.1 0.1", "malformed-label"),
        ("7 0.5 0.5 0.1 0.1", "unknown-category"),
        ("0 0.5 nan 0.1 0.1", "bad-box"),
        ("0 0.5 0.5 0 0.1", "empty-box"),
        ("0 1.5 0.5 0.1 0.1", "outside-box"),
        ("0 0.9 0.5 0.4 0.1", "clipped-box"),
        ("1 0.5416666666666666 0.3125 0.25 0.5", "duplicate-box"),
    ],
)
def test_yolo_lines_are_named_fixed_and_survived(tmp_path: Path, line: str, code: str) -> None:
    source = yolo_set(tmp_path / "set", line)
    report = check(source)
    (found,) = with_code(report, code)
    assert found.file.endswith("labels/train/train_0.txt")
    assert (found.line, found.id) == (3, None)
    assert "line 3" in printed(report, width=200)
    fixed = fix(source, report, tmp_path / "fixed")
    assert fixed.changes["train"][code] == 1
    assert check(resolve(data=tmp_path / "fixed")).exit_code == 0
    train = prepare(source, skip_bad=True)[0]
    assert_trainable(train)
    assert (b"train_0.jpg" in train.file_names) == (code in ("clipped-box", "duplicate-box"))
    assert_trainable(prepare(source, skip_bad="boxes")[0])


def test_yolo_in_pixels(tmp_path: Path) -> None:
    source = yolo_set(tmp_path, "")
    for number in range(4):
        (tmp_path / "labels" / "train" / f"train_{number}.txt").write_text("0 20 10 8 8\n")
    (found,) = with_code(check(source, fast=True), "pixel-boxes")
    assert found.count == 4


def test_yolo_label_without_image(tmp_path: Path) -> None:
    source = yolo_set(tmp_path, "")
    (tmp_path / "images" / "train" / "train_2.jpg").unlink()
    (found,) = with_code(check(source, fast=True), "label-without-image")
    assert found.file.endswith("labels/train/train_2.txt")


def test_yolo_without_labels_says_where_it_looked(tmp_path: Path) -> None:
    source = yolo_set(tmp_path, "")
    shutil.rmtree(tmp_path / "labels" / "train")
    (found,) = with_code(check(source, fast=True), "no-annotations")
    assert "train_0.txt" in found.what


@pytest.mark.parametrize("fast", [True, False])
def test_yolo_image_that_cannot_be_opened(tmp_path: Path, fast: bool) -> None:
    source = yolo_set(tmp_path, "")
    (tmp_path / "images" / "train" / "train_0.jpg").write_bytes(b"<html>")
    (found,) = with_code(check(source, fast=fast), "unreadable-image")
    assert found.file.endswith("train_0.jpg")
    assert_trainable(prepare(source, skip_bad=True)[0])


def test_voc_objects_are_named(tmp_path: Path) -> None:
    for split, folder in (("train", "train"), ("val", "valid")):
        write_voc(tmp_path / folder, tmp_path / folder, split)
    file = tmp_path / "train" / "train_0.xml"
    file.write_text(
        file.read_text().replace("<xmax>32</xmax>", "<xmax>5</xmax>").replace("ult>0<", "ult>1<")
    )
    report = check(resolve(data=tmp_path), fast=True)
    (found,) = with_code(report, "empty-box")
    assert (Path(found.file).name, found.line, found.id) == ("train_0.xml", 2, None)
    assert "object 2" in printed(report, width=200)
    assert with_code(report, "difficult-objects")[0].count == 2


# Real data


@pytest.mark.parametrize("name", ["bccd", "coco128", "bccd/voc_annotations"])
def test_real_data_has_no_errors(name: str) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"{name} belongs in {SHARED}")
    source = resolve(data=SHARED / name)
    report = check(source)
    assert report.exit_code == 0, report.text()
    train, val, classes, _ = prepare(source)
    assert_trainable(train)
    assert (val is None) == (name == "coco128")
    assert len(classes) == (80 if name == "coco128" else 3)


def test_no_content_makes_a_traceback(tmp_path: Path) -> None:
    """Any value anywhere: read, checked and survived, or refused with a `UserError`."""
    random = np.random.default_rng(0)
    odd = [
        None,
        "",
        "x",
        -1,
        0,
        2**70,
        1e308,
        0.5,
        float("nan"),
        True,
        [],
        [1, 2, 3, 4],
        {},
        "\ud800",
        "a\0b",
        "../..",
    ]
    made = CocoSet(tmp_path / "set")
    made.write()
    good = json.dumps(made.content["train"])
    refusals = []
    for round in range(60):
        content = json.loads(good)
        for _ in range(random.integers(1, 4)):
            rows = content[str(random.choice(["images", "annotations", "categories"]))]
            row = rows[random.integers(len(rows))]
            row[str(random.choice(list(row)))] = odd[random.integers(len(odd))]
        made.file("train").write_text(json.dumps(content))
        try:
            source = resolve(data=tmp_path / "set")
            report = check(source, fast=True)
            printed(report)
            assert_trainable(prepare(source, skip_bad=True)[0])
            fix(source, check(source), tmp_path / f"fixed_{round}")
            assert check(resolve(data=tmp_path / f"fixed_{round}")).exit_code == 0
        except UserError as error:
            refusals.append(error.remedy)
    assert not refusals  # a row of no form blocks no set
    assert all(refusals)
