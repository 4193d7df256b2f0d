"""Weights of one detector in another:
what is copied, what is told, and a run that starts from another run.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

import detrellis
from detrellis.data.classes import ClassMap
from detrellis.detector import Detector
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import load_weights
from detrellis.engine.outcome import TrainResult
from detrellis.engine.train import TrainRun
from detrellis.engine.transfer import InitialWeights, rows_by_name, transfer
from detrellis.engine.transfer_report import ClassRows, TransferReport
from detrellis.errors import UserError
from detrellis.recipes import build_backbone, find_recipe
from detrellis.recipes.build import build
from detrellis.terminal import Terminal

from ..small import SMALL, small
from .test_resume import assert_same_run, stop_at

OLD = ("disc", "square", "triangle", "star", "ring")
NEW = (" Star", "circle", "DISC", "hexagon")  # two of the old ones at other places
CLASS_HEADS = ("decoder.heads.classes.0.weight", "decoder.heads.classes.0.bias")
PROPOSAL_HEADS = ("queries.head.classify.weight", "queries.head.classify.bias")


def classes(*names: str) -> ClassMap:
    return ClassMap(tuple(range(len(names))), names)


def detector(
    recipe: str = "tiny", names: Sequence[str] = OLD, *settings: str, seed: int = 0
) -> Detector:
    small = find_recipe(recipe).untrained().override([*SMALL, *settings])
    return build(small, len(names), seed=seed).detector


def weights(model: Detector) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def printed(report: TransferReport) -> str:
    file = io.StringIO()
    Terminal(file=file, force_terminal=False).print(report.table())
    return file.getvalue()


def source(
    recipe: str = "tiny", names: Sequence[str] = OLD, *settings: str, objectness: bool = False
) -> InitialWeights:
    """Weights in which no number is a fresh detector's by chance:
    those that start at a constant are drawn too.
    """
    found = weights(detector(recipe, names, *settings, seed=1))
    generator = torch.Generator().manual_seed(1)
    drawn = {
        n: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for n, t in found.items()
    }
    return InitialWeights(drawn, classes(*names), objectness)


def test_the_same_network_and_classes_are_copied_whole() -> None:
    model, start = detector(), source()
    report = transfer(model, classes(*OLD), start)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start.weights[name]), name
    assert report.classes.same
    assert not report.exceptions()
    assert printed(report).splitlines()[-1] == "class rows: the same 5 classes, all kept"


def test_class_rows_go_by_name_wherever_they_are() -> None:
    model, start = detector(names=NEW), source()
    before = weights(model)
    report = transfer(model, classes(*NEW), start)
    after = model.state_dict()
    for name in (*CLASS_HEADS, *PROPOSAL_HEADS):
        old = start.weights[name]
        assert torch.equal(
            after[name], torch.stack([old[3], before[name][1], old[0], before[name][3]])
        ), name
    others = after.keys() - {*CLASS_HEADS, *PROPOSAL_HEADS}
    assert all(torch.equal(after[n], start.weights[n]) for n in others)
    assert report.classes == ClassRows(
        False, (" Star", "DISC"), ("circle", "hexagon"), ("square", "triangle", "ring")
    )
    heads = [f for f in report.fates if f.part == "class heads"]
    assert {(f.outcome, f.loaded, f.fresh) for f in heads} == {
        ("in part", 128, 128),
        ("in part", 2, 2),
    }


def test_as_many_classes_of_other_names_are_not_copied_whole() -> None:
    names = ("ring", "disc", "a", "b", "c")
    model, start = detector(names=names), source()
    fresh = model.state_dict()["decoder.heads.classes.0.weight"][2:].clone()
    transfer(model, classes(*names), start)
    after = model.state_dict()["decoder.heads.classes.0.weight"]
    old = start.weights["decoder.heads.classes.0.weight"]
    assert torch.equal(after, torch.cat([old[[4, 0]], fresh]))


@pytest.mark.parametrize("name", ["N/A", "n/a 12", "class 3", "Class_3", "category 1", ""])
def test_made_up_names_agree_only_in_the_same_list(name: str) -> None:
    assert rows_by_name(classes("cat", name), classes(name, "cat")) == ((0, 1),)
    assert rows_by_name(classes(name, "dog"), classes(name, "dog")) == ((0, 0), (1, 1))


def test_digits_are_names() -> None:
    assert rows_by_name(classes("3", "7"), classes("7", "8", "9")) == ((1, 0),)


def test_names_of_objects365_that_mean_classes_of_coco() -> None:
    theirs = classes(
        "Wild Bird", "tissue ", "Dinning Table", "Bear", "Stuffed Toy", "Wine Glass", "Other Balls"
    )
    ours = classes(
        "bird", "dining table", "bear", "teddy bear", "wine glass", "sports ball", "skis", "tissue"
    )
    assert rows_by_name(ours, theirs) == ((0, 0), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (7, 1))
    assert rows_by_name(theirs, classes("bird", "Wild bird", "wine_glass")) == ((0, 1), (5, 2))


def test_no_object_is_copied_whatever_the_classes() -> None:
    model, start = detector("detr-r50", NEW), source("detr-r50")
    before = weights(model)
    transfer(model, classes(*NEW), start)
    for name in CLASS_HEADS:
        old, fresh = start.weights[name], before[name]
        assert torch.equal(
            model.state_dict()[name], torch.stack([old[3], fresh[1], old[0], fresh[3], old[5]])
        ), name


def test_a_sigmoid_detector_leaves_no_object_behind_and_cannot_give_it() -> None:
    model, start = detector("conditional-detr-r50"), source("detr-r50")
    transfer(model, classes(*OLD), start)
    assert torch.equal(model.state_dict()[CLASS_HEADS[0]], start.weights[CLASS_HEADS[0]][:5])
    model, start = detector("detr-r50"), source("conditional-detr-r50")
    fresh = model.state_dict()[CLASS_HEADS[0]][5].clone()
    report = transfer(model, classes(*OLD), start)
    assert torch.equal(
        model.state_dict()[CLASS_HEADS[0]], torch.cat([start.weights[CLASS_HEADS[0]], fresh[None]])
    )
    assert 'no row for "no object" in the weights' in printed(report)


def test_objectness_stays_in_row_0_and_goes_nowhere_else() -> None:
    """Old class 0 is new class 2, and old class 3 is new class 0:
    neither may disturb, or take, row 0.
    """
    recipe = "deformable-detr-r50-two-stage"
    model, start = detector(recipe, NEW), source(recipe, objectness=True)
    before = weights(model)
    transfer(model, classes(*NEW), start, objectness=True)
    for name in PROPOSAL_HEADS:
        assert torch.equal(
            model.state_dict()[name], torch.cat([start.weights[name][:1], before[name][1:]])
        ), name
    for name in CLASS_HEADS:  # the decoder's heads know no objectness
        assert torch.equal(model.state_dict()[name][[0, 2]], start.weights[name][[3, 0]]), name


def test_objectness_is_no_class_and_no_class_is_objectness() -> None:
    recipe = "deformable-detr-r50-two-stage"
    for here in (True, False):
        model = detector(recipe)
        before = weights(model)
        report = transfer(
            model, classes(*OLD), source(recipe, objectness=not here), objectness=here
        )
        assert all(torch.equal(model.state_dict()[n], before[n]) for n in PROPOSAL_HEADS)
        assert [(e.place, e.outcome) for e in report.exceptions()] == [
            ("queries.head.classify", "re-initialised")
        ]


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("dino-r50", ["content"]),
        ("deformable-detr-r50", ["content", "position"]),
        ("dab-deformable-detr-r50", ["content", "centres", "sizes"]),
    ],
)
@pytest.mark.parametrize("count", [5, 20])
def test_the_first_queries_are_kept(recipe: str, names: list[str], count: int) -> None:
    # Of 12 queries
    model, start = detector(recipe, OLD, f"detector.queries.count={count}"), source(recipe)
    before = weights(model)
    report = transfer(model, classes(*OLD), start)
    for name in (f"queries.{n}" for n in names):
        expected = torch.cat([start.weights[name][:count], before[name][12:]])
        assert torch.equal(model.state_dict()[name], expected), name
    why = "the first 5 of 12 rows" if count == 5 else "8 rows are new"
    assert {e.reason for e in report.exceptions()} == {why}
    assert all(f.loaded + f.fresh == model.state_dict()[f.name].numel() for f in report.fates)


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("detector.width=96", "the encoder"),
        ("detector.backbone.name=resnet50", "the backbone"),
        ("detector.backbone.strides=[8,16,32]", "the backbone"),
    ],
)
def test_another_network_is_refused_before_anything_is_copied(setting: str, part: str) -> None:
    model = detector("tiny", OLD, setting)
    before = weights(model)
    with pytest.raises(UserError, match=f"of {part} fits") as error:
        transfer(model, classes(*OLD), source())
    assert (
        f"The recipe: width {96 if 'width' in setting else 64}, 1 encoder layer, 2 decoder"
        in error.value.message
    )
    assert (
        "The weights: width 64, 1 encoder layer, 2 decoder layers, a backbone of 106.4k"
        in error.value.message
    )
    assert "leave RECIPE out" in error.value.remedy
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_counters_of_batchnorm_are_worth_no_word() -> None:
    frozen, batch = ("detector.backbone.norm=frozen",), ("detector.backbone.norm=batch",)
    for here, there in ((frozen, batch), (batch, frozen)):
        report = transfer(detector("tiny", OLD, *here), classes(*OLD), source("tiny", OLD, *there))
        assert not report.exceptions()
        assert {f.outcome for f in report.fates} == {"loaded"}


def test_the_report_puts_layers_and_modules_together() -> None:
    settings = [
        "decoder.layers=4",
        "encoder.layers=2",
        "encoder.hidden=128",
        "decoder.hidden=128",
        "queries.count=20",
    ]
    learned = "detector.queries.content_from=learned"
    model = detector("tiny", NEW, learned, *(f"detector.{s}" for s in settings))
    report = transfer(model, classes(*NEW), source("tiny", OLD, learned))
    assert [(e.place, e.tensors, e.outcome, e.reason) for e in report.exceptions()] == [
        (
            "encoder.layers.0.feed_forward.inner",
            2,
            "re-initialised",
            "another shape: 128x64, was 64x64",
        ),
        (
            "encoder.layers.0.feed_forward.outer.weight",
            1,
            "re-initialised",
            "another shape: 64x128, was 64x64",
        ),
        ("encoder.layers.1", 16, "re-initialised", "not in the weights"),
        ("queries.content", 1, "in part", "8 rows are new"),
        (
            "decoder.layers.0-1.feed_forward.inner",
            4,
            "re-initialised",
            "another shape: 128x64, was 64x64",
        ),
        (
            "decoder.layers.0-1.feed_forward.outer.weight",
            2,
            "re-initialised",
            "another shape: 64x128, was 64x64",
        ),
        ("decoder.layers.2-3", 44, "re-initialised", "not in the weights"),
    ]
    parts = report.parts()
    assert parts["neck"]["loaded"][0] == sum(n.startswith("neck.") for n in model.state_dict())
    assert sum(n for counts in parts.values() for n, _ in counts.values()) == len(
        model.state_dict()
    )
    assert parts["decoder"]["re-initialised"][0] == 50
    assert parts["queries"]["in part"] == (1, 12 * 64)
    assert report.to_dict() == json.loads(json.dumps(report.to_dict()))


def test_what_only_the_weights_have_is_told() -> None:
    report = transfer(detector("tiny", OLD, "detector.decoder.layers=1"), classes(*OLD), source())
    assert [(e.place, e.outcome, e.reason) for e in report.exceptions()] == [
        ("decoder.layers.1", "skipped", "not in this detector")
    ]


def test_the_report_fits_a_narrow_console_and_takes_names_literally() -> None:
    names = ("disc", "[bold]", *(f"kind {i}" for i in range(300)))
    report = transfer(detector("dab-detr-r50", names), classes(*names), source("dino-r50"))
    file = io.StringIO()
    Console(file=file, width=80).print(report.table("runs/[first]/best.safetensors"))
    lines = file.getvalue().splitlines()
    assert lines[0] == "Start from runs/[first]/best.safetensors"
    assert max(map(len, lines)) <= 80
    assert len(lines) < 64
    assert "class rows kept by name: disc (1 of 302); new: [bold], kind 0" in file.getvalue()
    assert " more" in lines[-1] or " more" in lines[-2]


# Runs
# ----------------------------------------------------------------------------------------------------------------

SETTINGS = [
    *SMALL,
    "detector.queries.content_from=learned",  # a row for each query
    "data.size=[64, 64]",
    "optim.batch_size=4",
    "detector.dropout=0.1",
]


@pytest.fixture(scope="module")
def first(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on five classes."""
    out = tmp_path_factory.mktemp("first") / "run"
    detrellis.train("tiny", data=shapes, out=out, override=SETTINGS, epochs=1, workers=0)
    return out


