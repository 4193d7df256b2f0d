"""Activation maps on cases made by hand and against automatic gradients,
and the whole analysis on small runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from detrellis.analysis.activation_maps import (
    Cam,
    activation_map,
    activations,
    branch_score,
    grad_cam,
)
from detrellis.analysis.conflicts import RunConflicts, analyze, conflict_matrix
from detrellis.analysis.measurements import save
from detrellis.analysis.schemes import load_with_scheme
from detrellis.distributed import World
from detrellis.engine.evaluate import EvalOptions
from detrellis.errors import UserError
from detrellis.loading import open_split
from detrellis.schemes.collaborative.scene import BranchAssignment, Scene
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.types import Memory, Targets

from .runs import compared, small_recipe, untrained

HERE = World(0, 1, torch.device("cpu"))


def memory(tokens: torch.Tensor, padding: torch.Tensor | None = None) -> Memory:
    """Levels of 2x2 and of 1x1 cells."""
    return Memory(tokens, tokens, ((2, 2), (1, 1)), padding)


def test_levels_are_weighted_by_their_own_mean_gradient_without_padding() -> None:
    tokens = torch.tensor([[[1.0, 0], [0, 1], [1, 1], [5, 5], [2, -1]]])
    gradient = torch.tensor([[[1.0, -1], [3, 1], [5, 0], [9, 99], [-1, -3]]])
    padded = torch.tensor([[False, False, False, True, False]])
    assert grad_cam(memory(tokens, padded), gradient)[0, [0, 1, 2, 4]].tolist() == [3, 0, 3, 1]
    whole = grad_cam(memory(tokens), gradient)
    assert whole.tolist() == [[4.5, 24.75, 29.25, 146.25, 1]]
    assert grad_cam(memory(tokens), gradient, "hirescam").tolist() == [[1, 1, 5, 540, 1]]


def test_maps_are_means_of_the_levels_without_padding() -> None:
    tokens = torch.tensor([0.0, 1, 2, 3, 8])
    found = activation_map(tokens, memory(torch.zeros(1, 5, 1)), 0)
    torch.testing.assert_close(found, torch.tensor([[8.0, 9], [10, 11]], dtype=torch.float64) / 11)
    right = torch.tensor([[False, True, False, True, False]])
    found = activation_map(tokens, memory(torch.zeros(1, 5, 1), right), 0)
    torch.testing.assert_close(found, torch.tensor([[0.8], [1.0]], dtype=torch.float64))
    assert activation_map(tokens * 0, memory(torch.zeros(1, 5, 1)), 0).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("softmax", [False, True])
def test_a_branch_is_scored_by_its_positives(softmax: bool) -> None:
    logits = torch.tensor([[0.0, 1, 2], [3, 0, 0], [0, 0, 0]])
    boxes = torch.zeros(3, 4)
    owner = torch.tensor([[1, -1, 0], [-1, -2, -1]])
    both = boxes.expand(2, -1, -1)
    found = BranchAssignment(both, owner, both, logits.expand(2, -1, -1))
    labels = (torch.tensor([0, 2]), torch.tensor([], dtype=torch.int64))
    scene = Scene((), (), torch.ones(2, 2), labels, (boxes[:2], boxes[:0]))
    shares = logits.softmax(-1) if softmax else logits.sigmoid()
    torch.testing.assert_close(branch_score(found, scene, softmax), shares[0, 2] + shares[2, 0])


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("conflicts") / "first"
    return untrained(place, shapes, small_recipe("tiny").with_schemes("co=atss+rcnn"))


@pytest.mark.parametrize("cam", ["gradcam", "hirescam"])
def test_an_image_has_the_maps_that_it_has_alone(run: Path, cam: Cam) -> None:
    """So one gradient of a batch's sum is each image's own;
    also beside an image without objects.
    """
    with open_split(run, HERE, EvalOptions(workers=0, batch_size=2)) as opened:
        model, co = load_with_scheme(opened, Collaborative)
        batch = next(iter(opened.loader))
        count = batch.targets.sizes[0]
        first = Targets(batch.targets.labels[:count], batch.targets.boxes[:count], (count, 0))
        together = activations(model, co, batch, cam)[1]
        half = activations(model, co, batch._replace(targets=first), cam)[1]
    assert list(together) == ["decoder", "atss", "rcnn"]
    for head, own in together.items():
        assert own[0].any()
        torch.testing.assert_close(half[head][0], own[0], atol=1e-6, rtol=1e-3)
        assert not half[head][1].any()


def test_the_whole_analysis(run: Path, tmp_path: Path) -> None:
    runs = compared([run, run], names=["first $x", "[bold]"], batch_size=2)
    result = analyze(runs, cam="hirescam", eps=0.01)
    one, two = result.runs
    assert one.to_dict() == two.to_dict() | {"name": one.name}
    assert one.heads == ("decoder", "atss", "rcnn")
    assert one.images + one.empty + one.flat == 5
    assert [one.matrix[i][i] for i in range(3)] == [0, 0, 0]
    assert all(one.matrix[i][j] > 0 for i in range(3) for j in range(3) if i != j)
    # The decoder is no branch
    assert one.distance == pytest.approx((one.matrix[1][2] + one.matrix[2][1]) / 2)
    alone = analyze(compared(run, batch_size=1), cam="hirescam", eps=0.01).runs[0]
    assert [v for row in alone.matrix for v in row] == pytest.approx(
        [v for row in one.matrix for v in row], rel=0.02
    )
    files = save(result, tmp_path / "new" / "folder")
    written = json.loads(files.values.read_text())
    assert written == result.to_dict()
    assert written["settings"] == {"cam": "hirescam", "eps": 0.01, "split": "val"}
    assert written["runs"][0]["conflicts"].keys() == {"decoder", "atss", "rcnn"}
    assert files.figure.stat().st_size > 10_000
    assert result.table().row_count == 2 * 3


def test_one_branch_is_compared_with_the_decoder() -> None:
    cams = torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    matrix = conflict_matrix(cams)
    run = RunConflicts(
        "x", "x", "x", ("decoder", "fcos"), 4, 0, 0, tuple(map(tuple, matrix.tolist())), ()
    )
    assert run.distance == pytest.approx(float(matrix[0, 1] + matrix[1, 0]) / 2)
    assert run.conflicts == pytest.approx([run.distance] * 2)


def test_what_cannot_be_measured_is_said(run: Path, shapes: Path, tmp_path: Path) -> None:
    plain = untrained(tmp_path / "plain", shapes, small_recipe("tiny"))
    for runs, settings, message in (
        ([run, plain], {}, "trained without scheme co, so the decoder is its only head"),
        ([run], {"eps": 0.0}, "eps 0 Give a number above 0"),
        ([run], {"cam": "scorecam"}, "Known: gradcam, hirescam"),
    ):
        with pytest.raises(UserError) as error:
            analyze(compared(runs), **settings)  # type: ignore[arg-type]
        assert message in " ".join(str(error.value).split())
