"""V and IS on cases made by hand, and against the matching of one image at a time;
the epochs of a small run.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import detrellis
from detrellis.analysis.instability import (
    InstabilityResult,
    RunInstability,
    analyze,
    changed,
    draw,
    instability,
    kept_epochs,
    matched_boxes,
)
from detrellis.analysis.measurements import save
from detrellis.analysis.outputs import one_to_one
from detrellis.api import evaluate
from detrellis.distributed import World
from detrellis.engine.checkpoint import load_weights
from detrellis.engine.evaluate import EvalOptions
from detrellis.engine.log import RunLog
from detrellis.errors import UserError
from detrellis.loading import open_split
from detrellis.matching import Candidates, Hungarian, Match, assign
from detrellis.supervision import Supervision
from detrellis.types import Assignment, DecoderOutput

from ..small import CLASSES, targets
from .runs import SETTINGS, compared, small_recipe, untrained


def test_changed_entries_are_counted_between_neighbours() -> None:
    v = torch.tensor([[0, -1, 1, -1], [-1, 0, 1, -1], [-1, 0, 1, -1], [0, 1, -1, -1]])
    assert changed(v).tolist() == [2, 0, 3]  # a box that moves to another query counts for both
    assert changed(v[:1]).tolist() == []
    other = torch.tensor([[-1], [-1], [0], [0]])
    assert instability([v, other]).tolist() == [1.0, 0.5, 1.5]
    assert torch.equal(changed(torch.stack([v, v], 1)), torch.stack([changed(v)] * 2, 1))


@pytest.mark.parametrize("sizes", [(2, 3), (0, 4), (9, 1), (0, 0)])
def test_v_is_the_matching_of_each_image(sizes: tuple[int, ...]) -> None:
    """Also with more boxes than queries, and whatever the run trained with."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 6, CLASSES, generator=generator)
    boxes = torch.rand(3, 2, 6, 4, generator=generator) * 0.4 + 0.2
    output, there = DecoderOutput(logits, boxes, boxes), targets(sizes)
    supervision = Supervision(Hungarian(candidates=Candidates(3, 3, 3)))
    v = matched_boxes(one_to_one(supervision, output, there), there, 3, 6)
    assert v.shape == (3, 2, 6)
    cost = Hungarian().cost
    for image, first in enumerate(there.offsets):
        own = slice(first, first + sizes[image])
        for layer in range(3):
            found = {int(q): int(v[layer, image, q]) for q in range(6) if v[layer, image, q] >= 0}
            assert len(set(found.values())) == len(found) == min(sizes[image], 6)
            if not found:
                continue
            costs = cost(
                logits[layer, image], boxes[layer, image], there.labels[own], there.boxes[own]
            )
            total = sum(costs[q, j] for q, j in found.items())
            for a in found:  # no swap of two queries is cheaper
                for b in found:
                    swapped = (
                        total
                        - costs[a, found[a]]
                        - costs[b, found[b]]
                        + costs[a, found[b]]
                        + costs[b, found[a]]
                    )
                    assert a == b or swapped >= total - 1e-5


def test_no_positive_is_no_box() -> None:
    empty = Assignment(*torch.zeros(5, 0, dtype=torch.int64))
    assert matched_boxes(empty, targets((1, 0)), 2, 3).tolist() == [[[-1] * 3] * 2] * 2


EPOCHS = 3  # of 3 steps: 11 images in batches of 4
KEPT = [*SETTINGS, "schedule.keep_every=1"]


def trained(data: Path, out: Path, settings: list[str]) -> Path:
    detrellis.train(
        "tiny", data=data, out=out, override=settings, epochs=EPOCHS, workers=0, device="cpu"
    )
    return out


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(shapes, tmp_path_factory.mktemp("instability") / "first", KEPT)


def names(run: Path) -> list[str]:
    return [file.name for file in kept_epochs(run)]


def test_the_weights_of_each_epoch_are_kept(run: Path) -> None:
    assert names(run) == ["0001.safetensors", "0002.safetensors", "0003.safetensors"]
    for epoch, file in enumerate(kept_epochs(run), 1):
        weights, card = load_weights(file)
        assert card.epoch == epoch
        assert card.stats is not None
        assert evaluate(file, workers=0, device="cpu").ap == pytest.approx(
            card.stats["AP"], abs=1e-6
        )
    last, _ = load_weights(run / "last.safetensors")
    assert all(torch.equal(last[name], weights[name]) for name in last)
    first = detrellis.load(kept_epochs(run)[0]).detector.state_dict()
    assert not all(torch.equal(last[name], first[name]) for name in last)


