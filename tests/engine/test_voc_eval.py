"""VOC's metric against its development kit's rules,
written down box by box in whole pixels and exact fractions.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import detrellis
from detrellis.data.annotations import Annotations
from detrellis.data.classes import ClassMap
from detrellis.data.doctor.check import prepare
from detrellis.data.layout import find_data
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.voc_eval import VocResult, average_precision, evaluate_voc
from detrellis.types import Detections

from ..data.sets import COUNTS, write_voc
from ..small import SMALL
from ..test_cli import call


class Box(NamedTuple):
    """A ground truth, in edges."""

    image: int
    label: int
    x: int
    y: int
    w: int
    h: int
    difficult: bool = False


class Found(NamedTuple):
    """A detection, in edges."""

    image: int
    label: int
    x: int
    y: int
    w: int
    h: int
    score: float


def annotations(boxes: Sequence[Box], images: int = 1, classes: int = 1) -> Annotations:
    rows = sorted(boxes, key=lambda b: b.image)
    counts = np.bincount([b.image for b in rows], minlength=images)
    return Annotations(
        root=Path(),
        classes=ClassMap(
            tuple(range(1, classes + 1)), tuple(f"[bold]c{k}" for k in range(classes))
        ),
        image_ids=np.arange(images, 0, -1),
        file_names=np.array([b"x"] * images),
        sizes=np.full((images, 2), 100),
        starts=np.concatenate([[0], counts.cumsum()]).astype(np.int64),
        boxes=np.array([b[2:6] for b in rows], dtype=np.float64).reshape(-1, 4),
        labels=np.array([b.label for b in rows], dtype=np.int64),
        crowd=np.zeros(len(rows), dtype=np.bool_),
        areas=np.ones(len(rows)),
        ids=np.arange(len(rows)),
        difficult=np.array([b.difficult for b in rows], dtype=np.bool_),
    )


def detections(found: Sequence[Found], image: int) -> Detections:
    """An image's, best first as a detector gives them."""
    own = sorted((f for f in found if f.image == image), key=lambda f: -f.score)
    boxes = [[f.x, f.y, f.x + f.w, f.y + f.h] for f in own]
    return Detections(
        torch.tensor([f.score for f in own]).float(),
        torch.tensor([f.label for f in own]).long(),
        torch.tensor(boxes).float().reshape(-1, 4),
    )


def collector(
    a: Annotations, found: Sequence[Found], shown: Sequence[int] | None = None
) -> CocoEvaluator:
    evaluator = CocoEvaluator(a)
    for image in range(len(a)) if shown is None else shown:
        evaluator.update([int(a.image_ids[image])], [detections(found, image)])
    return evaluator


def measure(
    a: Annotations, found: Sequence[Found], shown: Sequence[int] | None = None
) -> VocResult:
    return evaluate_voc(a, collector(a, found, shown).arrays())


# The kit
# --------------------------------------------------------------------------------------------------------------


