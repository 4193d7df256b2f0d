"""The synthetic set: deterministic, and its boxes say where the shapes are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from detrellis.data import shapes
from detrellis.data.shapes import CATEGORIES, Kinds, draw_image, write_shapes
from detrellis.errors import UserError

SMALL = {"train": 12, "val": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "deep" / "set", **SMALL)


def content(folder: Path, split: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(
        (folder / "annotations" / f"instances_{split}.json").read_text()
    )
    return data


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_is_a_coco_folder(folder: Path) -> None:
    for split, count in SMALL.items():
        data = content(folder, split)
        assert len(data["images"]) == count
        assert {c["id"]: c["name"] for c in data["categories"]} == CATEGORIES
        sizes = {}
        for image in data["images"]:
            with Image.open(folder / "images" / split / image["file_name"]) as file:
                assert file.size == (image["width"], image["height"])
                assert file.mode == "RGB"
            sizes[image["id"]] = file.size
        assert len({a["id"] for a in data["annotations"]}) == len(data["annotations"]) > 0
        for a in data["annotations"]:
            x, y, w, h = a["bbox"]
            width, height = sizes[a["image_id"]]
            assert 0 <= x < x + w <= width
            assert 0 <= y < y + h <= height
            assert 0 < a["area"] <= w * h
            assert a["category_id"] in CATEGORIES
            assert a["iscrowd"] == 0
    assert not [p for p in folder.parent.iterdir() if p != folder], (
        "something was left beside the folder"
    )


def test_the_seed_decides_everything(folder: Path, tmp_path: Path) -> None:
    again = write_shapes(tmp_path / "again", **SMALL)
    other = write_shapes(tmp_path / "other", **SMALL, seed=1)
    assert digest(again) == digest(folder)
    assert not set(digest(other).values()) & set(digest(folder).values())
    first = [(folder / "images" / s / f"{s}_00000.jpg").read_bytes() for s in SMALL]
    assert first[0] != first[1], "train and val show the same pictures"


def test_is_not_written_twice_and_overwrites_nothing(folder: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert write_shapes(folder, **SMALL) == folder
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(UserError, match="other settings"):
        write_shapes(folder, **SMALL, seed=5)
    foreign = tmp_path / "mine"
    (foreign / "annotations").mkdir(parents=True)
    for text in ("", "[1]", '{"info": 3}', '{"info": {"description": "COCO"}}'):
        (foreign / "annotations" / "instances_val.json").write_text(text)
        with pytest.raises(UserError, match="something else"):
            write_shapes(foreign, **SMALL)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="something else"):
        write_shapes(file, **SMALL)
    assert file.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert write_shapes(tmp_path / "empty", train=1, val=1).is_dir()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "draw_image", stop)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "set", **SMALL)
    assert not list(tmp_path.iterdir())


def test_boxes_are_tight_around_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """One object on a plain background: the pixels that differ from it are the box."""
    flat = np.full((96, 128, 3), 128, dtype=np.float32)
    monkeypatch.setattr(shapes, "_background", lambda *_: flat.copy())
    # The second colour of a marking may be that of the background.
    monkeypatch.setattr(shapes, "MARKINGS", dict.fromkeys(shapes.MARKINGS, "plain"))
    for name in ("_draw_clutter", "_draw_line"):
        monkeypatch.setattr(shapes, name, lambda *_: None)
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(40):
        pixels, found = draw_image(96, 128, (1, 1), random)
        # The paint differs by 70, the noise by far less
        changed = np.abs(pixels.astype(float) - 128).max(axis=2) > 40
        if not found:
            continue
        ((category, mask),) = found
        (x, y, w, h), area = shapes.coco_box(mask), int(mask.sum())
        seen.add(category)
        assert np.abs(mask.astype(float) - changed).mean() < 0.02
        rows, columns = np.flatnonzero(changed.sum(1) > 1), np.flatnonzero(changed.sum(0) > 1)
        drawn = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        np.testing.assert_allclose(drawn, [x, y, x + w, y + h], atol=2)
        assert area == pytest.approx(changed.sum(), rel=0.2)
    assert seen == set(CATEGORIES)


def test_classes_with_colours_and_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each class has its shape, its colour and its part of the objects."""
    monkeypatch.setattr(shapes, "MARKINGS", dict.fromkeys(shapes.MARKINGS, "plain"))
    monkeypatch.setattr(shapes, "_draw_line", lambda *_: None)
    colours = {7: (230, 20, 20), 9: (20, 20, 230)}
    kinds = Kinds({7: "disc", 8: "disc", 9: "disc"}, (0.8, 0.0, 0.2), colours)
    random, drawn = np.random.default_rng(0), []
    for _ in range(150):
        pixels, found = draw_image(64, 64, (1, 1), random, kinds)
        for category, mask in found:
            drawn.append(category)
            assert np.abs(np.median(pixels[mask], axis=0) - colours[category]).max() < 12
    assert len(drawn) > 100
    assert drawn.count(8) == 0
    assert drawn.count(7) / len(drawn) == pytest.approx(0.8, abs=0.1)


def test_hidden_objects_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    full = np.zeros((40, 50), dtype=bool)
    full[10:20, 10:30] = True
    over = np.zeros_like(full)
    over[10:20, 10:23] = True  # 65 % of it
    stack = [shapes._Object(1, full, 200), shapes._Object(3, over, 130)]
    for objects, expected in (
        (stack, [(1, [10, 10, 20, 10], 200), (3, [10, 10, 13, 10], 130)]),
        ([stack[0], shapes._Object(3, full, 200)], [(3, [10, 10, 20, 10], 200)]),
        ([shapes._Object(1, full, 700)], []),  # most of it is outside the frame
    ):
        queue = iter(objects)
        monkeypatch.setattr(shapes, "_draw_object", lambda *_, queue=queue: next(queue))
        _, found = draw_image(40, 50, (len(objects), len(objects)), np.random.default_rng(0))
        assert [(c, shapes.coco_box(mask), int(mask.sum())) for c, mask in found] == expected


def test_masks_on_request(folder: Path, tmp_path: Path) -> None:
    """The same pictures, boxes and areas, with run lengths of these areas in these boxes."""
    masked = write_shapes(tmp_path / "set", **SMALL, masks=True)
    assert write_shapes(masked, **SMALL, masks=True) == masked
    with pytest.raises(UserError, match="other settings"):
        write_shapes(masked, **SMALL)
    for plain, row in zip(
        content(folder, "val")["annotations"], content(masked, "val")["annotations"], strict=True
    ):
        runs = row.pop("segmentation")
        assert row == plain
        assert coco_mask.area(runs) == row["area"]
        assert coco_mask.toBbox(runs).tolist() == row["bbox"]


@pytest.mark.parametrize("wrong", [{"size": (8, 90)}, {"objects": (3, 2)}, {"train": 0}])
def test_nonsense_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="shapes of size"):
        write_shapes(tmp_path / "set", **wrong)


def test_small_and_crowded_pictures_can_be_drawn() -> None:
    random = np.random.default_rng(3)
    for _ in range(30):
        pixels, _ = draw_image(32, 40, (0, 12), random)
        assert pixels.shape == (32, 40, 3)
