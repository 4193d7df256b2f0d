"""Reference boxes that are learned, inherited or random, and frozen (SAM-DETR, Table 5)."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

import detrellis
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import load_weights, save_weights
from detrellis.engine.transfer import REFERENCE_BOXES, take_boxes
from detrellis.errors import UserError
from detrellis.recipes.build import build

from ..small import CLASSES, SMALL, images, small, targets
from ..test_cli import call
from .test_resume import assert_same_run, stop_at

FROZEN = "detector.queries.frozen_boxes=true"
SETTINGS = [
    *SMALL,
    "detector.backbone.strides=[16]",
    "data.size=[64, 64]",
    "data.augment=fixed",
    "optim.batch_size=4",
    "optim.weight_decay=0.5",
]


def train(
    data: Path, out: Path, *override: str, recipe: str = "sam-detr-r50", **more: object
) -> dict[str, Tensor]:
    """The weights after an epoch of three steps: averaged ones."""
    options = {
        "data": data,
        "out": out,
        "override": [*SETTINGS, *override],
        "epochs": 1,
        "workers": 0,
    } | more
    detrellis.train(recipe, device="cpu", **options)  # type: ignore[arg-type]
    return load_weights(out / "last.safetensors")[0]


@pytest.fixture(scope="module")
def first(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned its boxes."""
    out = tmp_path_factory.mktemp("first") / "run"
    train(shapes, out, "optim.lr=0.01", seed=5)
    return out


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if torch.equal(a[name], b[name])}


def test_learned_boxes_move(shapes: Path, tmp_path: Path, started: list[dict[str, Tensor]]) -> None:
    after = train(shapes, tmp_path / "run")
    assert not same(after, started[0]) & set(REFERENCE_BOXES)


def test_random_frozen_boxes_stay_as_drawn(
    shapes: Path, tmp_path: Path, started: list[dict[str, Tensor]]
) -> None:
    """Neither gradients, weight decay nor averaging move them,
    and learning would start with the same.
    """
    after = train(shapes, tmp_path / "run", FROZEN)
    for before in started:
        assert same(after, before) >= set(REFERENCE_BOXES)
    assert "decoder.heads.boxes.0.layers.0.weight" in after.keys() - same(after, started[0])
    drawn = build(small("sam_detr_r50").override(SETTINGS), CLASSES).detector.state_dict()
    assert all(torch.equal(drawn[name], after[name]) for name in REFERENCE_BOXES)
    assert float(after["queries.sizes"].std()) == pytest.approx(1, abs=0.4)


def test_inherited_frozen_boxes_are_another_runs_and_nothing_else_is(
    first: Path, shapes: Path, tmp_path: Path, started: list[dict[str, Tensor]]
) -> None:
    file = io.StringIO()
    after = train(
        shapes, tmp_path / "run", FROZEN, boxes=first, console=Console(file=file, width=200)
    )
    given, _ = load_weights(first)
    alone = build(small("sam_detr_r50").override(SETTINGS), CLASSES).detector.state_dict()
    for before in started:
        assert all(
            torch.equal(before[n], (given if n in REFERENCE_BOXES else alone)[n]) for n in before
        )
    assert all(torch.equal(after[n], given[n]) for n in REFERENCE_BOXES)
    assert f"Reference boxes from {first}" in file.getvalue()
    card = load_weights(tmp_path / "run")[1]
    assert (card.weights, card.boxes) == (None, str(first))


def test_inherited_boxes_may_go_on_learning_and_follow_other_weights(
    first: Path, shapes: Path, tmp_path: Path, started: list[dict[str, Tensor]]
) -> None:
    """`--weights` for all but the boxes."""
    whole = tmp_path / "whole"
    train(shapes, whole, seed=9)
    started.clear()
    after = train(shapes, tmp_path / "run", weights=whole, boxes=first)
    given, all_else = load_weights(first)[0], load_weights(whole)[0]
    assert all(
        torch.equal(t, (given if n in REFERENCE_BOXES else all_else)[n])
        for n, t in started[0].items()
    )
    assert not same(after, started[0]) & set(REFERENCE_BOXES)


