"""`convert`, and that a converted checkpoint predicts what transformers predicts,
on real pictures where there are.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import detrellis
from detrellis.cli import app
from detrellis.errors import UserError
from detrellis.interop.convert import save_huggingface

transformers = pytest.importorskip("transformers")

from . import test_lwdetr, test_rtdetr  # noqa: E402 (need transformers)
from .test_dfine import CLASSES, small, weights_of  # noqa: E402
from .test_huggingface import make  # noqa: E402

ROOT = Path(__file__).parents[2]
COCO128 = (
    Path(os.environ.get("DETRELLIS_COCO128", ROOT.parent / "shared" / "data" / "coco128"))
    / "images"
)
PROCESSORS = {
    "detr": "DetrImageProcessor",
    "conditional": "ConditionalDetrImageProcessor",
    "dab": "ConditionalDetrImageProcessor",
    "deformable two-stage": "DeformableDetrImageProcessor",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Real ones, with those whose long side meets its limit;
    where the set is missing, thin clouds of colour, in which no two places look alike.
    """
    found = sorted(COCO128.glob("*.jpg"))
    if found:
        shapes = {p: Image.open(p).size for p in found}
        thin = [p for p, (w, h) in shapes.items() if max(w, h) / min(w, h) > 1333 / 800]
        return [*found[:3], *thin[:5]]
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i, size in enumerate([(640, 327), (640, 248), (400, 300)] * 2):
        coarse = Image.fromarray(generator.integers(256, size=(12, 16, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return sorted(folder.glob("*.png"))


# With what their post-processing has to be told
REALTIME: dict[str, tuple[str, dict[str, Any]]] = {
    "rtdetr-r18": ("RTDetrImageProcessor", {}),
    "rtdetrv2-r18": ("RTDetrImageProcessor", {}),
    "dfine": ("RTDetrImageProcessor", {}),
    "lwdetr": ("DeformableDetrImageProcessor", {"top_k": 7}),
    "rfdetr": ("RfDetrImageProcessor", {"top_k": 7}),
}


def make_realtime(kind: str, folder: Path) -> Any:
    """A random model of transformers, by the test of its family."""
    if kind == "dfine":
        recipe = small("s")
        save_huggingface(folder, weights_of(recipe), recipe, CLASSES)
        return transformers.DFineForObjectDetection.from_pretrained(folder)
    return (test_rtdetr if "rtdetr" in kind else test_lwdetr).make(kind)


@pytest.fixture(scope="module", params=[*PROCESSORS, *REALTIME])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any, Any, dict[str, Any]]:
    folder, kind = tmp_path_factory.mktemp("saved"), request.param
    # A tenth of the size: the rules are the same, the pictures cheaper.
    if kind in PROCESSORS:
        model, name = make(kind, "small", "native"), PROCESSORS[kind]
        options, size = {"threshold": 0.2}, {"shortest_edge": 160, "longest_edge": 267}
    else:
        model, (name, options) = make_realtime(kind, folder), REALTIME[kind]
        options, size = options | {"threshold": 0.0}, {"height": 128, "width": 128}
    model.save_pretrained(folder)
    processor = getattr(transformers, name)(size=size)
    processor.save_pretrained(folder)
    return folder, model.eval(), processor, options


def rows(scores: Any, labels: Any, boxes: Tensor) -> Tensor:
    """A row for each detection, in which another class is far away."""
    columns = [torch.as_tensor(scores)[:, None], torch.as_tensor(labels)[:, None] * 10, boxes]
    return torch.cat(columns, 1).double()


@torch.no_grad()
def test_predictions_equal_those_of_transformers(
    saved: tuple[Path, Any, Any, dict[str, Any]], pictures: list[Path], tmp_path: Path
) -> None:
    """Scores up to 1e-4, boxes up to 1e-4 of the picture's sides; and the picture decides."""
    folder, model, processor, options = saved
    detrellis.convert(folder, tmp_path / "ours")
    ours = detrellis.predict(tmp_path / "ours", pictures, threshold=options["threshold"])
    of_pictures = []
    for path, found in zip(pictures, ours, strict=True):
        picture = Image.open(path).convert("RGB")
        inputs = processor(images=picture, return_tensors="pt")
        theirs = processor.post_process_object_detection(
            model(**inputs), target_sizes=[picture.size[::-1]], **options
        )[0]
        sides = torch.tensor([*picture.size, *picture.size])
        # Equal scores may come in any order: each detection has to have its counterpart.
        boxes = theirs["boxes"].clamp(min=0).minimum(sides)
        mine = rows(found.scores, found.labels, torch.tensor(found.boxes).view(-1, 4) / sides)
        other = rows(theirs["scores"], theirs["labels"], boxes / sides)
        assert len(mine) == len(other), path
        apart = torch.cdist(mine, other, p=torch.inf)
        assert max(apart.amin(0).max(), apart.amin(1).max()) < 1e-4, path
        of_pictures.append(mine)
    first, *others = of_pictures
    assert any(len(first) != len(o) or (first - o).abs().max() > 1e-3 for o in others)


def test_to_theirs_and_back(shapes: Path, tmp_path: Path) -> None:
    """A run of ours, as transformers reads it, and read again:
    the same weights, classes and picture size.
    """
    options = ["data.size=[64, 64]", "optim.batch_size=4"]
    out = tmp_path / "run"
    run = detrellis.train(
        "conditional-detr-r50", scale="tiny", data=shapes, epochs=1, override=options, out=out
    )
    done = detrellis.convert(run.run, tmp_path / "theirs")
    assert done.format == "hf"
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert list(config["id2label"].values()) == list(detrellis.load(run.run).classes.names)
    first, second = detrellis.load(run.run), detrellis.load(tmp_path / "theirs")
    assert second.classes == first.classes
    assert second.recipe.data.size == first.recipe.data.size
    picture = sorted(shapes.rglob("*.jpg") or shapes.rglob("*.png"))[:1]
    one, other = (m.predict(picture, threshold=0.0)[0] for m in (first, second))
    torch.testing.assert_close(
        torch.tensor(one.scores), torch.tensor(other.scores), atol=1e-5, rtol=0
    )


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    make("detr", "small", "native").save_pretrained(tmp_path / "theirs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt: is there already"):
        detrellis.convert(tmp_path / "theirs", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_wrong_source_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(b"bad")
    with pytest.raises(UserError, match=r"bad\.pth"):
        detrellis.convert(tmp_path / "bad.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(tmp_path: Path) -> None:
    make("dab", "small", "native").save_pretrained(tmp_path / "theirs")
    result = CliRunner().invoke(
        app, ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["format"] == "detrellis"
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "ours"), str(tmp_path / "back")])
    assert "from_pretrained" in result.output