@pytest.fixture(scope="module")
def other(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures; "triangle" (id 4) is gone,
    "square" has another name, and "star" comes first.
    """
    out = tmp_path_factory.mktemp("other") / "data"
    shutil.copytree(shapes, out)
    for path in (out / "annotations").glob("*.json"):
        content = json.loads(path.read_text())
        names, ids = {3: "tile", 7: "Star"}, {7: 0}
        kept = [c for c in content["categories"] if c["id"] != 4]
        content["categories"] = [
            {**c, "id": ids.get(c["id"], c["id"]), "name": names.get(c["id"], c["name"])}
            for c in kept
        ]
        boxes = [a for a in content["annotations"] if a["category_id"] != 4]
        content["annotations"] = [
            {**a, "category_id": ids.get(a["category_id"], a["category_id"])} for a in boxes
        ]
        path.write_text(json.dumps(content))
    return out


def tune(
    start: Path, data: Path, out: Path, epochs: int = 1, console: Console | None = None
) -> TrainResult:
    return detrellis.train(
        weights=start, data=data, out=out, epochs=epochs, workers=0, console=console
    )


def test_a_run_on_the_same_classes_starts_with_exactly_these_weights(
    first: Path, shapes: Path, tmp_path: Path, started: list[dict[str, Tensor]]
) -> None:
    tune(first, shapes, tmp_path / "run")
    expected, card = load_weights(first)
    for found in started:
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in expected)
    tuned = load_weights(tmp_path / "run")[1]
    assert tuned.recipe == card.recipe
    assert tuned.weights == str(first)


def test_a_run_on_other_classes_keeps_what_they_share(
    first: Path, other: Path, tmp_path: Path, started: list[dict[str, Tensor]]
) -> None:
    file = io.StringIO()
    result = tune(first, other, tmp_path / "run", console=Console(file=file, width=100))
    expected, card = load_weights(first)
    assert card.classes.names == OLD
    for found in started:
        heads = [n for n in found if n in (*CLASS_HEADS, *PROPOSAL_HEADS)]
        assert len(heads) == 4
        assert all(torch.equal(found[n], expected[n]) for n in found.keys() - set(heads))
        for name in heads:  # Star, disc, tile, ring
            assert torch.equal(found[name][[0, 1, 3]], expected[name][[3, 0, 4]]), name
        assert not any(
            torch.equal(found[CLASS_HEADS[0]][2], row) for row in expected[CLASS_HEADS[0]]
        )
    assert file.getvalue().count("Start from") == 1
    assert (
        "class rows kept by name: Star, disc, ring (3 of 4); new: tile; not needed: square"
        in file.getvalue()
    )
    assert result.transfer is not None
    assert result.to_dict()["transfer"]["classes"]["new"] == ["tile"]
    assert detrellis.load(tmp_path / "run").classes.names == ("Star", "disc", "tile", "ring")


def test_a_recipe_and_its_settings_apply_beside_the_weights(
    first: Path, shapes: Path, tmp_path: Path
) -> None:
    more = [*SETTINGS, "detector.queries.count=20"]
    result = detrellis.train(
        "tiny",
        weights=first,
        data=shapes,
        out=tmp_path,
        override=more,
        scheme="none",
        epochs=1,
        workers=0,
    )
    assert result.transfer is not None
    assert [e.place for e in result.transfer.exceptions()] == ["queries.content"]
    recipe = load_weights(tmp_path)[1].recipe
    assert (recipe.schemes.cdn, recipe.detector.queries.count) == (None, 20)
    with pytest.raises(UserError, match="another network"):
        detrellis.train(weights=first, data=shapes, out=tmp_path / "b", scale="tiny", workers=0)
    with pytest.raises(UserError, match="which recipe"):
        detrellis.train(data=shapes)


def test_one_group_starts_many_and_many_leave_one(
    first: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Group DETR, 1 -> K -> 1: further proposal heads begin as the trained one,
    and no weights file holds them.
    """
    heads: list[dict[str, Tensor]] = []
    train_step = TrainRun.train_step

    def step(self: TrainRun, batches: list) -> None:  # type: ignore[type-arg]
        group = self.state.model.training_schemes[-1]
        if not heads:
            heads.extend(weights(h) for h in group.heads)  # type: ignore[arg-type, union-attr]
        train_step(self, batches)

    monkeypatch.setattr(TrainRun, "train_step", step)
    many = tmp_path / "many"
    detrellis.train(weights=first, data=shapes, out=many, scheme="group=3", epochs=1, workers=0)
    one, _ = load_weights(first)
    assert len(heads) == 2
    for head in heads:
        assert head.keys() == {
            n.removeprefix("queries.head.") for n in one if n.startswith("queries.head.")
        }
        assert all(torch.equal(t, one[f"queries.head.{n}"]) for n, t in head.items())
    again, _ = load_weights(many)
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in one.items()}
    monkeypatch.undo()
    back = detrellis.train(
        weights=many, data=shapes, out=tmp_path / "one", scheme="none", epochs=1, workers=0
    )
    assert back.transfer is not None
    assert back.transfer.exceptions() == []


