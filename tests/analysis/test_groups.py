"""The measurement on cases made by hand, and the whole analysis on small runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import detrellis
from detrellis.analysis.group_positions import GroupPositions, dealt, histograms, total_variation
from detrellis.analysis.groups import GroupsResult, LoggedDistances, RunGroups, analyze, draw
from detrellis.analysis.measurements import save
from detrellis.analysis.schemes import AllGroups, all_groups, load_with_scheme
from detrellis.distributed import World
from detrellis.engine.checkpoint import load_state
from detrellis.engine.eval_result import EvalResult
from detrellis.engine.evaluate import EvalOptions, collect
from detrellis.errors import UserError
from detrellis.loading import open_split
from detrellis.matching import Match, assign
from detrellis.schemes.distances import position_distance
from detrellis.schemes.group import Group
from detrellis.training import TrainableDetector
from detrellis.types import Targets

from .runs import SETTINGS, compared, small_recipe, untrained, without_boxes

HERE = World(0, 1, torch.device("cpu"))


def test_histograms_go_row_by_row_and_their_distance_is_total_variation() -> None:
    one = torch.tensor([[0.1, 0.1], [0.9, 0.1], [1.0, 1.0], [1.0, 1.0]])  # x, y
    two = torch.tensor([[0.1, 0.1], [0.2, 0.2], [0.9, 0.1], [0.1, 0.9]])
    shares = histograms(torch.stack([one, two, two]), grid=2)
    assert shares.tolist() == [[0.25, 0.25, 0, 0.5], [0.5, 0.25, 0.25, 0], [0.5, 0.25, 0.25, 0]]
    assert total_variation(shares).tolist() == [0.5, 0.5, 0]  # pairs (0, 1), (0, 2), (1, 2)
    apart = histograms(torch.stack([one * 0, one * 0 + 1]), grid=8)
    assert total_variation(apart).tolist() == [1.0]


def test_random_groups_have_the_same_positions() -> None:
    positions = torch.rand(2, 3, 50, 2, generator=torch.Generator().manual_seed(0))
    groups = dealt(positions, 4)
    assert groups.shape == (4, 2, 3, 50, 2)
    for deal in groups:
        assert torch.equal(
            deal.flatten(1, 2).sort(1).values, positions.flatten(1, 2).sort(1).values
        )
    places = GroupPositions.of(positions, 8)
    # One distribution: no difference.
    assert float(places.distance.mean()) == pytest.approx(float(places.random.mean()), abs=0.05)
    assert torch.equal(places.pd, position_distance(positions).mean(-1))
    assert GroupPositions.of(positions[:1].expand(2, -1, -1, -1) * 0, 8).distance.tolist() == [0, 0]


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("groups") / "first"
    settings = [*SETTINGS, "schemes.group.distances=true"]
    detrellis.train(
        "tiny",
        data=shapes,
        out=place,
        scheme="group=3",
        override=settings,
        epochs=2,
        workers=0,
        device="cpu",
    )
    return place


@pytest.mark.parametrize("name", ["tiny", "conditional-detr-r50", "dab-detr-r50", "detr-r50"])
def test_each_group_says_what_the_detector_says_with_its_queries(
    name: str, shapes: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(name).with_schemes("group=3")
    with open_split(untrained(tmp_path, shapes, recipe), HERE, EvalOptions(workers=0)) as opened:
        model, group = load_with_scheme(opened, Group)
        batch = next(iter(opened.loader))
        seen = all_groups(model, group, batch)
        first = model.detector(batch.images)
    assert (seen.groups, seen.queries, seen.fixed) == (3, 12, name != "tiny")
    assert (seen.positions is None) == (name == "detr-r50")
    torch.testing.assert_close(seen.of(0).logits[-1:], first.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.of(0).boxes[-1:], first.boxes, atol=1e-5, rtol=0)
    assert not torch.allclose(seen.of(2).logits[-1:], first.logits, atol=1e-3)
    if seen.positions is not None:
        assert seen.positions.shape == (len(batch.image_ids), 3, 12, 2)


def raw_score(run: Path, shapes: Path) -> EvalResult:
    with open_split(run, HERE, EvalOptions(data=shapes, workers=0)) as opened:
        state = load_state(run)["model"]
        own = {
            k.removeprefix("detector."): v for k, v in state.items() if k.startswith("detector.")
        }
        opened.model.detector.load_state_dict(own)
        (found,) = collect(opened.model.detector, opened.loader, opened.annotations, HERE.device)
        return found.compute()


def test_the_whole_analysis(run: Path, shapes: Path, tmp_path: Path) -> None:
    result = analyze(compared([run, run], names=["first $x", "[bold]"]), grid=4)
    one, two = result.runs
    assert one.to_dict() == two.to_dict() | {"name": one.name}
    assert (one.images, one.groups, one.queries, one.fixed) == (5, 3, 12, False)
    assert one.boxes > 0
    assert len(one.scores) == 3
    assert one.scores[0].ap == pytest.approx(raw_score(run, shapes).ap, abs=1e-6)
    assert len(one.instability) == 1  # two decoder layers
    assert one.positions is not None
    assert [len(group) for group in one.positions] == [12, 12, 12]
    assert one.shares is not None
    assert [sum(group) for group in one.shares] == pytest.approx([1, 1, 1])
    assert [x.epoch for x in one.log] == [1, 2]
    assert all(x.pd is not None and x.md is not None and x.md > 0 for x in one.log)

    files = save(result, tmp_path / "new" / "folder")
    written = json.loads(files.values.read_text())
    assert written == result.to_dict()
    assert written["settings"] == {"grid": 4, "split": "val", "shuffles": 10}
    assert [r["name"] for r in written["runs"]] == ["first $x", "[bold]"]
    assert len(written["runs"][0]["shares"][0]) == 16
    assert written["runs"][0]["scores"][2].keys() >= {"AP", "AR100"}
    assert files.figure.stat().st_size > 10_000
    assert result.table().row_count == 2 * 4


def test_batches_change_nothing(run: Path) -> None:
    one, other = (analyze(compared(run, batch_size=n)).runs[0] for n in (1, 4))
    for name in ("pd", "md", "distance", "random"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-4)
    assert one.instability == pytest.approx(other.instability, abs=0.5)


def test_md_is_the_distance_of_the_queries_of_one_box(run: Path) -> None:
    """Against each group and image matched for itself."""
    measured = analyze(compared(run, batch_size=2)).runs[0]
    distances: dict[tuple[int, int], list[float]] = {}
    with open_split(run, HERE, EvalOptions(workers=0, batch_size=2)) as opened:
        model, group = load_with_scheme(opened, Group)
        for batch in opened.loader:
            seen = all_groups(model, group, batch)
            assert seen.positions is not None
            for image, first in enumerate(batch.targets.offsets):
                where = [matched_alone(model, seen, batch.targets, k, image) for k in range(3)]
                for j in range(first, first + batch.targets.sizes[image]):
                    for a, b in ((0, 1), (0, 2), (1, 2)):
                        apart = (
                            seen.positions[image, a, where[a][j]]
                            - seen.positions[image, b, where[b][j]]
                        )
                        distances.setdefault((a, b), []).append(float(apart.norm()))
    means = [sum(d) / len(d) for d in distances.values()]
    assert measured.boxes == len(distances[0, 1])
    assert measured.md == pytest.approx(sum(means) / 3, abs=1e-5)


def matched_alone(
    model: TrainableDetector, seen: AllGroups, targets: Targets, k: int, image: int
) -> dict[int, int]:
    """The query of each box."""
    first, size = targets.offsets[image], targets.sizes[image]
    own = Targets(
        targets.labels[first : first + size], targets.boxes[first : first + size], (size,)
    )
    output = seen.of(k).map(lambda t: t[-1:, image : image + 1])
    (found,) = assign([Match(output, own, model.supervision.assign)])
    return {first + int(j): int(q) for q, j in zip(found.query, found.target, strict=True)}


@pytest.mark.parametrize(("name", "places"), [("conditional-detr-r50", True), ("detr-r50", False)])
def test_runs_without_proposals_and_without_places(
    name: str, places: bool, shapes: Path, tmp_path: Path
) -> None:
    """The same positions in all images, or none; and no log."""
    run = untrained(tmp_path / "run", shapes, small_recipe(name).with_schemes("group=2"))
    result = analyze(compared(run, batch_size=2))
    (found,) = result.runs
    assert (found.fixed, found.log, len(found.scores)) == (True, (), 2)
    assert [
        getattr(found, x) is not None for x in ("positions", "shares", "distance", "pd", "md")
    ] == [places] * 5
    json.dumps(result.to_dict(), allow_nan=False)
    save(result, tmp_path)
    assert result.table().row_count == 3


def test_any_number_of_groups_can_be_drawn() -> None:
    score = without_boxes("AP", "AP50", "AR100")
    for groups in (2, 11):
        points = tuple(((0.1, 0.2), (0.3, 0.4)) for _ in range(groups))
        shares = tuple((0.25,) * 4 for _ in range(groups))
        log = (LoggedDistances(1, None, None), LoggedDistances(2, 0.1, 0.2))
        run = RunGroups(
            name="x", run="x", data="x", images=1, boxes=0, groups=groups, queries=2, fixed=True, positions=points,
            shares=shares, distance=0.0, random=0.1, pd=0.1, md=None, instability=(), scores=(score,) * groups, log=log,
        )  # fmt: skip
        result = GroupsResult((run, run), 2, "val")
        draw(result).draw_without_rendering()
        assert result.table().row_count == 2 * (groups + 1)
        assert math.isfinite(
            json.loads(json.dumps(result.to_dict(), allow_nan=False))["runs"][0]["pd"]
        )


def test_what_cannot_be_measured_is_said(run: Path, shapes: Path, tmp_path: Path) -> None:
    plain = untrained(tmp_path / "plain", shapes, small_recipe("tiny"))
    for wrong, message in (
        (plain, "trained with one group Train"),
        (run / "last.safetensors", "Give the folder"),
    ):
        with pytest.raises(UserError) as error:
            analyze(compared([run, wrong]))
        assert message in " ".join(str(error.value).split())
    with pytest.raises(UserError, match="grid=0"):
        analyze(compared(run), grid=0)

    grouped = untrained(tmp_path / "grouped", shapes, small_recipe("tiny").with_schemes("group=2"))
    other = untrained(tmp_path / "other", shapes, small_recipe("tiny").with_schemes("group=3"))
    (grouped / "last.state.pt").write_bytes((other / "last.state.pt").read_bytes())
    with pytest.raises(UserError, match="does not fit the run's recipe"):
        analyze(compared(grouped))
    (grouped / "last.state.pt").unlink()
    with pytest.raises(UserError, match=r"no last.state.pt"):
        analyze(compared(grouped))
