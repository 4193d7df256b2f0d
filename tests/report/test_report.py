"""The error analysis, of detections whose errors are known;
its page; and the thresholds that predicting takes.
"""

from __future__ import annotations

import errno
import json
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from detrellis import api
from detrellis.data.annotations import Annotations
from detrellis.data.classes import ClassMap
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import load_whole, save_weights
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.evaluate import EvalOptions
from detrellis.errors import UserError
from detrellis.outputs import Outputs
from detrellis.predictions.tiles import Tiling
from detrellis.recipes import find_recipe
from detrellis.report.charts import marks
from detrellis.report.diagnose import diagnose, operating_point
from detrellis.report.thresholds import class_thresholds
from detrellis.report.write import evaluation_command, not_written, write_report
from detrellis.types import Detections
from detrellis.webpage import table
from tests.browser import WIDTHS, Browser
from tests.small import small

CLASSES = ClassMap((1, 3, 7), ("<script>alert(1)</script>", "a & b", "bird"))
PER_IMAGE = 6


def annotations(folder: Path, images: int = 20) -> Annotations:
    """Boxes that do not touch, of classes in turn."""
    rng = np.random.default_rng(0)
    names = [f"<b>{number}.jpg" for number in range(images)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(folder / name)
    count = images * PER_IMAGE
    place = np.arange(count) % PER_IMAGE
    boxes = np.stack([place % 3 * 30, place // 3 * 30, *rng.uniform(15, 25, (2, count))], axis=1)
    return Annotations(
        root=folder,
        classes=CLASSES,
        image_ids=np.arange(images) * 5,
        file_names=np.array([name.encode() for name in names]),
        sizes=np.tile([60, 90], (images, 1)),
        starts=np.arange(images + 1) * PER_IMAGE,
        boxes=boxes,
        labels=np.arange(count) % 3,
        crowd=np.zeros(count, dtype=np.bool_),
        areas=boxes[:, 2] * boxes[:, 3],
        ids=np.arange(count) + 1000,
    )


def detected(truth: Annotations, shown: Annotations) -> CocoEvaluator:
    """A good detector's detections of `truth`, against what `shown` says:
    shaky boxes, weak false alarms beside.
    """
    rng = np.random.default_rng(1)
    evaluator = CocoEvaluator(shown)
    for image in range(len(truth)):
        rows = slice(truth.starts[image], truth.starts[image + 1])
        corners = truth.boxes[rows] + rng.normal(0, 0.4, (PER_IMAGE, 4))
        corners[:, 2:] += corners[:, :2]
        boxes = torch.tensor(np.concatenate([corners, [[88, 58, 90, 60]]]))
        scores = torch.tensor([*rng.uniform(0.6, 0.95, PER_IMAGE), 0.2])
        labels = torch.tensor([*truth.labels[rows], 0])
        evaluator.update([int(truth.image_ids[image])], [Detections(scores, labels, boxes)])
    return evaluator


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[CocoEvaluator, set[int]]:
    """An evaluation against annotations of which ten have a wrong label, and the ids of those."""
    truth = annotations(tmp_path_factory.mktemp("pictures"))
    wrong = np.random.default_rng(2).choice(len(truth.labels), 10, replace=False)
    labels = truth.labels.copy()
    labels[wrong] = (labels[wrong] + 1) % 3
    return detected(truth, replace(truth, labels=labels)), set(truth.ids[wrong].tolist())


def test_wrong_labels_are_listed(planted: tuple[CocoEvaluator, set[int]]) -> None:
    evaluator, wrong = planted
    found = diagnose(evaluator).diagnosis
    suspected = [error for error in found.label_errors if error.kind == "wrong_label"]
    listed = {error.annotation for error in suspected}
    assert len(wrong & listed) >= 8
    assert len(listed - wrong) <= 2
    assert all(error.given != error.detected for error in suspected)


def test_confusions_misses_and_false_alarms(tmp_path: Path) -> None:
    truth = annotations(tmp_path)
    labels = truth.labels.copy()
    labels[4] = 0  # given as the first class, detected as the second
    found = diagnose(detected(truth, replace(truth, labels=labels)))
    d = found.diagnosis
    matrix = np.array(d.matrix)
    assert matrix[0, 1] == 1
    assert np.trace(matrix) == len(labels) - 1
    assert matrix[3].sum() == 0  # the weak false alarms lie below the threshold
    assert 0.2 < (d.best.threshold or 0) < 0.95
    assert found.missed.tolist() == [5]  # numbered from 1
    assert d.tide_counts["Cls"] == 1


def test_the_threshold_maximises_f1() -> None:
    rng = np.random.default_rng(0)
    scores = np.round(rng.uniform(size=200), 2) + 0.003  # with ties
    right = rng.uniform(size=200) < scores
    best, curve = operating_point(scores, right, boxes=130)

    def f1(threshold: float) -> float:
        taken = scores >= threshold
        return float(2 * right[taken].sum() / (taken.sum() + 130))

    assert best.threshold is not None
    assert f1(best.threshold) == best.f1 == pytest.approx(max(map(f1, np.unique(scores))))
    assert curve == pytest.approx([f1(n / 100) for n in range(101)], abs=1e-4)
    assert operating_point(scores, right, boxes=0)[0].threshold is None


def test_the_threshold_is_halfway_to_what_is_left_out() -> None:
    scores, right = np.array([0.9, 0.5, 0.1]), np.array([True, True, False])
    assert operating_point(scores, right, boxes=2)[0].threshold == pytest.approx(0.3)


class Reader(HTMLParser):
    """Counts elements, and keeps what they link to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_stands_alone_and_escapes(
    planted: tuple[CocoEvaluator, set[int]], tmp_path: Path
) -> None:
    evaluator, _ = planted
    card = Card(find_recipe("tiny"), CLASSES, {}, epoch=3, step=30)
    result = write_report(
        Outputs(tmp_path), evaluator, evaluator.compute(), card, "detrellis eval '<run>'", "val"
    )
    assert result.report is not None
    text = Path(result.report).read_text()
    reader = Reader()
    reader.feed(text)
    assert "script" not in reader.tags
    assert "b" not in reader.tags  # of the files' names
    assert reader.links
    assert all(link.startswith("data:image/jpeg;base64,") for link in reader.links)
    assert "http" not in text.replace("http-equiv", "")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "detrellis eval &#x27;&lt;run&gt;&#x27;" in text
    assert len(text) < 3e6
    assert 'loading="lazy"' not in text  # printed, or looked at as a whole, they would be missing
    assert text.count(escape(str(evaluator.annotations.root))) == 2  # Annotations, and Pictures
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["diagnosis"]["label_errors_found"] >= 8


def test_a_browser_shows_it_without_a_network_on_a_phone_too(
    planted: tuple[CocoEvaluator, set[int]], tmp_path: Path
) -> None:
    evaluator, _ = planted
    outputs, card = Outputs(tmp_path / "run"), Card(find_recipe("tiny"), CLASSES, {}, epoch=3)
    write_report(outputs, evaluator, evaluator.compute(), card, "detrellis eval run", "val")
    with Browser(tmp_path / "browser") as browser:
        for width in WIDTHS:
            browser.open((tmp_path / "run" / "report.html").as_uri(), width)
            assert browser.too_wide() <= 0
            assert browser.ask("document.images.length") > 3
            assert browser.ask("[...document.images].every(image => image.naturalWidth > 0)")
            assert {urlsplit(address).scheme for address in browser.loaded()} == {"file", "data"}
            named = {event.get("method") for event in browser.events}
            assert "Page.javascriptDialogOpening" not in named, "a class's name is a script"


def test_words_stand_left_and_numbers_right() -> None:
    rows = [("a", "one", "0.5", "-", "(none)"), ("b", "", "1,200", "0.1 [-0.2, +0.3]", "12")]
    text = table("title", ("name", "what", "AP", "gain", "found"), rows)
    kinds = re.findall(r'<th scope="col"( class="words")?>(\w+)', text)
    assert [name for words, name in kinds if words] == ["name", "what", "found"]
    assert text.count('<td class="words">') == 6


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 0.4953, False, [0, 0.1, 0.2, 0.3, 0.4]),
        (0, 25.1, False, [0, 5, 10, 15, 20, 25]),
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1, 3, True, [1, 2, 3]),
        (1, 12, True, [2, 4, 6, 8, 10, 12]),
        (5, 5, True, [5]),
    ],
)
def test_marks_of_an_axis_are_round(
    low: float, high: float, whole: bool, expected: list[float]
) -> None:
    assert marks(low, high, whole) == expected


def test_a_report_names_the_command_that_repeats_it() -> None:
    assert evaluation_command("run", EvalOptions(), "coco") == "detrellis eval run"
    options = EvalOptions(data="d", split="test", skip_bad="boxes")
    tiled = evaluation_command(
        "run", options, "masks", nms=0.5, tiling=Tiling(640, 0.1, full=False)
    )
    assert tiled == (
        "detrellis eval run --data d --nms 0.5 --metric masks --split test --tiles 640 "
        "--overlap 0.1 --tiles-only --skip-bad --keep-partial"
    )
    assert evaluation_command("run", EvalOptions(), "coco", tta=True) == "detrellis eval run --tta"
    assert evaluation_command("run", EvalOptions(), "coco", tta="64,flip").endswith(
        "--tta-views 64,flip"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": "masks", "tta": True}, "--tta merges boxes"),
        ({"metric": "voc", "report": "here"}, "--report and --metric voc"),
        ({"tiles": 64, "tta": True}, "both views"),
    ],
)
def test_what_no_evaluation_can_do_is_refused_before_it(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "run.safetensors").touch()  # not even the weights are opened
    with pytest.raises(UserError, match=message):
        api.evaluate(tmp_path / "run.safetensors", **given)


def test_predict_takes_the_stored_thresholds(shapes: Path, tmp_path: Path) -> None:
    recipe = small("tiny", ["none"]).override(["data.size=64", "data.augment=detr"])
    result = api.train(recipe, data=shapes, epochs=1, out=tmp_path / "run", workers=0, device="cpu")
    assert (result.run / "report.html").exists()
    weights, card = load_whole(result.run)
    report = json.loads((result.run / "report.json").read_text())
    assert (report["epoch"], report["step"]) == (card.epoch, card.step)
    # Each class has its own: what is above it is kept. After an epoch some class is among the best.
    picture = next((shapes / "images" / "val").iterdir())
    (every,) = api.predict(result.run, picture, threshold=0, device="cpu")
    kept, *others = sorted(set(every.names))
    assert others
    for row in report["diagnosis"]["classes"]:
        row["best"]["threshold"] = 0.0 if row["name"] == kept else 1.0
    report["diagnosis"]["best"]["threshold"] = 0.5
    (result.run / "report.json").write_text(json.dumps(report))
    (found,) = api.predict(result.run, picture, threshold="auto", device="cpu")
    assert set(found.names) == {kept}
    assert found.names.count(kept) == every.names.count(kept)
    # Of other weights there are none.
    other = tmp_path / "other.safetensors"
    save_weights(other, weights, card)
    with pytest.raises(UserError, match="no report"):
        class_thresholds(other, card.classes)
    save_weights(result.run / "other.safetensors", weights, replace(card, epoch=7))
    with pytest.raises(UserError, match="epoch 7"):
        class_thresholds(result.run / "other.safetensors", card.classes)


def test_the_runs_report_is_of_its_own_data_as_it_is(shapes: Path, tmp_path: Path) -> None:
    recipe = small("tiny", ["none"]).override(["data.size=64", "data.augment=none"])
    run = api.train(
        recipe, data=shapes, epochs=1, out=tmp_path / "run", workers=0, device="cpu"
    ).run
    page, before = run / "report.html", (run / "report.html").read_bytes()
    for other in ({"data": shapes}, {"nms": 0.5}, {"tta": True}, {"metric": "voc"}):
        api.evaluate(run, **other, workers=0, device="cpu")
        assert page.read_bytes() == before, other
    page.unlink()
    api.evaluate(run, workers=0, device="cpu")
    assert page.exists()


def test_a_report_that_finds_no_room_says_what_writes_it_later() -> None:
    """Of a run that is trained: nothing stops for it."""
    full = OSError(errno.ENOSPC, "No space left on device", "runs/first/report.json")
    assert not_written(full, Path("runs/first")) == (
        "No report is written: No space left on device: runs/first/report.json\n"
        "  Later: detrellis train --resume runs/first"
    )
    assert not_written(ValueError("no"), Path("run")) == ("No report is written: ValueError: no")