def test_a_stopped_run_continues_without_the_boxes_source(
    first: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "first"
    shutil.copytree(first, copy)
    train(shapes, tmp_path / "whole", FROZEN, boxes=copy)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        train(shapes, tmp_path / "run", FROZEN, boxes=copy)
    shutil.rmtree(copy)
    assert detrellis.resume(tmp_path / "run", workers=0, device="cpu").finished
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert load_weights(tmp_path / "run")[1].boxes == str(copy)


def test_schemes_anchors_are_frozen_with_the_detectors() -> None:
    """The further groups of Group DETR are the equals of the first; each scheme still trains."""
    for schemes in (("none", "group=3"), ("none", "hybrid"), ("none", "dn")):
        model = build(small("dab_deformable_detr_r50", schemes).override([FROZEN]), CLASSES)
        boxes = {
            n: p for n, p in model.named_parameters() if n.rsplit(".")[-1] in ("centres", "sizes")
        }
        assert len(boxes) == (2 if schemes[-1] == "dn" else 4)
        assert not any(p.requires_grad for p in boxes.values())
        torch.stack(list(model(images(), targets((2, 0))).losses.values())).sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_boxes_of_another_number_or_kind_are_refused(
    first: Path, shapes: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match="12 reference boxes in the weights, 7 in this detector"
    ) as error:
        train(shapes, tmp_path / "a", "detector.queries.count=7", boxes=first)
    assert "-o detector.queries.count=12" in error.value.remedy
    with pytest.raises(UserError, match="this detector learns no reference boxes") as error:
        train(shapes, tmp_path / "b", recipe="tiny", boxes=first)
    assert "queries.kind=anchors, such as sam-detr-r50" in error.value.remedy
    other = build(small("tiny"), CLASSES).detector
    own = build(small("sam_detr_r50"), CLASSES).detector
    before = {n: t.clone() for n, t in own.state_dict().items()}
    with pytest.raises(UserError, match="these weights hold no reference boxes"):
        take_boxes(own, other.state_dict())
    with pytest.raises(UserError, match="no_such_run"):
        train(shapes, tmp_path / "c", boxes="no_such_run")
    assert len(same(own.state_dict(), before)) == len(before)
    with pytest.raises(UserError, match=r"queries\.kind=mixed has no 'frozen_boxes'"):
        small("tiny").override([FROZEN])


def test_cards_without_boxes_are_read(first: Path, tmp_path: Path) -> None:
    weights, card = load_weights(first)
    metadata = card.to_metadata()
    content = json.loads(metadata["detrellis"])
    assert content.pop("boxes") is None
    assert Card.from_metadata({**metadata, "detrellis": json.dumps(content)}, first).boxes is None
    save_weights(tmp_path / "card.safetensors", weights, card)
    assert load_weights(tmp_path / "card.safetensors")[1] == card


def test_the_command_takes_boxes(
    first: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [a for s in [*SETTINGS, FROZEN] for a in ("-o", s)]
    rest = (
        "--data",
        shapes,
        "--boxes",
        first,
        "--out",
        tmp_path / "run",
        "--workers",
        0,
        "--device",
        "cpu",
    )
    text = call("train", "sam-detr-r50", *rest, "--epochs", 1, *options, capsys=capsys)
    assert f"Reference boxes from {first}" in text.replace("\n", "")
    given, after = load_weights(first)[0], load_weights(tmp_path / "run")[0]
    assert all(torch.equal(after[n], given[n]) for n in REFERENCE_BOXES)
    text = call("train", "--resume", tmp_path / "run", "--boxes", first, capsys=capsys, code=2)
    assert "--resume takes recipe" in " ".join(text.split())
