"""`convert`, and that a converted checkpoint predicts what transformers predicts,
on real pictures where there are.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import detrellis
from detrellis.cli import app
from detrellis.data.shapes import write_shapes
from detrellis.errors import UserError

transformers = pytest.importorskip("transformers")

from .test_huggingface import make  # noqa: E402 (needs transformers)

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
    where the set is missing, thin synthetic ones.
    """
    found = sorted(COCO128.glob("*.jpg"))
    if found:
        shapes = {p: Image.open(p).size for p in found}
        thin = [p for p, (w, h) in shapes.items() if max(w, h) / min(w, h) > 1333 / 800]
        return [*found[:3], *thin[:5]]
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(((327, 640), (248, 640), (300, 400))):
        write_shapes(folder / str(i), train=1, val=1, size=size)
    return sorted(folder.rglob("*.png")) + sorted(folder.rglob("*.jpg"))


@pytest.fixture(scope="module", params=PROCESSORS)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, object, object]:
    folder = tmp_path_factory.mktemp("saved")
    model = make(request.param, "small", "native")
    model.save_pretrained(folder)
    # A tenth of the size: the rules are the same, the pictures cheaper.
    processor = getattr(transformers, PROCESSORS[request.param])(
        size={"shortest_edge": 160, "longest_edge": 267}
    )
    processor.save_pretrained(folder)
    return folder, model.eval(), processor


@torch.no_grad()
def test_predictions_equal_those_of_transformers(
    saved: tuple[Path, object, object], pictures: list[Path], tmp_path: Path
) -> None:
    folder, model, processor = saved
    detrellis.convert(folder, tmp_path / "ours")
    ours = detrellis.predict(tmp_path / "ours", pictures, threshold=0.2)
    total = 0
    for path, found in zip(pictures, ours, strict=True):
        picture = Image.open(path).convert("RGB")
        inputs = processor(images=picture, return_tensors="pt")  # type: ignore[operator]
        sizes = torch.tensor([[picture.height, picture.width]])
        outputs = model(**inputs)  # type: ignore[operator]
        theirs = processor.post_process_object_detection(
            outputs, threshold=0.2, target_sizes=sizes
        )[0]  # type: ignore[attr-defined]
        width, height = picture.size
        boxes = theirs["boxes"].clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        # Equal scores may come in any order: each detection has to have its counterpart.
        rows = [
            torch.cat(
                [
                    torch.as_tensor(s)[:, None] * 1000,
                    torch.as_tensor(c)[:, None] * 1e4,
                    torch.as_tensor(b),
                ],
                1,
            )
            for s, c, b in (
                (found.scores, found.labels, found.boxes),
                (theirs["scores"], theirs["labels"], boxes),
            )
        ]
        assert len(rows[0]) == len(rows[1]), path
        total += len(rows[0])
        apart = torch.cdist(rows[0].double(), rows[1].double(), p=torch.inf)
        assert max(apart.amin(0).max(), apart.amin(1).max()) < 0.1, path
    assert total > 0


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
