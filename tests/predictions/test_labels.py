"""`predict --format` and `--crops`:
what the readers of data sets, and labelling tools, read of the files.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

import detrellis
from detrellis.data.classes import ClassMap
from detrellis.data.doctor.check import check
from detrellis.data.layout import find_data
from detrellis.data.masks import has_outlines
from detrellis.errors import UserError
from detrellis.predictions.crops import folder_names
from detrellis.predictions.inputs import InputPicture, find_pictures
from detrellis.predictions.record import Prediction
from detrellis.predictions.save import PredictionFolder
from detrellis.rle import decode, encode, polygons, simplified

from .conftest import CLASSES, picture, save

# The last is too small
BOXES = [(10.25, 5.5, 40.75, 30.0), (0.0, 0.0, 64.0, 40.0), (63.9, 39.9, 64.0, 40.0)]
READ = ("coco", "yolo", "voc", "csv")


def disc(height: int = 40, width: int = 64) -> np.ndarray:
    """A mask with a hole, in the first box."""
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - 17, x - 25)
    return (distance < 12) & (distance > 3)


def found(path: Path | None, *, masks: bool = False, empty: bool = False) -> Prediction:
    boxes = [] if empty else BOXES
    runs = tuple(encode(disc()) for _ in boxes) if masks else None
    pixels = None if path is not None else torch.from_numpy(picture()).permute(2, 0, 1)
    labels = [2, 0, 1][: len(boxes)]
    names, ids = [CLASSES.names[i] for i in labels], [CLASSES.ids[i] for i in labels]
    return Prediction(
        path, (40, 64), [0.9, 0.5, 0.4][: len(boxes)], names, labels, ids, boxes, pixels, runs
    )


def written(out: Path, kind: str, given: list[InputPicture], results: list[Prediction]) -> Path:
    folder = PredictionFolder(out, given, labels=kind)
    list(folder.save(lambda _: results, CLASSES, None))
    return out / kind


def in_folders(tmp_path: Path) -> list[InputPicture]:
    """Pictures that differ in their suffix alone, and one in a folder."""
    for name in ("a.png", "a.jpg", "sub/b.png"):
        save(tmp_path / "pictures" / name)
    return list(find_pictures(tmp_path / "pictures", recursive=True))


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("masks", [False, True])
def test_what_is_written_is_read_back(kind: str, masks: bool, tmp_path: Path) -> None:
    given = in_folders(tmp_path)
    results = [found(p.path, masks=masks, empty=i == 1) for i, p in enumerate(given)]
    folder = written(tmp_path / "out", kind, given, results)
    # Named, it is not divided into train and val.
    file = folder / "annotations" / "instances_default.json" if kind == "coco" else None
    source = find_data(None, file) if file is not None else find_data(folder)
    report = check(source)
    assert not report.exit_code, report.text()
    raws = source.load_all(outlines=True).values()
    assert sorted(Path(n).stem.partition(".")[0] for raw in raws for n in raw.file_names) == [
        "a",
        "a",
        "b",
    ]
    names = {name for raw in raws for _, name in raw.categories}
    assert names == ({"cat", "bird"} if kind in ("voc", "csv") else set(CLASSES.names))
    if kind == "coco":
        assert {i for raw in raws for i, _ in raw.categories} == set(CLASSES.ids)
    got = sorted(tuple(box) for raw in raws for box in raw.boxes.tolist())
    outlined = (13, 5, 24, 24) if masks and kind == "yolo" else None
    want = [
        (x1, y1, x2 - x1, y2 - y1) if outlined is None else outlined for x1, y1, x2, y2 in BOXES[:2]
    ]
    slack = {"voc": 0.5, "yolo": 2 if masks else 1e-3}.get(kind, 0.006)
    np.testing.assert_allclose(got, sorted(want * 2), atol=slack)
    if masks and kind in ("coco", "yolo"):
        assert all(map(has_outlines, raws))


def test_a_run_can_be_trained_on_what_another_one_labelled(run: Path, tmp_path: Path) -> None:
    for seed in range(3):
        save(tmp_path / "pictures" / f"{seed}.png", seed=seed)
    detrellis.predict(run, tmp_path / "pictures", threshold=0, out=tmp_path / "out", format="coco")
    recipe = detrellis.load(run).recipe.override(["schedule.epochs=1"])
    result = detrellis.train(
        recipe, data=tmp_path / "out" / "coco", out=tmp_path / "again", workers=0
    )
    assert result.finished


def test_scores_are_kept_where_the_format_has_them(tmp_path: Path) -> None:
    given, results = [InputPicture(None, Path())], [found(None)]
    coco, voc, csv, cvat, tasks = (
        written(tmp_path, kind, given, results)
        for kind in ("coco", "voc", "csv", "cvat", "labelstudio")
    )
    rows = json.loads((coco / "annotations" / "instances_default.json").read_text())["annotations"]
    assert [row["score"] for row in rows] == [0.9, 0.5]
    assert (csv / "train_labels.csv").read_text().splitlines()[
        1
    ] == "images/picture-1.png,10.25,5.5,40.75,30.0,bird,0.9".replace("images/", "")
    for xml in (voc / "Annotations" / "picture-1.xml", cvat / "annotations.xml"):
        assert "0.9000" in xml.read_text()
    assert json.loads((tasks / "tasks.json").read_text())[0]["predictions"][0]["score"] == 0.7
    for folder in (coco, csv, cvat, tasks):
        assert np.array_equal(
            np.asarray(Image.open(folder / "images" / "picture-1.png")), picture()
        )


def test_cvat_reads_boxes_and_masks(tmp_path: Path) -> None:
    given = [InputPicture(None, Path())]
    box = ET.parse(
        written(tmp_path / "boxes", "cvat", given, [found(None)]) / "annotations.xml"
    ).find("image/box")
    assert box is not None
    assert [float(box.attrib[k]) for k in ("xtl", "ytl", "xbr", "ybr")] == [10.25, 5.5, 40.75, 30]
    folder = written(tmp_path / "masks", "cvat", given, [found(None, masks=True)])
    mask = ET.parse(folder / "annotations.xml").find("image/mask")
    assert mask is not None
    left, top, width, height = (int(mask.attrib[k]) for k in ("left", "top", "width", "height"))
    lengths = list(map(int, mask.attrib["rle"].split(",")))
    inside = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(height, width)
    drawn = np.zeros((40, 64), dtype=bool)
    drawn[top : top + height, left : left + width] = inside
    assert np.array_equal(drawn, disc())
    labels = json.loads((folder / "labels.json").read_text())
    assert [label["name"] for label in labels] == list(CLASSES.names)


def test_label_studio_reads_tasks_in_percent(tmp_path: Path) -> None:
    path = save(tmp_path / "my photo.png")
    given = list(find_pictures(path))
    folder = written(tmp_path / "out", "labelstudio", given, [found(path)])
    (task,) = json.loads((folder / "tasks.json").read_text())
    assert task["data"]["image"] == "/data/local-files/?d=images/my%20photo.png"
    region, whole = task["predictions"][0]["result"]
    value = region["value"]
    assert value["rectanglelabels"] == ["bird"]
    corner = np.array(
        [value["x"], value["y"], value["x"] + value["width"], value["y"] + value["height"]]
    )
    np.testing.assert_allclose(corner * [0.64, 0.4, 0.64, 0.4], BOXES[0])
    assert (region["original_width"], region["original_height"], whole["score"]) == (64, 40, 0.5)
    config = ET.parse(folder / "config.xml")
    control = config.find(f"RectangleLabels[@name='{region['from_name']}']")
    assert control is not None
    assert [label.attrib["value"] for label in control] == list(CLASSES.names)
    masked = written(tmp_path / "masks", "labelstudio", given, [found(path, masks=True)])
    value = json.loads((masked / "tasks.json").read_text())[0]["predictions"][0]["result"][0][
        "value"
    ]
    np.testing.assert_allclose(np.array(value["points"]).min(0) * [0.64, 0.4], (14, 6), atol=1)


def test_a_simplified_outline_stays_near_the_mask() -> None:
    y, x = np.mgrid[:100, :100]
    (ring,) = polygons(np.hypot(y - 50, x - 50) < 40)
    few = simplified(ring, 0.8)
    assert len(few) < len(ring) / 2
    corners, all_corners = np.array(few).reshape(-1, 2), np.array(ring).reshape(-1, 2)
    nxt = np.roll(corners, -1, 0)
    for point in all_corners:  # the distance to the nearest side
        along = ((point - corners) * (nxt - corners)).sum(1) / ((nxt - corners) ** 2).sum(1)
        near = corners + along.clip(0, 1)[:, None] * (nxt - corners)
        assert np.linalg.norm(near - point, axis=1).min() <= 0.81
    assert simplified([0, 0, 1, 0, 1, 1], 5) == [0, 0, 1, 0, 1, 1]


def test_corrected_labels_are_never_written_over(tmp_path: Path) -> None:
    given = in_folders(tmp_path)
    results = [found(p.path) for p in given]
    folder = written(tmp_path / "out", "yolo", given, results)
    (folder / "labels" / "a.txt").unlink(missing_ok=True)
    one = [p for p in given if p.path is not None and p.path.name == "b.png"]
    # Ours, and whole again: nothing is left of before
    written(tmp_path / "out", "yolo", one, [found(one[0].path)])
    assert [p.name for p in (folder / "labels").rglob("*.txt")] == ["b.txt"]
    label = next((folder / "labels").rglob("b.txt"))
    label.write_text("0 0.5 0.5 0.1 0.1\n")
    with pytest.raises(UserError, match="changed since"):
        PredictionFolder(tmp_path / "out", one, labels="yolo")
    assert label.read_text() == "0 0.5 0.5 0.1 0.1\n"
    with pytest.raises(UserError, match="an input"):
        PredictionFolder(
            tmp_path / "out", list(find_pictures([*folder.rglob("b.png")])), labels="yolo"
        )


def test_a_call_is_repeated_into_the_folder_of_its_pictures(tmp_path: Path) -> None:
    """Its crops and copies are none of the pictures."""
    save(tmp_path / "sub" / "a.png")
    for options in ({"crops": True, "labels": "coco"}, {"crops": True, "labels": "coco"}, {}):
        folder = PredictionFolder(
            tmp_path / "out", list(find_pictures(tmp_path, recursive=True)), **options
        )
        assert [p.path for p in folder.pictures] == [tmp_path / "sub" / "a.png"]
        list(folder.save(lambda _: [found(tmp_path / "sub" / "a.png")], CLASSES, None))
    assert len(list((tmp_path / "out").rglob("*.*g"))) == 1 + len(BOXES) + 1
    with pytest.raises(UserError, match="an earlier call wrote all"):
        PredictionFolder(
            tmp_path / "out",
            list(find_pictures(tmp_path / "out" / "coco" / "images", recursive=True)),
        )


def test_crops_are_what_the_boxes_hold(run: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "sub" / "a.png")
    folder = PredictionFolder(tmp_path / "out", list(find_pictures(tmp_path / "sub")), crops=True)
    names = ClassMap(CLASSES.ids, ("cat/dog", "dog", "bird"))
    list(folder.save(lambda _: [found(path)], names, None))
    crops = {
        p.relative_to(tmp_path / "out" / "crops").as_posix()
        for p in (tmp_path / "out" / "crops").rglob("*.jpg")
    }
    assert crops == {"bird/a-1.jpg", "cat_dog/a-2.jpg", "dog/a-3.jpg"}
    crop = Image.open(tmp_path / "out" / "crops" / "bird" / "a-1.jpg")
    assert crop.size == (31, 25)
    assert np.abs(np.asarray(crop, dtype=int) - picture()[5:30, 10:41]).mean() < 12
    # Again, with fewer: the others go. What somebody put there stays, and stops the call.
    detrellis.predict(run, path, threshold=1, out=tmp_path / "out", crops=True)
    assert not list((tmp_path / "out" / "crops").rglob("*.jpg"))
    save(tmp_path / "out" / "crops" / "cat" / "mine.png")
    with pytest.raises(UserError, match=r"mine\.png: is there already"):
        detrellis.predict(run, path, threshold=1, out=tmp_path / "out", crops=True)
    with pytest.raises(UserError, match="no folder is named"):
        detrellis.predict(run, path, crops=True)


def test_folders_of_classes_are_names_on_any_system() -> None:
    assert folder_names(["a", "A", "..", "x:y", "", "a_1"]) == [
        "a",
        "A_1",
        "class_2",
        "x_y",
        "class_4",
        "a_1_5",
    ]
    assert folder_names(["a_2", "a", "A", "class_4", ""]) == [
        "a_2",
        "a",
        "A_2_2",
        "class_4",
        "class_4_4",
    ]


def test_fiftyone_takes_the_detections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(UserError, match="fiftyone is missing") as error:
        found(None).to_fiftyone()
    assert error.value.remedy == "pip install fiftyone"
    # FiftyOne brings fifty packages: its two classes stand in for it.
    stand_in = types.ModuleType("fiftyone")
    stand_in.Detection = stand_in.Detections = types.SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fiftyone", stand_in)
    first = found(None, masks=True).to_fiftyone().detections[0]
    assert (first.label, first.confidence) == ("bird", 0.9)
    np.testing.assert_allclose(first.bounding_box, [10.25 / 64, 5.5 / 40, 30.5 / 64, 24.5 / 40])
    assert np.array_equal(first.mask, disc()[6:30, 10:41])
    assert found(None).to_fiftyone().detections[0].mask is None
    assert decode(encode(disc()), (40, 64)).sum() == disc().sum()
