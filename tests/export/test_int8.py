"""Networks in eight bits: what is quantised, what it costs, and when nothing is written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from detrellis.data.layout import find_data
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import load_weights, save_weights
from detrellis.errors import UserError
from detrellis.exported import ExportedDetector, Network, load_exported
from detrellis.exporting import int8
from detrellis.exporting.int8 import Measured, Pictures, Quantised, Quantiser
from detrellis.exporting.run import ExportResult, export
from detrellis.loading import load_trained

from ..test_cli import call
from .test_export import CLASS_MAP, SIZE, saved

openvino = pytest.importorskip("openvino")
pytest.importorskip("nncf")
sender = None
with contextlib.suppress(ImportError):
    from openvino_telemetry.utils import sender


@pytest.fixture(scope="module")
def data(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shapes`, with the classes of the small recipes."""
    folder = shutil.copytree(shapes, tmp_path_factory.mktemp("int8") / "data")
    classes = [
        {"id": i, "name": name} for i, name in zip(CLASS_MAP.ids, CLASS_MAP.names, strict=True)
    ]
    for file in (folder / "annotations").glob("*.json"):
        content = json.loads(file.read_text())
        ids = [category["id"] for category in content["categories"]]
        for box in content["annotations"]:
            box["category_id"] = ids.index(box["category_id"])
        file.write_text(json.dumps(content | {"categories": classes}))
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small recipe with an encoder, as a run on the data set leaves them."""
    folder = saved("detr_r50", tmp_path_factory.mktemp("int8") / "run", ("data.keep_aspect=false",))
    weights, card = load_weights(folder / "best.safetensors")
    save_weights(
        folder / "best.safetensors",
        weights,
        Card(card.recipe, CLASS_MAP, find_data(data).to_dict()),
    )
    return folder


@pytest.fixture(scope="module")
def told() -> Iterator[list[object]]:
    """What OpenVINO and nncf have told their makers."""
    messages: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "false")
        if sender is not None:
            patch.setattr(
                sender.TelemetrySender, "send", lambda self, _, message: messages.append(message)
            )
        yield messages


@pytest.fixture(scope="module")
def quantised(run: Path, told: list[object]) -> ExportResult:
    return export(run, format="openvino", size=SIZE, int8=True)


def test_the_decoder_stays_in_float(quantised: ExportResult) -> None:
    """Elsewhere a decoder in eight bits has lost all AP."""
    model = openvino.Core().read_model(quantised.exported.out)
    names = [
        op.get_friendly_name() for op in model.get_ops() if op.get_type_name() == "FakeQuantize"
    ]
    for part in ("backbone", "neck", "encoder"):
        assert any(f"detector.{part}" in name for name in names), part
    assert not any("detector.decoder" in name or "detector.queries" in name for name in names)


def test_what_it_costs_is_measured(quantised: ExportResult, run: Path) -> None:
    done = quantised.exported.int8
    assert done is not None
    assert done.pictures == 11
    assert done.passed
    assert min(done.before.ms, done.after.ms) > 0
    assert quantised.exported.out == run / "model-int8.xml"
    assert quantised.to_dict()["int8"]["after"]["ap"] == done.after.ap


def test_the_file_says_so_and_is_read(
    quantised: ExportResult, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = quantised.exported.out
    assert load_exported(out)[0].network.metadata["precision"] == "int8"
    assert quantised.exported.int8 is not None
    found = json.loads(call("eval", out, "--workers", 0, "--json", capsys=capsys))
    assert found["stats"]["AP"] == pytest.approx(quantised.exported.int8.after.ap, abs=1e-6)


def test_what_costs_too_much_is_not_written_and_was_the_same(
    quantised: ExportResult,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A second quantisation has the weights of the first."""
    costs, weights = iter([Measured(0.5, 20.0), Measured(0.489, 10.0)]), list[bytes]()

    def measured(self: Quantiser, network: Path) -> Measured:
        weights.append(network.with_suffix(".bin").read_bytes())
        return next(costs)

    monkeypatch.setattr(Quantiser, "_measured", measured)
    files = {path: path.read_bytes() for path in run.iterdir()}
    words = ("export", run, "--format", "openvino", "--size", "96x64", "--int8")
    said = " ".join(call(*words, capsys=capsys, code=2).split())
    assert (
        "costs 1.1 AP: 50.0 in float32, 48.9 in int8 (20.0 and 10.0 ms a picture). Nothing was "
        "written"
    ) in said
    assert "--calibrate DATA" in said
    assert {path: path.read_bytes() for path in run.iterdir()} == files
    in_float, in_int8 = weights
    assert in_float != in_int8 == files[quantised.exported.out.with_suffix(".bin")]


@pytest.mark.skipif(sender is None, reason="openvino_telemetry is not installed")
def test_nobody_is_told(quantised: ExportResult, told: list[object]) -> None:
    """OpenVINO reports each conversion to its makers, unless it is one of a CI job."""
    assert not told
    assert os.environ["CI"] == "false"


@pytest.mark.parametrize(("after", "passed"), [(0.6, True), (0.491, True), (0.489, False)])
def test_one_ap_is_accepted(after: float, passed: bool) -> None:
    assert Quantised(1, Measured(0.5, 1.0), Measured(after, 1.0)).passed == passed


def test_pictures_are_spread_over_the_split_and_always_the_same(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "PICTURES", 3)
    model, card = load_trained(run, "cpu"), load_weights(run / "best.safetensors")[1]
    train = Quantiser(run, model, None).train
    network = Network(lambda pixels: {}, {}, SIZE)
    pictures = Pictures(train, ExportedDetector(network, card, Path("model.xml")), card)
    assert pictures.chosen == [0, 5, 10]
    once, again = list(pictures), list(pictures)
    assert [p["images"].shape for p in once] == [(1, 3, *SIZE)] * 3
    assert all((p["images"] == q["images"]).all() for p, q in zip(once, again, strict=True))
    assert 0.5 < max(p["images"].max() for p in once) <= 1
    other = ExportedDetector(network._replace(sides=(64, 64)), card, Path("model.xml"))
    with pytest.raises(UserError, match="takes pictures of 64x64 pixels"):
        next(iter(Pictures(train, other, card)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"int8": True}, "--int8 with --format onnx"),
        ({"int8": True, "format": "openvino", "fp16": True}, "--int8 with --fp16"),
        ({"int8": True, "format": "openvino", "verify": "pictures"}, "--int8 with --verify"),
        ({"calibrate": "data"}, "--calibrate without --int8"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], words: str, run: Path) -> None:
    with pytest.raises(UserError, match=words):
        export(run, **options)  # type: ignore[arg-type]


def test_a_run_without_its_data_asks_for_some(run: Path, tmp_path: Path) -> None:
    weights, card = load_weights(run / "best.safetensors")
    (tmp_path / "alone").mkdir()
    save_weights(
        tmp_path / "alone" / "best.safetensors", weights, Card(card.recipe, card.classes, {})
    )
    with pytest.raises(UserError, match="not known"):
        export(tmp_path / "alone", format="openvino", int8=True)


def test_a_missing_package_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package nncf") as error:
        export(run, format="openvino", int8=True)
    assert "detrellis[export,int8]" in error.value.remedy