def kit_iou(a: tuple[int, ...], b: tuple[int, ...]) -> Fraction:
    """Of corners that belong to their boxes."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1 for i in (0, 1))
    if width <= 0 or height <= 0:
        return Fraction(0)
    areas = sum((c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b))
    return Fraction(width * height, areas - width * height)


def pixels(b: Box | Found) -> tuple[int, int, int, int]:
    """Corners as VOC counts them, from 1."""
    return b.x + 1, b.y + 1, b.x + b.w, b.y + b.h


def kit(
    boxes: Sequence[Box], found: Sequence[Found], label: int
) -> tuple[Fraction, Fraction] | None:
    """Area and 11-point average of a class."""
    total = sum(b.label == label and not b.difficult for b in boxes)
    if not total:
        return None
    taken: set[int] = set()
    true = false = 0
    curve: list[tuple[Fraction, Fraction]] = []  # recall, precision
    for f in sorted((f for f in found if f.label == label), key=lambda f: (-f.score, f.image)):
        best, most = -1, Fraction(-1)
        for i, b in enumerate(boxes):
            if (
                b.label == label
                and b.image == f.image
                and (overlap := kit_iou(pixels(f), pixels(b))) > most
            ):
                best, most = i, overlap
        if most >= Fraction(1, 2) and boxes[best].difficult:
            continue
        if most >= Fraction(1, 2) and best not in taken:
            taken.add(best)
            true += 1
        else:
            false += 1
        curve.append((Fraction(true, total), Fraction(true, true + false)))
    area, before = Fraction(0), Fraction(0)
    for i, (recall, _) in enumerate(curve):
        area += (recall - before) * max(p for _, p in curve[i:])
        before = recall
    steps = [
        max((p for r, p in curve if r >= Fraction(k, 10)), default=Fraction(0)) for k in range(11)
    ]
    return area, Fraction(sum(steps), 11)


IMAGES, CLASSES = 3, 2
PLACES = (st.integers(0, 6), st.integers(0, 6), st.integers(1, 8), st.integers(1, 8))
OWNERS = (st.integers(0, IMAGES - 1), st.integers(0, CLASSES - 1))
BOXES = st.lists(st.builds(Box, *OWNERS, *PLACES, st.booleans()), max_size=14)
FOUND = st.lists(
    st.builds(Found, *OWNERS, *PLACES, st.sampled_from([0.125, 0.25, 0.5])), max_size=20
)


@settings(max_examples=150, deadline=None)
@given(BOXES, FOUND, st.data())
def test_equals_the_kit(boxes: list[Box], noise: list[Found], data: st.DataObject) -> None:
    """Few places and scores, so that much is equal; some detections are boxes shaken by a pixel."""
    near = data.draw(st.lists(st.sampled_from(boxes), max_size=12)) if boxes else []
    shift = st.integers(-1, 1)
    found = noise + [
        Found(b.image, b.label, b.x + data.draw(shift), b.y + data.draw(shift), b.w, b.h, 0.25)
        for b in near
    ]
    result = measure(annotations(boxes, IMAGES, CLASSES), found)
    expected = [kit(sorted(boxes, key=lambda b: b.image), found, k) for k in range(CLASSES)]
    for own, wanted in zip(result.per_class, expected, strict=True):
        assert ((own.ap, own.ap11) == (None, None)) == (wanted is None)
        if wanted is not None:
            assert own.ap == pytest.approx(float(wanted[0]), abs=1e-12)
            assert own.ap11 == pytest.approx(float(wanted[1]), abs=1e-12)
    defined = [w for w in expected if w is not None]
    assert result.ground_truth + result.difficult == len(boxes)
    assert sum(c.detections for c in result.per_class) == result.detections == len(found)
    assert (result.ap is None) == (not defined)
    if defined:
        assert result.ap == pytest.approx(
            float(sum(w[0] for w in defined) / len(defined)), abs=1e-12
        )
        assert result.ap11 == pytest.approx(
            float(sum(w[1] for w in defined) / len(defined)), abs=1e-12
        )


# Rule by rule
# ---------------------------------------------------------------------------------------------------------


def test_both_versions_of_a_known_curve() -> None:
    """Hits at ranks 1 and 3 for 4 boxes: precision 1 up to recall 1/4, 2/3 up to 1/2, then none."""
    ap, ap11 = average_precision(np.array([True, False, True]), 4)
    assert ap == pytest.approx((1 + 2 / 3) / 4)
    assert ap11 == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)


@pytest.mark.parametrize("found", range(1, 11))
def test_recalls_in_tenths_are_reached(found: int) -> None:
    """3 of 10 is a recall of 0.3, which is below 3 * 0.1 in floating point."""
    assert average_precision(np.ones(found, dtype=np.bool_), 10) == (
        pytest.approx(found / 10),
        (found + 1) / 11,
    )


def test_what_overlaps_a_taken_box_most_is_a_false_alarm_though_another_is_free() -> None:
    boxes = [Box(0, 0, 0, 0, 10, 10), Box(0, 0, 2, 0, 10, 10)]
    found = [Found(0, 0, 0, 0, 10, 10, 0.9), Found(0, 0, 0, 0, 11, 10, 0.8)]
    assert measure(annotations(boxes), found).ap == pytest.approx(0.5)
    found[1] = Found(0, 0, 2, 0, 9, 10, 0.8)
    assert measure(annotations(boxes), found).ap == 1


def test_an_iou_of_one_half_is_enough() -> None:
    boxes = [Box(0, 0, 0, 0, 10, 10)]
    assert measure(annotations(boxes), [Found(0, 0, 0, 0, 5, 10, 0.9)]).ap == 1
    assert measure(annotations(boxes), [Found(0, 0, 0, 0, 10, 21, 0.9)]).ap == 0


def test_difficult_boxes_are_neither_missed_nor_false_alarms() -> None:
    boxes = [Box(0, 0, 0, 0, 10, 10), Box(0, 0, 50, 50, 10, 10, difficult=True)]
    own, passed = Found(0, 0, 0, 0, 10, 10, 0.5), Found(0, 0, 50, 50, 10, 10, 0.9)
    for found in ([own], [passed, own], [passed, passed, own]):
        result = measure(annotations(boxes), found)
        assert (result.ap, result.ap11) == (1, 1)
        assert (result.ground_truth, result.difficult, result.detections) == (1, 1, len(found))
    without = replace(annotations(boxes), difficult=None)  # another format
    assert measure(without, [own]).ap == 0.5
    crowd = replace(without, crowd=np.array([False, True]))
    assert measure(crowd, [passed, own]).ap == 1


def test_a_class_without_boxes_has_no_ap_and_no_part_in_the_mean() -> None:
    boxes = [Box(0, 0, 0, 0, 9, 9), Box(0, 1, 0, 0, 9, 9, difficult=True)]
    found = [Found(0, k, 0, 0, 9, 9, 0.5) for k in range(3)]
    result = measure(annotations(boxes, classes=3), found)
    assert [(c.ap, c.ap11, c.ground_truth, c.difficult) for c in result.per_class] == [
        (1, 1, 1, 0),
        (None, None, 0, 1),
        (None, None, 0, 0),
    ]
    assert (result.ap, result.ap11) == (1, 1)


def test_images_that_were_not_shown_do_not_count_and_those_without_detections_do() -> None:
    boxes = [Box(i, 0, 0, 0, 9, 9) for i in range(3)]
    found = [Found(0, 0, 0, 0, 9, 9, 0.5)]
    a = annotations(boxes, images=3)
    assert measure(a, found).ap == pytest.approx(1 / 3)
    part = measure(a, found, shown=[0, 2])
    assert (part.ap, part.images, part.images_in_set, part.ground_truth) == (0.5, 2, 3, 2)
    nothing = measure(a, found, shown=[])
    assert (nothing.ap, nothing.ap11, nothing.images) == (None, None, 0)
    assert measure(annotations([], images=2), []).ap is None
    assert measure(annotations(boxes, images=3), []).ap == 0


def test_processes_agree_whoever_saw_what() -> None:
    rng = np.random.default_rng(0)
    boxes = [Box(int(i), 0, *rng.integers(1, 20, 4).tolist()) for i in rng.integers(0, 6, 30)]
    found = [
        Found(b.image, 0, b.x + int(s), b.y, b.w, b.h, round(float(p), 1))
        for b, s, p in zip(boxes, rng.integers(0, 4, 30), rng.random(30), strict=True)
    ]
    a = annotations(boxes, images=6)
    whole = measure(a, found)
    for share in ([0, 2, 4], [5, 1]):
        rest = [i for i in range(6) if i not in share]
        merged = collector(a, found, share)
        merged.merge(collector(a, found, rest).arrays())
        assert evaluate_voc(a, merged.arrays()) == whole


def test_the_report_takes_names_literally_and_tells_what_was_left_out() -> None:
    found = [Found(0, 0, 0, 0, 9, 9, 0.5), Found(0, 0, 0, 0, 9, 9, float("nan"))]
    result = measure(annotations([Box(0, 0, 0, 0, 9, 9)], classes=2), found)
    file = io.StringIO()
    console = Console(file=file, width=80)
    console.print(result.table())
    console.print(result.class_table())
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert (
        "1 images, 1 boxes and 0 difficult ones, 1 detections; 1 detections were not finite"
        in " ".join(text.split())
    )
    assert "[bold]c0" in text
    assert json.loads(json.dumps(result.to_dict()))["stats"] == {"AP": 1.0, "AP11": 1.0}


# From files to the command
# --------------------------------------------------------------------------------------------


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A folder a split; the second of each first image's objects is difficult,
    and training has a bad one before it.
    """
    for split, folder in (("train", "train"), ("val", "valid")):
        write_voc(tmp_path / "voc" / folder, tmp_path / "voc" / folder, split)
    file = tmp_path / "voc" / "train" / "train_0.xml"
    first, second = file.read_text().split("</object>", 1)
    file.write_text(first + "</object>" + second.replace("ult>0<", "ult>1<", 1))
    file = tmp_path / "voc" / "valid" / "val_1.xml"
    file.write_text(file.read_text().replace("ult>0<", "ult>1<", 1))
    return tmp_path / "voc"


