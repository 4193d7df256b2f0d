"""COCO files: ids of every kind, and rows of no form that are named and never stop the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hotcoco import mask as coco_mask

from detrellis.data.classes import ClassMap
from detrellis.data.doctor.boxes import check_boxes
from detrellis.data.doctor.check import check, prepare
from detrellis.data.doctor.fix import fix
from detrellis.data.formats.coco import read_coco
from detrellis.data.layout import resolve
from detrellis.data.records import RawDataset, to_annotations
from detrellis.data.splits import SplitFiles
from detrellis.errors import UserError
from tests.data.sets import BOXES, COUNTS, CocoSet, coco_content, image_name


def read(tmp_path: Path, content: Any) -> RawDataset:
    file = tmp_path / "ann.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_coco("train", SplitFiles(file, (tmp_path,)))


@pytest.mark.parametrize("ids", [(0, 1, 2), (1, 2, 3), (3, 17, 90), (7, 5, 1000)])
def test_any_category_ids(tmp_path: Path, ids: tuple[int, ...]) -> None:
    content = coco_content("train")
    given = dict(zip((3, 17, 90), ids, strict=True))
    content["categories"] = [
        {"id": given[c["id"]], "name": c["name"]} for c in content["categories"]
    ]
    content["categories"].append({"id": 2000, "name": "unused"})
    for row in content["annotations"]:
        row["category_id"] = given[row["category_id"]]
    annotations = to_annotations(read(tmp_path, content))
    names = [annotations.classes.names[label] for label in annotations.labels]
    assert names == [("cat", "dog", "emu")[label] for _, label, *_ in BOXES["train"]]
    assert annotations.classes.ids == (*sorted(ids), 2000)
    assert annotations.labels.min() >= 0
    assert annotations.labels.max() < 4


@pytest.mark.parametrize("crowd", [1, True, "1", "true"])
def test_the_arrays(tmp_path: Path, crowd: int | str) -> None:
    content = coco_content("train")
    content["annotations"].reverse()  # boxes of one image need not stand together, nor in its order
    content["annotations"][1]["iscrowd"] = crowd
    content["annotations"][2]["iscrowd"] = "false"
    content["annotations"][1]["segmentation"] = {"counts": "abc", "size": [32, 48]}
    annotations = to_annotations(read(tmp_path, content))
    assert len(annotations) == COUNTS["train"]
    assert annotations.image_ids.tolist() == [10, 20, 30, 40, 50]
    assert annotations.starts.tolist() == [0, 2, 3, 4, 5, 5]
    assert annotations.ids.tolist() == [2, 1, 3, 4, 5]
    assert annotations.crowd.tolist() == [False, False, False, True, False]
    assert annotations.boxes[3].tolist() == [8, 8, 16, 16]
    assert annotations.areas.tolist() == [192, 80, 1536, 256, 48]
    assert annotations.file_names.dtype.kind == "S"


def test_images_need_not_be_sorted(tmp_path: Path) -> None:
    content = coco_content("train")
    content["images"].reverse()
    annotations = to_annotations(read(tmp_path, content))
    assert annotations.image_ids.tolist() == [50, 40, 30, 20, 10]
    assert annotations.starts.tolist() == [0, 0, 1, 2, 3, 5]
    assert annotations.ids.tolist() == [5, 4, 3, 1, 2]


def test_val_uses_the_map_of_train(tmp_path: Path) -> None:
    classes = ClassMap((3, 17, 50, 90), ("cat", "dog", "eel", "emu"))
    annotations = to_annotations(read(tmp_path, coco_content("val")), classes)
    assert annotations.labels.tolist() == [3, 0, 1]
    assert annotations.classes is classes


def test_boxes_are_clipped_and_others_untouched(tmp_path: Path) -> None:
    content = coco_content("train")
    content["annotations"][0]["bbox"] = [-4, 20, 10, 30]
    content["annotations"][1]["bbox"] = [0.3, 1.1, 0.1, 2.2]  # 0.3 + 0.1 - 0.3 is not 0.1
    annotations = to_annotations(read(tmp_path, content))
    assert annotations.boxes[0].tolist() == [0, 20, 6, 12]
    assert annotations.boxes[1].tolist() == [0.3, 1.1, 0.1, 2.2]


def test_no_images_and_no_boxes_make_empty_arrays(tmp_path: Path) -> None:
    content = coco_content("train") | {"images": [], "annotations": []}
    annotations = to_annotations(read(tmp_path, content))
    assert len(annotations) == 0
    assert annotations.starts.tolist() == [0]
    assert annotations.boxes.shape == (0, 4)


def test_names_are_utf8(tmp_path: Path) -> None:
    content = coco_content("train")
    content["images"][0]["file_name"] = "große Katze 猫.jpg"
    annotations = to_annotations(read(tmp_path, content))
    assert annotations.path(0) == tmp_path / "große Katze 猫.jpg"


def test_missing_sizes_are_measured(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    del made.listed(1)["width"]
    made.listed(2)["height"] = None
    raw = resolve(data=made.write()).load("train")
    assert (raw.sizes == [32, 48]).all()
    assert [(f.code, f.count) for f in raw.findings] == [("size-missing", 2)]


def test_boxes_of_no_form_become_nan(tmp_path: Path) -> None:
    content = coco_content("train")
    for row, value in enumerate([None, [], [1, 2, 3], ["a", 2, 3, 4]]):
        content["annotations"][row]["bbox"] = value
    del content["annotations"][4]["bbox"]
    for row in content["annotations"]:
        del row["segmentation"]
    raw = read(tmp_path, content)
    assert np.isnan(raw.boxes).all()
    assert list(raw.written.values()) == ["null", "[]", "[1, 2, 3]", '["a", 2, 3, 4]', "no `bbox`"]
    whats = [f.what for f in check_boxes(raw) if f.code == "bad-box"]
    assert whats[3] == 'no four finite numbers for a box, but ["a", 2, 3, 4]'


def edit(table: str, row: int, key: str, value: Any = ...) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        if value is ...:
            del content[table][row][key]
        else:
            content[table][row][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (edit("images", 2, "id"), "malformed-image", ["images[2] has no `id`"]),
        (
            edit("images", 2, "file_name"),
            "malformed-image",
            ["images[2] (id 30) has no `file_name`"],
        ),
        (
            edit("images", 2, "file_name", 7),
            "malformed-image",
            ["images[2] (id 30) has 7 for `file_name`"],
        ),
        (
            edit("images", 2, "file_name", ""),
            "malformed-image",
            ['images[2] (id 30) has "" for `file_name`'],
        ),
        (edit("images", 2, "id", [1]), "malformed-image", ["images[2] (id [1]) has [1] for `id`"]),
        (
            lambda c: c["images"].insert(0, None),
            "malformed-image",
            ["images[0] is null, not an object"],
        ),
        (
            edit("annotations", 1, "image_id"),
            "malformed-annotation",
            ["annotations[1] (id 2) has no `image_id`"],
        ),
        (
            edit("annotations", 1, "category_id"),
            "malformed-annotation",
            ["annotations[1] (id 2) has no `category_id`"],
        ),
        (
            edit("annotations", 1, "category_id", 1.5),
            "malformed-annotation",
            ["has 1.5 for `category_id`"],
        ),
        (
            edit("annotations", 1, "category_id", "cat"),
            "malformed-annotation",
            ['has "cat" for `category_id`'],
        ),
        (
            edit("annotations", 1, "category_id", None),
            "malformed-annotation",
            ["has null for `category_id`"],
        ),
        (
            edit("annotations", 1, "image_id", float("nan")),
            "malformed-annotation",
            ["has nan for `image_id`"],
        ),
        (
            lambda c: c["annotations"].insert(0, 5),
            "malformed-annotation",
            ["annotations[0] is a number"],
        ),
        (
            lambda c: c["categories"].append({"name": "eel"}),
            "malformed-category",
            ["categories[3] has no `id`"],
        ),
        (lambda c: c["categories"].append(None), "malformed-category", ["categories[3] is null"]),
    ],
)
def test_a_row_of_no_form_is_named_and_the_others_are_read(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], code: str, words: list[str]
) -> None:
    made = CocoSet(tmp_path)
    change(made.content["train"])
    source = resolve(data=made.write())
    report = check(source, fast=True)
    (found,) = (f for f in report.findings if f.code == code)
    for word in words:
        assert word in found.what
    if found.severity == "error":
        with pytest.raises(UserError, match=code):
            prepare(source)
    train, _, _, _ = prepare(source, skip_bad=True)
    assert 2 <= len(train.ids) <= 5
    fix(source, check(source), tmp_path / "clean")
    assert not check(resolve(data=tmp_path / "clean")).errors


def test_what_follows_from_a_row_of_no_form_is_not_said_again(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    del made.listed(4)["file_name"]
    del made.box(1)["category_id"]
    found = check(resolve(data=made.write()), fast=True).errors
    assert [f.code for f in found] == ["malformed-image", "malformed-annotation"]


def test_texts_are_read_as_the_numbers_that_they_are(tmp_path: Path) -> None:
    content, plain = coco_content("train"), read(tmp_path, coco_content("train"))
    for row in content["images"]:
        row |= {"id": str(row["id"]), "height": str(row["height"]), "width": f"{row['width']}.0"}
    for row in content["annotations"]:
        row |= {
            "image_id": str(row["image_id"]),
            "category_id": f" {row['category_id']} ",
            "area": str(row["area"]),
        }
        row["bbox"] = [str(v) for v in row["bbox"]]
    for row in content["categories"]:
        row["id"] = str(row["id"])
    raw = read(tmp_path, content)
    for name in ("image_ids", "sizes", "box_image_ids", "box_categories", "boxes", "areas"):
        assert np.array_equal(getattr(raw, name), getattr(plain, name)), name
    assert raw.categories == plain.categories
    assert {f.code for f in raw.findings} == {"text-numbers"}
    assert (
        'numbers are written as texts, the first: images[0] (id "10"): "10" for `id`'
        in raw.findings[0].what
    )


def test_ids_that_are_no_numbers_are_numbered(tmp_path: Path) -> None:
    content = coco_content("train")
    for row in content["images"]:
        row["id"] = row["file_name"]
    for row in content["annotations"]:
        row["image_id"] = image_name("train", row["image_id"] // 10 - 1)
        row["category_id"] = {3: "c", 17: "d", 90: "e"}[row["category_id"]]
        row["id"] = f"uuid-{row['id']}"
    for row in content["categories"]:
        row["id"] = {3: "c", 17: "d", 90: "e"}[row["id"]]
    raw = read(tmp_path, content)
    assert raw.image_ids.tolist() == [1, 2, 3, 4, 5]
    assert raw.categories == ((1, "cat"), (2, "dog"), (3, "emu"))
    assert raw.box_rows.tolist() == [image for image, *_ in BOXES["train"]]
    assert raw.box_categories.tolist() == [label + 1 for _, label, *_ in BOXES["train"]]
    assert raw.ids.tolist() == [1, 2, 3, 4, 5]
    assert [f.code for f in raw.findings] == ["text-ids", "ids-missing", "text-ids"]


def test_annotations_without_ids_are_numbered_after_the_others(tmp_path: Path) -> None:
    content = coco_content("train")
    del content["annotations"][1]["id"]
    content["annotations"][2]["id"] = 2**70
    raw = read(tmp_path, content)
    assert raw.ids.tolist() == [1, 6, 7, 4, 5]
    (note,) = raw.findings
    assert (note.code, note.severity, note.count) == ("ids-missing", "note", 2)


@pytest.mark.parametrize(
    ("segmentation", "box"),
    [
        ([[4, 6, 14, 6, 14, 14]], [4, 6, 10, 8]),
        ([[4, 6, 8, 6, 8, 10], [10, 10, 14.5, 10, 14.5, 14]], [4, 6, 10.5, 8]),
        ([4, 6, 14, 6, 14, 14], [4, 6, 10, 8]),  # not in a list
        ({"size": [32, 48], "counts": [32 * 4 + 6, 8, 24, 8, 32 * 43 - 14]}, [4, 6, 2, 8]),
        ([], None),
        ([[1, 2, 3]], None),
        ([["a", 2, 3, 4]], None),
        ({"size": [32, 48], "counts": [32 * 48]}, None),
        ({"counts": [1, 2]}, None),
        ("rle", None),
        (None, None),
    ],
)
def test_a_segmentation_gives_the_box_where_there_is_none(
    tmp_path: Path, segmentation: Any, box: Any
) -> None:
    content = coco_content("train")
    row = content["annotations"][0]
    del row["bbox"]
    row["segmentation"] = segmentation
    raw = read(tmp_path, content)
    if box is None:
        assert raw.written == {0: "no `bbox`"}
        assert not raw.findings
        return
    assert raw.boxes[0].tolist() == box
    assert [(f.code, f.count) for f in raw.findings] == [("outlined-boxes", 1)]


def test_compressed_run_lengths_give_their_box(tmp_path: Path) -> None:
    content = coco_content("train")
    mask = np.zeros((32, 48), dtype=np.uint8, order="F")
    mask[5:20, 7:31] = 1
    counts = coco_mask.encode(mask)["counts"]
    row = content["annotations"][0]
    row["bbox"], row["segmentation"] = [], {"size": [32, 48], "counts": counts.decode()}
    assert read(tmp_path, content).boxes[0].tolist() == [7, 5, 24, 15]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("annotations"), ["no key `annotations`", "images"]),
        (lambda c: c.pop("categories"), ["no key `categories`"]),
        (lambda c: c.update(images={}), ["`images` is an object, not a list"]),
    ],
)
def test_a_file_that_is_not_cocos_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: list[str]
) -> None:
    content = coco_content("train")
    change(content)
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    for word in ["ann.json", *words]:
        assert word in error.value.message
    assert error.value.remedy


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_json_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    made = CocoSet(tmp_path)
    made.content["train"]["categories"][0]["name"] = "Kätzchen"
    made.write()
    text = json.dumps(made.content["train"], ensure_ascii=False)
    made.file("train").write_bytes(text.encode(encoding))
    raw = resolve(data=tmp_path).load("train")
    assert raw.categories[0] == (3, "Kätzchen")
    assert raw.path(0).is_file()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ('{"images": [\n{"id": 1,}]}', "malformed JSON"),
        ('{"images": [', "line 1"),
        ("[1, 2]", "the top level is a list"),
        ("\x00\xff", "malformed JSON"),
        ('{"a": 1}\n{"a": 2}\n', "several JSON values, the second in line 2, column 1 .JSON Lines"),
    ],
)
def test_no_json_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path, text)
    assert "ann.json" in error.value.message


def test_a_repeated_category_id_is_an_error_of_check_and_train(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    made.content["train"]["categories"][1]["id"] = 3
    for row in made.content["train"]["annotations"]:
        row["category_id"] = 3 if row["category_id"] == 17 else row["category_id"]
    source = resolve(data=made.write())
    found = [f for f in check(source, fast=True).errors if f.code == "duplicate-category-id"]
    assert [f.id for f in found] == [3] * 4
    assert (
        found[0].what
        == "category id 3 is defined more than once: 'cat', 'dog'; which is annotation 1?"
    )
    with pytest.raises(UserError, match="duplicate-category-id"):
        prepare(source)
    assert prepare(source, skip_bad=True)[0].ids.tolist() == [3]  # nobody knows what the others are


def test_a_category_listed_again_is_taken_once(tmp_path: Path) -> None:
    content = coco_content("train")
    content["categories"].append({"id": 3, "name": " cat"})
    raw = read(tmp_path, content)
    assert raw.categories == ((3, "cat"), (17, "dog"), (90, "emu"))
    assert [(f.code, f.severity) for f in raw.findings] == [("repeated-category", "note")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 999}, "annotation 2 belongs to no listed image"),
        ({"category_id": 999}, "annotation 2 has a category"),
        ({"bbox": [1, 2, float("nan"), 4]}, "annotation 2 has no four finite numbers"),
        ({"bbox": [1, 2, 0, 4]}, "annotation 2 has a box without width"),
        ({"bbox": [100, 2, 5, 4]}, "annotation 2 has a box outside"),
    ],
)
def test_unusable_records_are_not_taken_over(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = coco_content("train")
    content["annotations"][1].update(change)
    with pytest.raises(UserError, match=message):
        to_annotations(read(tmp_path, content))