def test_a_tuned_run_that_was_stopped_continues_bit_for_bit_without_its_source(
    first: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "first"
    shutil.copytree(first, copy)
    assert tune(copy, other, tmp_path / "whole", epochs=2).finished
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert tune(copy, other, tmp_path / "run", epochs=2).steps == 4
    shutil.rmtree(copy)
    torch.manual_seed(12345)
    file = io.StringIO()
    resumed = detrellis.resume(tmp_path / "run", workers=0, console=Console(file=file))
    assert resumed.finished
    assert resumed.transfer is None
    assert "Start from" not in file.getvalue()
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert load_weights(tmp_path / "run")[1].weights == str(copy)


def test_no_pretrained_weights_are_fetched_only_to_be_replaced(
    first: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("pretrained weights were fetched")

    monkeypatch.setattr(build_backbone, "find_source", fetch)
    pretrained = [*SETTINGS, "detector.backbone.pretrained=true"]
    options = {"data": shapes, "override": pretrained, "epochs": 2, "workers": 0}
    with pytest.raises(AssertionError, match="fetched"):
        detrellis.train("tiny", out=tmp_path / "plain", **options)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        detrellis.train("tiny", weights=first, out=tmp_path / "run", **options)  # type: ignore[arg-type]
    assert detrellis.resume(tmp_path / "run", workers=0).finished


def test_cards_without_an_origin_are_read(first: Path) -> None:
    metadata = load_weights(first)[1].to_metadata()
    content = json.loads(metadata["detrellis"])
    del content["weights"]
    assert Card.from_metadata({**metadata, "detrellis": json.dumps(content)}, first).weights is None


@pytest.mark.parametrize("name", ["rtdetr_r18", "lwdetr_tiny"])
def test_a_neck_in_an_encoders_place_is_no_other_network(name: str) -> None:
    """A hybrid encoder and a projector have no encoder behind them, of which nothing could fit."""
    given = small(name)
    old, new = (build(given, len(names), seed=i).detector for i, names in enumerate((OLD, NEW)))
    report = transfer(new, classes(*NEW), InitialWeights(weights(old), classes(*OLD)))
    assert not [fate for fate in report.fates if fate.part == "encoder"]
    assert torch.equal(
        new.state_dict()["decoder.heads.boxes.0.layers.0.weight"],
        weights(old)["decoder.heads.boxes.0.layers.0.weight"],
    )
