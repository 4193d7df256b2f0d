"""Distances on cases made by hand, places against the scheme's own queries,
and the whole analysis on small runs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from detrellis.analysis.measurements import save
from detrellis.analysis.query_distance import (
    BoxDistances,
    MeanDistances,
    Positives,
    QueryDistanceResult,
    QueryPlaces,
    RunQueryDistance,
    analyze,
    averaged,
    distances,
    draw,
    query_places,
)
from detrellis.analysis.schemes import begin, check_alone, load_with_scheme
from detrellis.distributed import World
from detrellis.engine.evaluate import EvalOptions
from detrellis.errors import UserError
from detrellis.loading import open_split
from detrellis.matching import Hungarian, Match, assign
from detrellis.schemes.collaborative.queries import choose
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.types import Segment

from .runs import compared, small_recipe, untrained

HERE = World(0, 1, torch.device("cpu"))
MAIN = torch.tensor([[0.0, 0.0], [0.3, 0.4], [1.0, 0.0]], dtype=torch.float64)


def at(*points: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(points, dtype=torch.float64).view(-1, 2)


def test_each_box_is_measured_from_its_positives() -> None:
    """Box 0: two positives. Box 1: none. Box 2:
    one, but no query is matched to it. Query 2 is free.
    """
    places = QueryPlaces(MAIN, torch.tensor([0, 1, -1]), {})
    owner = torch.tensor([0, 2, 0])
    apart = distances(places, Positives(at((0, 0), (0.3, 0.0), (0.6, 0.8)), owner))
    assert apart.positives.tolist() == [2, 0, 1]
    assert apart.matched.tolist() == pytest.approx([(0 + 1.0) / 2, math.nan, math.nan], nan_ok=True)
    far = (1.0 + math.hypot(0.4, 0.8)) / 2
    assert apart.unmatched.tolist() == pytest.approx([far, math.nan, 0.7], nan_ok=True)


def test_images_without_boxes_positives_or_free_queries() -> None:
    none = torch.tensor([], dtype=torch.int64)
    nothing = distances(QueryPlaces(MAIN, none, {}), Positives(at(), none))
    assert [len(t) for t in nothing] == [0, 0, 0]
    busy = distances(
        QueryPlaces(MAIN, torch.tensor([2, 0, 1]), {}), Positives(at((1, 0)), torch.tensor([0]))
    )
    assert busy.matched[0] == 0
    assert busy.unmatched.isnan().all()
    found = averaged([nothing, busy])
    assert (found.matched, found.unmatched, found.counted, found.positives) == (
        0,
        None,
        1,
        pytest.approx(1 / 3),
    )
    assert averaged([nothing]) == MeanDistances(None, None, 0, None)


def test_means_are_over_boxes_of_all_images() -> None:
    one = BoxDistances(
        torch.tensor([0.1, 0.2]), torch.tensor([0.5, math.nan]), torch.tensor([9, 1])
    )
    other = BoxDistances(torch.tensor([0.6]), torch.tensor([0.7]), torch.tensor([2]))
    found = averaged([one, other])
    assert (found.matched, found.unmatched) == (pytest.approx(0.3), pytest.approx(0.6))
    assert (found.counted, found.positives) == (3, 4.0)


def test_all_branches_together_have_every_positive() -> None:
    one, other = at((0, 0)), at((1, 1), (0, 1))
    positives = {
        "a": Positives(one, torch.tensor([1])),
        "b": Positives(other, torch.tensor([0, 1])),
    }
    both, owner = QueryPlaces(MAIN, torch.tensor([0, 1]), positives).branches["all"]
    assert (both.tolist(), owner.tolist()) == ([[0, 0], [1, 1], [0, 1]], [1, 0, 1])
    assert list(QueryPlaces(MAIN, torch.tensor([0]), {"a": positives["a"]}).branches) == ["a"]


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("query-distance") / "first"
    return untrained(place, shapes, small_recipe("tiny").with_schemes("co=atss+rcnn"))


def test_places_are_those_of_the_queries_that_training_makes(run: Path) -> None:
    with open_split(run, HERE, EvalOptions(workers=0, batch_size=3)) as opened:
        model, co = load_with_scheme(opened, Collaborative)
        batch = next(iter(opened.loader))
        found = query_places(opened, model, co, batch)
        with torch.no_grad():
            step = begin(model, batch, model.detector.encode(batch.images))
            scene = co.scene(step)
            _, own = co.branches[0](scene, lambda indices, k: indices[:k])
            output = model.detector.decode(step.memory, {Segment("main", 12): step.queries})["main"]
    chosen = choose(
        own, scene.sizes, step.targets.offsets, lambda indices, k: indices[:k], max_queries=10_000
    )
    (pairs,) = assign([Match(output.map(lambda t: t[-1:]), step.targets, Hungarian())])
    assert step.queries.boxes is not None
    for i, (places, first) in enumerate(zip(found, step.targets.offsets, strict=True)):
        points, owner = places.positives["atss"]
        here = chosen.image == i
        torch.testing.assert_close(points.float(), chosen.boxes[i, chosen.slot[here], :2])
        assert torch.equal(owner, chosen.target[here] - first)
        torch.testing.assert_close(places.main.float(), step.queries.boxes[i, :, :2])
        wanted = {
            int(t) - first: int(q)
            for q, t, b in zip(*pairs[2:4], pairs.image, strict=True)
            if int(b) == i
        }
        assert dict(enumerate(places.matched.tolist())) == wanted
    assert sum(len(p.positives["atss"][0]) for p in found) > 0


def test_the_whole_analysis(run: Path, tmp_path: Path) -> None:
    result = analyze(compared([run, run], names=["first $x", "[bold]"], batch_size=2))
    one, two = result.runs
    assert one.to_dict() == two.to_dict() | {"name": one.name}
    assert (one.images, list(one.branches)) == (5, ["atss", "rcnn", "all"])
    assert one.boxes >= one.branches["all"].counted > 0
    assert one.branches["rcnn"].positives is not None
    assert one.branches["rcnn"].positives >= 1  # each box is a region
    assert one.example is not None
    files = save(result, tmp_path / "new" / "folder")
    written = json.loads(files.values.read_text())
    assert written == result.to_dict()
    assert written["runs"][0]["branches"]["atss"].keys() == {
        "matched",
        "unmatched",
        "counted",
        "positives",
    }
    assert files.figure.stat().st_size > 10_000
    assert result.table().row_count == 2 * 3


def test_batches_change_nothing(run: Path) -> None:
    one, other = (analyze(compared(run, batch_size=n)).runs[0] for n in (1, 4))
    for branch, found in one.branches.items():
        assert found.matched == pytest.approx(other.branches[branch].matched, abs=1e-3)
        assert found.unmatched == pytest.approx(other.branches[branch].unmatched, abs=1e-3)


def test_points_and_masks_too(shapes: Path, tmp_path: Path) -> None:
    """Queries with points instead of boxes; a branch that learns masks, which no one loads here."""
    run = untrained(tmp_path, shapes, small_recipe("conditional-detr-r50").with_schemes("co=mask"))
    (found,) = analyze(compared(run)).runs
    assert found.branches["mask"].counted > 0


def test_runs_without_anything_to_measure_are_drawn() -> None:
    run = RunQueryDistance("x", "x", "x", 0, 0, {"atss": MeanDistances(None, None, 0, None)}, None)
    result = QueryDistanceResult((run,), "val")
    draw(result).draw_without_rendering()
    assert result.table().row_count == 1


def test_what_cannot_be_measured_is_said(
    run: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = untrained(tmp_path / "plain", shapes, small_recipe("tiny"))
    with pytest.raises(UserError, match="trained without scheme co"):
        analyze(compared([run, plain]))
    nowhere = small_recipe("detr-r50").override(["detector.scores=sigmoid"]).with_schemes("co=atss")
    with pytest.raises(UserError, match="its queries have no place"):
        analyze(compared(untrained(tmp_path / "detr", shapes, nowhere)))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="Start it without torchrun"):
        check_alone()