def test_marks_stay_with_their_boxes(voc: Path) -> None:
    train, val, _, _ = prepare(find_data(voc))
    assert val is not None
    assert train.difficult is not None
    assert val.difficult is not None
    assert train.boxes[train.difficult].tolist() == [[20, 2, 12, 16]]
    assert val.boxes[val.difficult].tolist() == [[10, 4, 8, 8]]
    file = voc / "train" / "train_0.xml"
    file.write_text(file.read_text().replace("<xmax>14</xmax>", "<xmax>2</xmax>"))
    cleaned = prepare(find_data(voc), skip_bad="boxes")[0]
    assert len(cleaned.boxes) == len(train.boxes) - 1
    assert cleaned.difficult is not None
    assert cleaned.boxes[cleaned.difficult].tolist() == [[20, 2, 12, 16]]


def test_other_formats_have_no_marks(shapes: Path) -> None:
    assert prepare(find_data(shapes))[0].difficult is None


def test_eval_speaks_voc(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = tmp_path / "run", tmp_path / "results.json"
    override = [*SMALL, "data.size=[32, 48]", "optim.batch_size=4"]
    detrellis.train("tiny", data=voc, out=run, override=override, epochs=1, workers=0, device="cpu")
    capsys.readouterr()
    result = detrellis.evaluate(run, metric="voc", workers=0, device="cpu", results=file)
    assert (result.images, result.ground_truth, result.difficult) == (COUNTS["val"], 2, 1)
    assert result.detections == len(json.loads(file.read_text())) == 20 * COUNTS["val"]
    options = ("eval", run, "--metric", "voc", "--workers", 0, "--device", "cpu")
    assert json.loads(call(*options, "--json", capsys=capsys)) == json.loads(
        json.dumps(result.to_dict())
    )
    text = call(*options, capsys=capsys)
    assert [
        word for word in ("VOC mean AP at IoU 0.5", "AP, 11 points", "emu") if word not in text
    ] == []
    assert "COCO box AP" in call(*options[:2], *options[4:], capsys=capsys)
