"""COCO files: ids of every kind, and mistakes of form that are named, never a bare traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detrellis.data.classes import ClassMap
from detrellis.data.coco import read_coco
from detrellis.data.layout import resolve
from detrellis.data.records import RawDataset, to_annotations
from detrellis.errors import UserError
from tests.data.sets import BOXES, COUNTS, CocoSet, coco_content


def read(tmp_path: Path, content: Any) -> RawDataset:
    file = tmp_path / "ann.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_coco(file, tmp_path, "train")


@pytest.mark.parametrize("ids", [(0, 1, 2), (1, 2, 3), (3, 17, 90), (7, 5, 1000)])
def test_any_category_ids(tmp_path: Path, ids: tuple[int, ...]) -> None:
    content = coco_content("train")
    given = dict(zip((3, 17, 90), ids, strict=True))
    content["categories"] = [{"id": given[c["id"]], "name": c["name"]} for c in content["categories"]]
    content["categories"].append({"id": 2000, "name": "unused"})
    for row in content["annotations"]:
        row["category_id"] = given[row["category_id"]]
    annotations = to_annotations(read(tmp_path, content))
    names = [annotations.classes.names[label] for label in annotations.labels]
    assert names == [("cat", "dog", "emu")[label] for _, label, *_ in BOXES["train"]]
    assert annotations.classes.ids == (*sorted(ids), 2000)
    assert annotations.labels.min() >= 0
    assert annotations.labels.max() < 4


def test_the_arrays(tmp_path: Path) -> None:
    content = coco_content("train")
    content["annotations"].reverse()  # boxes of one image need not stand together, nor in its order
    content["annotations"][1]["iscrowd"] = 1
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
    assert np.isnan(read(tmp_path, content).boxes).all()


def edit(table: str, row: int, key: str, value: Any = ...) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        if value is ...:
            del content[table][row][key]
        else:
            content[table][row][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit("images", 2, "id"), ["images[2]", "no `id`"]),
        (edit("images", 2, "file_name"), ["images[2]", "(id 30)", "no `file_name`"]),
        (edit("images", 2, "file_name", 7), ["images[2] (id 30)", "`file_name` is 7"]),
        (edit("images", 2, "id", "x"), ["images[2]", "`id` is the text 'x'"]),
        (edit("images", 2, "height", "32"), ["images[2] (id 30)", "`height` is the text '32'"]),
        (edit("annotations", 1, "image_id"), ["annotations[1] (id 2)", "no `image_id`"]),
        (edit("annotations", 1, "category_id"), ["annotations[1] (id 2)", "no `category_id`"]),
        (edit("annotations", 1, "category_id", 1.5), ["annotations[1] (id 2)", "`category_id` is 1.5"]),
        (edit("annotations", 1, "category_id", None), ["annotations[1] (id 2)", "`category_id` is None"]),
        (edit("annotations", 1, "image_id", float("nan")), ["annotations[1] (id 2)", "`image_id` is nan"]),
        (edit("annotations", 1, "id", 2**70), ["annotations[1]", "`id` is"]),
        (edit("categories", 0, "id", "cat"), ["categories[0]", "`id` is the text 'cat'"]),
        (lambda c: c.pop("annotations"), ["no key `annotations`", "images"]),
        (lambda c: c.pop("categories"), ["no key `categories`"]),
        (lambda c: c.update(images={}), ["`images` is an object, not a list"]),
        (lambda c: c["annotations"].insert(0, 5), ["annotations[0] is a number"]),
    ],
)
def test_mistakes_of_form_are_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: list[str]
) -> None:
    content = coco_content("train")
    change(content)
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    for word in ["ann.json", *words]:
        assert word in error.value.message
    assert error.value.remedy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ('{"images": [\n{"id": 1,}]}', "malformed JSON"),
        ('{"images": [', "line 1"),
        ("[1, 2]", "the top level is a list"),
        ("\x00\xff", "malformed JSON"),
    ],
)
def test_no_json_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path, text)
    assert "ann.json" in error.value.message


def test_a_repeated_category_id_is_named(tmp_path: Path) -> None:
    content = coco_content("train")
    content["categories"][1]["id"] = 3
    with pytest.raises(UserError, match=r"ann\.json: category id 3 is defined more than once"):
        to_annotations(read(tmp_path, content))


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
def test_unusable_records_are_not_taken_over(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = coco_content("train")
    content["annotations"][1].update(change)
    with pytest.raises(UserError, match=message):
        to_annotations(read(tmp_path, content))
