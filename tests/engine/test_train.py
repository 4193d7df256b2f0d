"""The loop when things go wrong, and what it writes when they do not."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import detrellis
from detrellis import precision
from detrellis.data.batch import Batch
from detrellis.engine import train
from detrellis.engine.batches import padded_fraction
from detrellis.engine.checkpoint import load_state, load_weights
from detrellis.engine.eval_result import EvalResult
from detrellis.engine.evaluate import duplicates_line
from detrellis.engine.guard import NonFiniteLoss
from detrellis.engine.log import read_records
from detrellis.engine.optim import set_learning_rate
from detrellis.engine.state import advise_on_frozen
from detrellis.errors import Advice
from detrellis.recipes import choose_recipe, find_recipe
from detrellis.recipes.build import build
from detrellis.schemes.federated import Federated
from detrellis.schemes.rank import Rank
from detrellis.schemes.sqr import SQR
from detrellis.training import StepOutput, TrainableDetector
from detrellis.types import Detections

from ..small import SMALL, images, targets
from ..waits import as_on_a_gpu, counted_waits

SETTINGS = [*SMALL, "data.size=[64, 64]", "optim.batch_size=4"]


def test_a_loss_that_is_not_finite_names_term_step_and_images(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        train, "set_learning_rate", lambda optimizer, _: set_learning_rate(optimizer, 1e30)
    )
    wild = [*SETTINGS, "optim.clip=0", "optim.ema=0"]
    with pytest.raises(NonFiniteLoss) as error:
        detrellis.train(
            "tiny", data=shapes, out=tmp_path / "run", override=wild, epochs=2, workers=0
        )
    message = str(error.value)
    assert "step 2" in message
    assert "main/" in message
    saved = torch.load(tmp_path / "run" / "bad_batch-0.pt", weights_only=True)
    assert all(str(i) in message for i in saved["image_ids"])
    assert len(saved["image_ids"]) == 4


@pytest.mark.parametrize("wanted", [True, False])
def test_trains_in_bfloat16_where_the_device_has_it(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wanted: bool,
) -> None:
    seen: set[bool] = set()
    forward = TrainableDetector.forward

    def watched(self: TrainableDetector, *args: Any) -> StepOutput:
        seen.add(torch.is_autocast_enabled("cpu"))
        return forward(self, *args)

    for module in (train, precision):
        monkeypatch.setattr(module, "has_bfloat16", lambda _: True)
    monkeypatch.setattr(TrainableDetector, "forward", watched)
    settings = [*SETTINGS, f"optim.amp={str(wanted).lower()}"]
    result = detrellis.train(
        "tiny", data=shapes, out=tmp_path / "run", override=settings, epochs=1, workers=0
    )
    assert result.finished
    assert seen == {wanted}
    assert ("Products in bfloat16" in capsys.readouterr().out) == wanted


def test_every_epoch_is_recorded_with_the_time_of_its_parts(shapes: Path, tmp_path: Path) -> None:
    result = detrellis.train(
        "tiny",
        data=shapes,
        out=tmp_path,
        override=[*SETTINGS, "schedule.eval_every=2"],
        epochs=3,
        workers=0,
    )
    epochs = [r for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "epoch"]
    assert [r["epoch"] for r in epochs] == [1, 2, 3]
    assert [r["eval"] is not None for r in epochs] == [False, True, True]
    for record in epochs:
        assert {"data", "forward", "backward", "optimizer"} <= set(record["seconds"])
        assert {"main/class/0", "main/giou/1", "cdn/box/0", "proposals/class/0"} <= set(
            record["losses"]
        )
        assert "main/iou" in record["metrics"]
        assert record["loss"] == pytest.approx(sum(record["losses"].values()), rel=1e-4)
    assert result.finished
    assert result.best == max(r["eval"]["AP"] for r in epochs[1:])


def test_the_last_epoch_is_measured_without_duplicates_too(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked, told = [], []

    def first(found: Detections, threshold: float, k: int) -> Detections:
        asked.append((len(found.scores), threshold, k))
        return found.take(torch.arange(min(1, len(found.scores))))

    def line(result: EvalResult, apart: EvalResult, *_: object) -> str:
        told.append((result.detections, apart.detections))
        return "found twice"

    monkeypatch.setattr("detrellis.postprocess.hard_nms", first)
    monkeypatch.setattr("detrellis.engine.train.duplicates_line", line)
    result = detrellis.train(
        "tiny", data=shapes, out=tmp_path, override=SETTINGS, epochs=2, workers=0
    )
    assert asked == [(12 * 5, 0.7, 20)] * 5  # all pairs of the five images, once
    assert told == [(5 * 20, 5)]
    assert capsys.readouterr().out.count("found twice") == 1
    before, last = (r for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "epoch")
    assert before["after_nms"] is None
    assert set(last["after_nms"]) == set(last["eval"])
    assert result.result is not None
    assert result.result.detections == 5 * 20


@pytest.mark.parametrize(
    ("plain", "apart", "tells"), [(0.357, 0.46, True), (0.45, 0.455, False), (None, None, False)]
)
def test_what_duplicates_cost_is_told(
    plain: float | None, apart: float | None, tells: bool
) -> None:
    counts = {"images": 1, "images_in_set": 1, "ground_truth": 1, "detections": 1}
    line = duplicates_line(
        *(EvalResult(stats={"AP": ap}, per_class=(), **counts) for ap in (plain, apart)),
        find_recipe("tiny"),
        set(),
    )
    assert (line is not None) == tells
    assert line is None or "from 0.357 to 0.460" in line


@pytest.mark.parametrize(
    ("recipe", "scheme", "dials"),
    [
        ("dino-r50", "", ["queries", "decoder"]),
        ("dino-r50", "group,hybrid", ["queries", "decoder"]),  # of which advice was given before
        ("dino-r50", "sqr", ["queries"]),  # it hands on queries from layer to layer itself
        ("tiny", "", []),  # has both
        ("small", "", []),
        ("detr-r50", "", []),  # softmax, and no proposals
        ("deformable-detr-r50", "", []),  # its layers do not move boxes
        ("dn-deformable-detr-r50", "", ["decoder"]),  # no proposals
        ("ddq-dino-r50", "", []),
    ],
)
def test_advice_on_duplicates_names_what_the_recipe_can_take(
    recipe: str, scheme: str, dials: list[str]
) -> None:
    counts = {"images": 1, "images_in_set": 1, "ground_truth": 1, "detections": 1}
    plain, apart = (EvalResult(stats={"AP": ap}, per_class=(), **counts) for ap in (0.3, 0.4))
    with warnings.catch_warnings(action="error"):
        chosen = choose_recipe(recipe, scheme=scheme or ())
        needed = SQR.requires if scheme == "sqr" else set()
        line = duplicates_line(plain, apart, chosen, needed)
    assert line is not None
    assert re.findall(r"-o detector\.(\w+)\.distinct=0\.7", line) == dials


def test_training_without_a_validation_split(shapes: Path, tmp_path: Path) -> None:
    result = detrellis.train(
        "tiny",
        train=shapes / "annotations" / "instances_train.json",
        train_images=shapes / "images" / "train",
        out=tmp_path,
        override=SETTINGS,
        epochs=1,
        workers=0,
    )
    assert result.result is None
    assert not (tmp_path / "best.safetensors").exists()
    assert len(detrellis.load(tmp_path).classes) == 5


def test_a_frozen_backbone_is_left_as_it_was(shapes: Path, tmp_path: Path) -> None:
    """Its weights, its statistics and its average, and the optimizer keeps nothing of it;
    the rest learns.
    """
    settings = [*SETTINGS, "detector.backbone.frozen=all"]
    with pytest.warns(Advice, match="what is random stays random"):
        detrellis.train("tiny", data=shapes, out=tmp_path, override=settings, epochs=1, workers=0)
    weights, card = load_weights(tmp_path / "last.safetensors")
    before = build(card.recipe, 5).detector.state_dict()
    state = load_state(tmp_path)
    trained = {name.removeprefix("detector."): value for name, value in state["model"].items()}
    for found in (weights, trained):
        moved = {name for name, value in before.items() if not torch.equal(found[name], value)}
        assert moved
        assert not any(name.startswith("backbone.") for name in moved)
    parameters = [
        p
        for n, p in build(card.recipe, 5).named_parameters()
        if not n.startswith("detector.backbone.")
    ]
    assert len(state["optimizer"]["state"]) == len(parameters)


def test_a_factor_of_nothing_is_pointed_to_freezing() -> None:
    recipe = find_recipe("tiny")
    with pytest.warns(Advice, match=r"detector\.backbone\.frozen=all"):
        advise_on_frozen(recipe.override("optim.scaled={backbone: 0}"), random=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advise_on_frozen(recipe, random=True)
        advise_on_frozen(recipe.override("detector.backbone.frozen=2"), random=False)


def test_a_few_images_can_be_learnt_by_heart(shapes: Path, tmp_path: Path) -> None:
    """The whole chain learns: in 40 steps the loss on eleven pictures falls by a quarter or
    more.
    """
    settings = [
        *SETTINGS,
        "optim.lr=1e-3",
        "data.augment=none",
        "schedule.eval_every=1000",
        "optim.batch_size=3",
    ]
    detrellis.train("tiny", data=shapes, out=tmp_path, override=settings, epochs=10, workers=0)
    losses = [r["loss"] for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "epoch"]
    assert losses[-1] < 0.75 * losses[0]


def test_the_optimizer_steps_are_the_recipes_batches(shapes: Path, tmp_path: Path) -> None:
    """Accumulating halves gives the step of the whole batch, but for the normaliser:
    boxes are counted by pass.
    """
    assert find_recipe("tiny").optim.accumulate == 1
    plain, halves = (
        detrellis.train(
            "tiny",
            data=shapes,
            out=tmp_path / str(n),
            override=[*SETTINGS, f"optim.accumulate={n}"],
            epochs=1,
            workers=0,
        )
        for n in (1, 2)
    )
    assert plain.steps == halves.steps == 3


def test_the_share_of_padding_is_recorded() -> None:
    batch = Batch(
        images(((64, 96), (32, 48))), targets((1, 1)), (1, 2), torch.tensor([[64, 96], [32, 48]])
    )
    assert float(padded_fraction(batch)) == pytest.approx(0.75 / 2)
    even = batch._replace(images=images(((64, 96), (64, 96))))
    assert float(padded_fraction(even)) == 0


def test_schemes_are_told_the_classes_and_how_far_the_run_is(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a threshold of 1, too,
    which shows images of every class but the most frequent ones more often.
    """
    images: list[list[int]] = []
    done: list[float] = []
    monkeypatch.setattr(
        Federated, "count_classes", lambda _, counts: images.append(counts.tolist())
    )
    monkeypatch.setattr(Rank, "progress", lambda _, part: done.append(part))
    settings = [*SETTINGS, "data.repeat_threshold=1"]
    schemes = ["rank", "federated"]
    run = detrellis.train(
        "tiny", data=shapes, scheme=schemes, out=tmp_path, override=settings, epochs=2, workers=0
    )
    source = json.loads((shapes / "annotations" / "instances_train.json").read_text())
    having = [
        {a["image_id"] for a in source["annotations"] if a["category_id"] == category}
        for category in sorted(c["id"] for c in source["categories"])
    ]
    assert images == [[len(of_class) for of_class in having]]
    assert run.steps > 6  # of eleven images, each once an epoch
    assert done == [step / run.steps for step in range(run.steps)]


@pytest.mark.parametrize("processes", [0, 1], ids=["alone", "in a group"])
def test_what_a_step_waits_for(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """For the costs of matching, and for the loss before it gets into the weights; beside other
    processes once more, for whether any was told to stop or has a save due. Records, and looks at
    what is learned, are rarer: at step 1, 10, 20."""
    waits: list[list[str]] = []

    def counted(name: str) -> None:
        own = getattr(train.TrainRun, name)

        def call(self: train.TrainRun, *args: Any) -> None:
            with counted_waits() as during:
                own(self, *args)
            waits.append(during)

        monkeypatch.setattr(train.TrainRun, name, call)

    for name in ("train_step", "stop_or_save"):
        counted(name)
    as_on_a_gpu(monkeypatch)
    if processes:
        store = f"file://{tmp_path / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        detrellis.train(
            "small", data=shapes, out=tmp_path / "run", override=SETTINGS, epochs=2, workers=0
        )
    finally:
        if processes:
            torch.distributed.destroy_process_group()
    steps, between = waits[::2], waits[1::2]
    assert len(steps) == 6
    assert steps[1:] == [["cpu", "_local_scalar_dense"]] * 5
    assert between == [["tolist"] if processes else []] * 6
