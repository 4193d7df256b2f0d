"""YOLO's labels and yaml: what lines mean, what names are, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from detrellis.data.doctor.check import check
from detrellis.data.formats.yolo_labels import decide
from detrellis.data.formats.yolo_yaml import class_names, keypoints
from detrellis.data.layout import resolve
from detrellis.errors import UserError
from tests.data.field.pictures import YAML, wrong, yolo_set
from tests.data.field.yolo import lines as lines_of
from tests.data.field.yolo import one_keypoint, same_name


def ring(rng: np.random.Generator, points: int) -> np.ndarray:
    """A star-shaped polygon somewhere in the image."""
    centre, size = rng.uniform(0.25, 0.75, 2), rng.uniform(0.02, 0.2, 2)
    angles = np.sort(rng.uniform(0, 2 * np.pi, points))
    radii = rng.uniform(0.5, 1, (points, 1))
    return (centre + radii * size * np.stack([np.cos(angles), np.sin(angles)], axis=1)).ravel()


def pose(rng: np.random.Generator, points: int, flags: bool) -> np.ndarray:
    """A box with keypoints in it, some of them missing."""
    centre, size = rng.uniform(0.25, 0.75, 2), rng.uniform(0.02, 0.4, 2)
    places = centre + size * rng.uniform(-0.5, 0.5, (points, 2))
    seen = rng.integers(0, 3, (points, 1)) if flags else np.ones((points, 1))
    places[seen[:, 0] == 0] = 0
    rows = np.concatenate([places, seen], axis=1) if flags else places
    return np.concatenate([centre, size, rows.ravel()])


@pytest.mark.parametrize("points", [5, 8, 17, 40])
@pytest.mark.parametrize("seed", range(3))
def test_lines_are_told_apart(points: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert decide([ring(rng, points) for _ in range(60)]) == "polygons"
    assert decide([ring(rng, int(n)) for n in rng.integers(3, 40, 60)]) == "polygons"
    assert decide([pose(rng, points, flags=True) for _ in range(60)]) == "keypoints"
    assert decide([pose(rng, points, flags=False) for _ in range(60)]) == "keypoints"


def test_rectangles_at_an_angle_are_polygons() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(60):
        corner = rng.uniform(0.3, 0.7, 2)
        u = rng.uniform(-0.2, 0.2, 2)
        v = rng.uniform(-0.2, 0.2, 2)
        rows.append(np.concatenate([corner, corner + u, corner + u + v, corner + v]))
    assert decide(rows) == "polygons"


def test_what_nothing_tells_is_not_guessed(tmp_path: Path) -> None:
    lines_of(one_keypoint)(tmp_path)
    report = check(resolve(data=tmp_path), fast=True)
    assert {f.code for f in report.errors} >= {"unclear-labels"}
    for shape, right in (("[1, 2]", True), ("[]", False)):  # the remedy
        (tmp_path / "data.yaml").write_text(f"{YAML}kpt_shape: {shape}\n")
        raws = resolve(data=tmp_path).load_all()
        assert (not any(wrong(raw) for raw in raws.values())) == right


def test_images_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    found = check(resolve(**same_name(tmp_path)), fast=True).findings
    assert {f.what for f in found if f.code == "shared-labels"} == {
        "p0.txt could belong to more/p0.jpg or train/p0.jpg"
    }


def test_validation_means_what_training_means(tmp_path: Path) -> None:
    """A single line of validation could be anything."""
    lines_of(one_keypoint)(tmp_path)
    for file in (tmp_path / "labels" / "train").iterdir():
        file.write_text(
            "0 0.1 0.1 0.2 0.1 0.15 0.2 0.05 0.25\n1 0.7 0.7 0.8 0.7 0.85 0.9 0.6 0.8 0.65 0.72\n"
        )
    source = resolve(data=tmp_path)
    assert np.array_equal(source.load("val").boxes, source.load_all()["val"].boxes)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("[no, yes, on, off]", ["no", "yes", "on", "off"]),
        (
            "[0x10, 1_0, 007, 1e3, 2024-01-01, null, ~, 1:30]",
            ["0x10", "1_0", "007", "1e3", "2024-01-01", "null", "~", "1:30"],
        ),
        ("{0: no, 1: 1.10}", ["no", "1.10"]),
        ("{cat: 0, dog: 1}", ["cat", "dog"]),
        ("\"['cat', 'dog']\"", ["cat", "dog"]),
        ("cat, dog", ["cat", "dog"]),
        ("my.names", ["cat", "dog"]),
        ("\n  - cat\n  - dog # comment", ["cat", "dog"]),
    ],
)
def test_names_are_the_text_that_stands_there(
    tmp_path: Path, names: str, expected: list[str]
) -> None:
    (tmp_path / "my.names").write_text("cat\ndog\n")
    file = tmp_path / "data.yaml"
    file.write_text(f"names: {names}\ntrain: x\n")
    assert class_names(file) == tuple(enumerate(expected))


def test_names_with_gaps_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("names: {3: cat, 0: dog}\n")
    assert class_names(tmp_path / "data.yaml") == ((0, "dog"), (3, "cat"))


def test_a_kpt_shape_that_is_none(tmp_path: Path) -> None:
    yolo_set(tmp_path, f"{YAML}kpt_shape: 17\n")
    with pytest.raises(UserError, match="kpt_shape"):
        keypoints(tmp_path / "data.yaml")
    yolo_set(tmp_path, f"{YAML}kpt_shape: [2, 3]\n")
    (tmp_path / "labels" / "train" / "p0.txt").write_text("0 0.5 0.5 0.1 0.1 0.5 0.5 2\n")
    found = [
        f for f in check(resolve(data=tmp_path), fast=True).errors if f.code == "malformed-label"
    ]
    assert len(found) == 1
    assert "8 fields" in found[0].what
