"""Each head's detections against what it says by itself, and the whole analysis on small runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from detrellis.analysis.branches import (
    BranchesResult,
    RunBranches,
    analyze,
    detections,
    draw,
    scaled,
)
from detrellis.analysis.measurements import save
from detrellis.analysis.schemes import begin, load_with_scheme
from detrellis.distributed import World
from detrellis.engine.evaluate import EvalOptions
from detrellis.errors import UserError
from detrellis.loading import open_split
from detrellis.schemes.collaborative.scene import Predictions
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.study.child import ap_of_branch

from .runs import compared, small_recipe, untrained, without_boxes

HERE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("branches") / "first"
    recipe = small_recipe("tiny", "data.size=[80, 96]").with_schemes("co=atss+rcnn+atss")
    return untrained(place, shapes, recipe)


def test_boxes_are_in_pixels_of_the_original_image() -> None:
    found = Predictions(torch.tensor([0.5]), torch.tensor([2]), torch.tensor([[0.0, 10, 30, 20]]))
    assert scaled(found, torch.tensor([2.0, 0.5, 2.0, 0.5])).boxes.tolist() == [[0, 5, 60, 10]]


def test_a_study_reads_the_ap_of_one_branch(run: Path) -> None:
    """As the table of all of them has it."""
    alone = ap_of_branch(run, "rcnn", device="cpu", workers=0)
    assert alone == {
        name: analyze(compared(run)).runs[0].heads["rcnn"].stats[name] for name in alone
    }
    assert list(alone) == ["AP", "AP50", "AP75"]


def test_each_head_detects_by_itself(run: Path) -> None:
    """The decoder as `detect` does; a branch on the scene of the batch.
    Pictures of 64x64 are seen at another size.
    """
    with open_split(run, HERE, EvalOptions(workers=0, batch_size=2)) as opened:
        model, co = load_with_scheme(opened, Collaborative)
        batch = next(iter(opened.loader))
        found = detections(model, co, batch)
        expected = model.detector.detect(batch.images, batch.sizes)
        with torch.no_grad():
            step = begin(model, batch, model.detector.encode(batch.images))
            alone = co.branches[0].predict(co.scene(step))  # type: ignore[operator]
    assert list(found) == ["decoder", "atss", "rcnn", "atss2"]
    for own, other in zip(found["decoder"], expected, strict=True):
        torch.testing.assert_close(own.scores, other.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(own.boxes, other.boxes, atol=1e-2, rtol=0)
    for own, raw, size, seen in zip(found["atss"], alone, batch.sizes, step.sizes, strict=True):
        assert (size != seen).any()
        ratio = (size / seen).flip(-1).repeat(2)
        torch.testing.assert_close(own.boxes, raw.boxes * ratio)
        assert own.boxes.amax() <= float(size.amax()) + 1e-3
        assert torch.equal(own.scores, raw.scores)
    assert not torch.equal(found["atss"][0].scores, found["atss2"][0].scores)


def test_the_whole_analysis(run: Path, shapes: Path, tmp_path: Path) -> None:
    plain = untrained(tmp_path / "single", shapes, small_recipe("tiny").with_schemes("co=atss"))
    result = analyze(compared([run, plain], names=["first $x", "[bold]"]))
    assert [list(r.heads) for r in result.runs] == [
        ["decoder", "atss", "rcnn", "atss2"],
        ["decoder", "atss"],
    ]
    assert result.heads == ["decoder", "atss", "rcnn", "atss2"]
    assert [head.images for head in result.runs[0].heads.values()] == [5] * 4
    assert all(head.detections > 0 for head in result.runs[0].heads.values())
    files = save(result, tmp_path / "new" / "folder")
    written = json.loads(files.values.read_text())
    assert written == result.to_dict()
    assert written["measurement"] == "branches"
    assert written["runs"][1]["heads"]["atss"].keys() >= {"AP", "AP50", "AP75"}
    assert written["runs"][0]["boxes"] > 0
    assert files.figure.stat().st_size > 10_000
    assert result.table().row_count == 4 + 2


def test_heads_without_an_ap_are_drawn() -> None:
    nothing = without_boxes("AP", "AP50", "AP75")
    run = RunBranches("x", "x", "x", {"decoder": nothing, "fcos": nothing})
    draw(BranchesResult((run,) * 9, "val")).draw_without_rendering()


def test_what_cannot_be_measured_is_said(run: Path, shapes: Path, tmp_path: Path) -> None:
    plain = untrained(tmp_path / "plain", shapes, small_recipe("tiny"))
    for wrong, message in (
        (plain, "plain: trained without scheme co"),
        (run / "last.safetensors", "Give the folder"),
    ):
        with pytest.raises(UserError) as error:
            analyze(compared([run, wrong]))
        assert message in " ".join(str(error.value).split())
    other = untrained(tmp_path / "other", shapes, small_recipe("tiny").with_schemes("co=atss"))
    (other / "last.state.pt").write_bytes((run / "last.state.pt").read_bytes())
    with pytest.raises(UserError, match="does not fit the run's recipe"):
        analyze(compared(other))
    (other / "last.state.pt").unlink()
    with pytest.raises(UserError, match=r"no last.state.pt, which alone holds the branches"):
        analyze(compared(other))