def test_a_resumed_run_keeps_the_same_weights(
    run: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_step = RunLog.step

    def stop(self: RunLog, step: int, *args: Any, **kwargs: Any) -> None:
        log_step(self, step, *args, **kwargs)
        if step == 5:  # within the second epoch
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "step", stop)
        other = trained(shapes, tmp_path / "run", KEPT)
    assert [file.name for file in (other / "epochs").iterdir()] == ["0001.safetensors"]
    assert detrellis.resume(other, workers=0, device="cpu").finished
    assert names(other) == names(run)
    for one, two in zip(kept_epochs(run), kept_epochs(other), strict=True):
        first, second = load_weights(one)[0], load_weights(two)[0]
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_whole_analysis(run: Path, tmp_path: Path) -> None:
    result = analyze(compared([run, run], names=["first $x", "[bold]"]))
    one, two = result.runs
    assert one.to_dict() == two.to_dict() | {"name": one.name}
    assert (one.images, one.epochs) == (5, (1, 2, 3))
    # Batches round differently
    assert one.instability == pytest.approx(one_image_at_a_time(run), abs=0.5)
    assert one.mean == pytest.approx(sum(one.instability) / 2)

    files = save(result, tmp_path / "new" / "folder")
    written = json.loads(files.values.read_text())
    assert written == result.to_dict()
    assert [r["name"] for r in written["runs"]] == ["first $x", "[bold]"]
    assert written["runs"][0]["epochs"] == [1, 2, 3]
    assert files.figure.stat().st_size > 10_000
    assert result.table().row_count == 2
    lines = draw(result).axes[0].lines
    assert [np.asarray(line.get_xdata()).tolist() for line in lines] == [[2, 3], [2, 3]]


def one_image_at_a_time(run: Path) -> list[float]:
    """IS between the kept epochs, from the detections' own matching."""
    v: list[list[dict[int, int]]] = []  # by epoch and image: the box of each matched query
    for file in kept_epochs(run):
        with (
            open_split(
                file, World(0, 1, torch.device("cpu")), EvalOptions(workers=0, batch_size=1)
            ) as opened,
            torch.no_grad(),
        ):
            seen = [(opened.model.detector(b.images), b.targets) for b in opened.loader]
        found = [assign([Match(output, there, Hungarian())])[0] for output, there in seen]
        v.append([dict(zip(f.query.tolist(), f.target.tolist(), strict=True)) for f in found])
    return [
        sum(len(dict(a.items() ^ b.items())) for a, b in zip(before, after, strict=True))
        / len(after)
        for before, after in itertools.pairwise(v)
    ]


def measured(*epochs: int) -> RunInstability:
    return RunInstability("x", "run", "data", 2, 9, epochs, tuple(float(e) for e in epochs[1:]))


def test_the_table_names_the_epochs() -> None:
    runs = (measured(1, 2, 3), measured(2, 4, 6), measured(1, 2, 7), measured(5, 6))
    table = InstabilityResult(runs, "val").table()
    assert [str(cell) for cell in table.columns[1].cells] == [
        "1 to 3",
        "2 to 6 by 2",
        "1, 2, 7",
        "5 to 6",
    ]
    assert [str(cell) for cell in table.columns[2].cells] == ["4.5"] * 4


def test_what_cannot_be_measured_is_said(run: Path, shapes: Path, tmp_path: Path) -> None:
    remedy = r"\s+IS compares epochs. .* -o schedule.keep_every=1"
    plain = untrained(tmp_path / "plain", shapes, small_recipe("tiny"))
    single = trained(shapes, tmp_path / "single", [*SETTINGS, "schedule.keep_every=2"])
    for wrong, message in (
        (plain, "plain: no weights of its epochs"),
        (run / "last.safetensors", "last.safetensors: no weights of its epochs"),
        (single, r"single: weights of one epoch only \(0002\)"),
    ):
        with pytest.raises(UserError) as error:
            analyze(compared([run, wrong]))
        assert re.search(message + remedy, " ".join(str(error.value).split())), str(error.value)
    with pytest.raises(UserError, match="nowhere: no such folder or file"):
        analyze(compared(tmp_path / "nowhere"))

    source = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    for annotation in source["annotations"]:
        annotation["iscrowd"] = 1
    (tmp_path / "crowd.json").write_text(json.dumps(source))
    with pytest.raises(UserError, match="no box to match, only crowd regions"):
        analyze(compared(run, val=tmp_path / "crowd.json", val_images=shapes / "images" / "val"))
