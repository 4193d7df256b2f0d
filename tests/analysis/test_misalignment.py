"""The measurement on cases made by hand, and the whole analysis on small runs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detrellis
from detrellis.analysis.figures import BLUE, ORANGE
from detrellis.analysis.measurements import save
from detrellis.analysis.misalignment import (
    BINS,
    EDGES,
    Misalignment,
    MisalignmentResult,
    Pairs,
    analyze,
    draw,
    pairs,
)
from detrellis.analysis.outputs import image_outputs, truth
from detrellis.analysis.runs import run_names
from detrellis.boxes import pairwise_iou
from detrellis.data.formats.coco import read_coco
from detrellis.data.records import to_annotations
from detrellis.data.splits import SplitFiles
from detrellis.distributed import World
from detrellis.engine.evaluate import EvalOptions
from detrellis.errors import UserError
from detrellis.loading import open_split

from ..small import SMALL
from .runs import broken, compared

# A ground-truth box, and queries that overlap it with an IoU of 0.9, 0.8, 0.5, 0.1
OBJECT = [0.0, 0.0, 10.0, 10.0]
NINE, EIGHT, FIVE, ONE = ([0.0, 0.0, 10.0, height] for height in (9.0, 8.0, 5.0, 1.0))
FAR = [50.0, 50.0, 60.0, 60.0]


def found(
    scores: list[list[float]], boxes: list[list[float]], labels: list[int], there: list[list[float]]
) -> Pairs:
    truth_boxes = torch.tensor(there, dtype=torch.float64).view(-1, 4)
    labels_of = torch.tensor(labels, dtype=torch.int64)
    return pairs(
        torch.tensor(scores), torch.tensor(boxes, dtype=torch.float64), labels_of, truth_boxes
    )


def test_the_best_box_is_not_the_highest_score() -> None:
    scores = [[0.2, 0.0], [0.7, 0.3], [0.1, 0.9], [0.99, 0.0]]
    ours = found(scores, [NINE, EIGHT, FIVE, ONE], [0, 1], [OBJECT, OBJECT])
    assert ours.br_query.tolist() == [0, 0]
    assert ours.hc_query.tolist() == [1, 2]  # query 3 scores higher for class 0, but lies elsewhere
    assert ours.br_iou.tolist() == pytest.approx([0.9, 0.9])
    assert ours.hc_iou.tolist() == pytest.approx([0.8, 0.5])  # 0.5 passes the gate
    # 0.2 is below 0.99, 0.9, 0.7 and 0.3; the two zeros beside it are not above
    assert ours.br_rank.tolist() == [4, 6]

    whole = Misalignment.of(ours, (4, 5, 7))
    assert (whole.boxes, whole.with_hc, whole.hit_rate) == (2, 2, 0.0)
    assert whole.gap == pytest.approx((0.1 + 0.4) / 2)
    assert whole.br_recall == {4: 0.0, 5: 0.5, 7: 1.0}


def test_a_box_without_hc_counts_in_all_but_hc_and_gap() -> None:
    whole = Misalignment.of(found([[0.9], [0.5]], [ONE, FAR], [0, 0], [OBJECT, FAR]))
    assert (whole.boxes, whole.with_hc) == (2, 1)
    assert whole.br_iou == pytest.approx((0.1 + 1) / 2)
    assert (whole.hc_iou, whole.gap, whole.hit_rate) == (1.0, 0.0, 0.5)
    assert sum(whole.br_histogram) == 2
    assert sum(whole.hc_histogram) == 1
    nowhere = found([[0.9]], [ONE], [0], [OBJECT])
    assert nowhere.hc_query.tolist() == [-1]
    assert math.isnan(nowhere.hc_iou.item())
    assert Misalignment.of(nowhere).gap is None


def test_the_first_of_equal_queries_counts() -> None:
    ours = found([[0.3], [0.6], [0.6], [0.6]], [FAR, EIGHT, EIGHT, FIVE], [0], [OBJECT])
    assert (ours.br_query.item(), ours.hc_query.item(), ours.br_rank.item()) == (1, 1, 0)
    assert Misalignment.of(ours).br_recall[10] == 1


def test_an_image_without_boxes() -> None:
    nothing = found([[0.3, 0.2], [0.6, 0.1]], [FAR, EIGHT], [], [])
    assert all(len(column) == 0 for column in nothing)
    whole = Misalignment.of(nothing)
    assert (whole.boxes, whole.br_iou, whole.gap, whole.hit_rate) == (0, None, None, None)
    assert whole.br_histogram == (0,) * BINS
    some = found([[0.3, 0.2], [0.6, 0.1]], [FAR, EIGHT], [0], [FAR])
    assert Misalignment.of(Pairs.joined([nothing, some, nothing])) == Misalignment.of(some)


def test_bins_are_closed_below_and_the_last_one_above() -> None:
    iou = torch.tensor([0.0, *EDGES[1:-1], 0.96, 1.0, 1.0 + 1e-15], dtype=torch.float64)
    none = torch.full((len(iou),), -1)
    whole = Misalignment.of(Pairs(none, iou, none, none, iou))
    assert whole.br_histogram == (*([1] * (BINS - 1)), 4)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.95])
def test_against_one_box_at_a_time(threshold: float) -> None:
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(40, 4, generator=generator, dtype=torch.float64)
    boxes = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:]], 1)
    scores = torch.rand(30, 4, generator=generator)
    labels = torch.randint(4, (10,), generator=generator)
    queries, there = boxes[:30], boxes[30:]
    ours = pairs(scores, queries, labels, there, threshold)
    overlap = pairwise_iou(queries, there)
    for j, c in enumerate(labels.tolist()):
        br = max(range(30), key=lambda q, j=j: overlap[q, j])
        passing = [q for q in range(30) if overlap[q, j] >= threshold]
        hc = max(passing, key=lambda q, c=c: scores[q, c], default=-1)
        assert (ours.br_query[j], ours.hc_query[j]) == (br, hc)
        assert ours.br_rank[j] == sum(s > scores[br, c] for s in scores.flatten().tolist())


def test_names_tell_runs_apart() -> None:
    assert run_names(["runs/a", Path("runs/b/")]) == ["a", "b"]
    assert run_names(["one/run", "two/run", "two/other"]) == ["one/run", "two/run", "two/other"]
    assert run_names(["runs/a", "runs/a", "runs/a"]) == ["a", "a-2", "a-3"]
    assert run_names(["a", "b"], ["x", "y"]) == ["x", "y"]
    for names in (["x"], ["x", "x"], ["x", ""]):
        with pytest.raises(UserError, match="all different"):
            run_names(["a", "b"], names)


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("misalignment") / "first"
    # Wider than the pictures: all are padded
    settings = [*SMALL, "data.size=[64, 96]", "optim.batch_size=4"]
    detrellis.train(
        "tiny", data=shapes, out=place, override=settings, epochs=1, workers=0, device="cpu"
    )
    return place


def colours_in(picture: Path) -> set[tuple[int, ...]]:
    with Image.open(picture) as image:
        return set(map(tuple, np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()))


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def test_the_whole_analysis(run: Path, tmp_path: Path) -> None:
    result = analyze(
        compared([run, run], names=["first $x", "[bold]"]), threshold=0.1, top=(240, 1, 1)
    )
    one, two = result.runs
    assert one.statistics == two.statistics
    assert one.images == 5
    assert one.statistics.boxes == sum(one.statistics.br_histogram) > 0
    assert one.statistics.with_hc == sum(one.statistics.hc_histogram)
    assert one.statistics.br_recall[240] >= one.statistics.br_recall[1]  # type: ignore[operator]

    files = save(result, tmp_path / "new" / "folder")
    written = json.loads(files.values.read_text())
    assert written == result.to_dict()
    assert written["settings"] | {"edges": None} == {
        "threshold": 0.1,
        "top": [1, 240],
        "split": "val",
        "edges": None,
    }
    assert [r["name"] for r in written["runs"]] == ["first $x", "[bold]"]
    assert written["runs"][0]["data"].endswith("instances_val.json")
    assert {rgb(BLUE), rgb(ORANGE)} <= colours_in(files.figure)
    titles = [axes.get_title(loc="left") for axes in draw(result).axes]
    assert [t.splitlines()[0] for t in titles] == ["first $x", "[bold]"]
    assert result.table().row_count == 2


def test_any_number_of_panels_shares_its_axes(run: Path) -> None:
    result = analyze(compared(run))
    for count in (1, 3, 4):
        axes = draw(MisalignmentResult(result.runs * count, 0.5, (10,), "val")).axes
        assert len(axes) == count
        assert len({a.get_ylim() for a in axes}) == 1
        statistics = result.runs[0].statistics
        highest = max(statistics.br_histogram) / statistics.boxes
        assert all(a.get_ylim()[1] * 0.95 > highest for a in axes)


def test_it_sees_what_the_evaluator_sees(run: Path) -> None:
    """Queries, scores and pixels are those of `detect`."""
    with open_split(
        run, World(0, 1, torch.device("cpu")), EvalOptions(workers=0, batch_size=3)
    ) as opened:
        images = {s.image_id: s for s in image_outputs(opened)}
        assert len(images) == len(opened.annotations) == 5
        for batch in opened.loader:
            for image_id, best in zip(
                batch.image_ids,
                opened.model.detector.detect(batch.images, batch.sizes),
                strict=True,
            ):
                own = images[image_id]
                assert best.scores[0] == own.scores.max()
                query = int(own.scores.max(-1).values.argmax())
                torch.testing.assert_close(
                    best.boxes[0].double(), own.boxes[query], atol=1e-3, rtol=0
                )


def test_the_truth_is_the_annotations_without_crowds(
    shapes: Path, tmp_path: Path, run: Path
) -> None:
    source = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    everything = analyze(compared(run, data=shapes)).runs[0].statistics
    source["annotations"][0]["iscrowd"] = 1
    file = tmp_path / "crowd.json"
    file.write_text(json.dumps(source))
    images = shapes / "images" / "val"
    less = analyze(compared(run, val=file, val_images=images)).runs[0].statistics
    assert less.boxes == everything.boxes - 1 == len(source["annotations"]) - 1

    annotations = to_annotations(read_coco("val", SplitFiles(file, (images,))))
    crowd = source["annotations"][0]
    row = annotations.image_ids.tolist().index(crowd["image_id"])
    labels, boxes = truth(annotations, row)
    expected = [a["bbox"] for a in source["annotations"] if a["image_id"] == crowd["image_id"]][1:]
    assert boxes.tolist() == [[x, y, x + w, y + h] for x, y, w, h in expected]
    assert len(labels) == len(expected)

    for annotation in source["annotations"]:
        annotation["iscrowd"] = 1
    file.write_text(json.dumps(source))
    with pytest.raises(UserError, match="only crowd regions"):
        analyze(compared(run, val=file, val_images=images))


def test_what_cannot_be_measured_is_said(
    run: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong, message in (
        ({"threshold": 1.5}, "from 0 to 1"),
        ({"top": ()}, "top nothing"),
        ({"top": (0, 10)}, "top 0, 10"),
    ):
        with pytest.raises(UserError, match=message):
            analyze(compared(run), **wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no split `test`"):
        analyze(compared(run, split="test"))
    with pytest.raises(UserError, match="no run to measure"):
        analyze(compared([]))

    source = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    source["categories"] = [c | {"name": f"other {c['name']}"} for c in source["categories"]]
    file = tmp_path / "other.json"
    file.write_text(json.dumps(source))
    with pytest.raises(UserError, match=r"is not in train|is 'other"):
        analyze(compared(run, val=file, val_images=shapes / "images" / "val"))

    with pytest.raises(UserError, match=r"broken.safetensors: .* not finite"):
        analyze(compared(broken(run)))

    result = analyze(compared(run))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file, not a folder"):
        save(result, tmp_path / "file")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'pip install "detrellis\[viz\]"'):
        save(result, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
