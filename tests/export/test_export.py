"""Every family as an ONNX file:
the same outputs for any number of pictures, no trace of a training scheme.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.layers import Conv2dSame, padding
from timm.layers.padding import get_same_padding
from torch import Tensor, nn

from detrellis.api import Model
from detrellis.data.classes import ClassMap
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import load_weights, save_weights
from detrellis.errors import UserError
from detrellis.exported import (
    ExportedDetector,
    Network,
    load_exported,
    program_shape,
    program_sides,
)
from detrellis.exporting import write
from detrellis.exporting.run import ExportResult, export
from detrellis.exporting.sizes import same_padding, short_sizes
from detrellis.exporting.verify import check_pictures, compare_on_pictures
from detrellis.exporting.write import SUFFIXES, ExportFormat, _graph, _quiet, _traced
from detrellis.loading import load
from detrellis.nn.distinct import _overlapping_in_rounds, overlapping
from detrellis.nn.kernels.grid import by_gathers, grid_sample
from detrellis.nn.order import behind, best_first
from detrellis.recipes import Recipe
from detrellis.recipes.build import build

from ..small import CLASSES, NETWORKS, images, small
from ..test_cli import call

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
# Masks are not exported; DN's detectors are DAB's.
FAMILIES = [
    "small",
    *(
        name
        for name in NETWORKS
        if name not in ("mask2former_r50", "dn_detr_r50", "dn_deformable_detr_r50")
    ),
    *("cascade_dino_r50", "focus_detr_r50", "relation_dino_r50", "salience_detr_r50"),
    *("co_dino_vit_l", "lwdetr_tiny", "ms_deformable_detr_r50", "rfdetr_nano"),
]
# Each with a part that no other test of this file traces. All of them, and what they then detect:
# `tests/soak/test_export.py`.
TRACED = (
    *("smca_detr_r50", "rtdetr_r18", "dfine_s", "focus_detr_r50"),
    *("relation_dino_r50", "co_dino_vit_l", "rfdetr_nano"),
)
SIZE = (96, 64)
CLASS_MAP = ClassMap(tuple(range(CLASSES)), tuple(f"class {i}" for i in range(CLASSES)))


def of_one_size(name: str, schemes: tuple[str, ...] = ("none",)) -> Recipe:
    """A small recipe that reads pictures of `SIZE`."""
    fixed = ["data.augment=fixed", "data.sides=null", "data.sides_max=null"]
    return small(name, schemes).override([f"data.size={list(SIZE)}", *fixed])


def saved(
    name: str, folder: Path, changes: tuple[str, ...] = (), schemes: tuple[str, ...] = ()
) -> Path:
    """Random weights of a small recipe, as a run leaves them."""
    recipe = of_one_size(name, schemes).override(changes)
    detector = build(recipe, CLASSES, seed=1).detector
    with torch.no_grad():  # apart from their start, where many outputs tie
        for parameter in detector.parameters():
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
        for part, parameter in detector.named_parameters():
            if "heads.classes" in part and part.endswith("bias"):
                parameter += 3  # scores that count
    folder.mkdir(parents=True)
    recipe = recipe.with_statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    save_weights(folder / "best.safetensors", detector.state_dict(), Card(recipe, CLASS_MAP, {}))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(random.integers(0, 255, (90, 60, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and its network beside it, for pictures of 96x64."""
    run = saved("detr_r50", tmp_path_factory.mktemp("export") / "run")
    export(run, size=SIZE, detections=True)
    return run


@pytest.mark.parametrize("name", TRACED)
def test_parts_of_families_can_be_traced(name: str) -> None:
    recipe = of_one_size(name)
    model = Model(build(recipe, CLASSES).detector, recipe, CLASS_MAP, torch.device("cpu"))
    with _quiet():
        program = _traced(_graph(model, False), recipe, SIZE)
    assert program_sides(program) == SIZE


def test_a_batch_that_tracing_has_settled_is_a_number() -> None:
    """As `len` of a tensor settles it; a free one is a symbol."""

    class Flat(torch.nn.Module):
        def __init__(self, settled: bool) -> None:
            super().__init__()
            self.settled = settled

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            batch = len(pictures) if self.settled else pictures.shape[0]
            return pictures.view(batch, -1)

    pictures, free = torch.rand(2, 3, 4, 4), {"pictures": {0: torch.export.Dim.AUTO}}
    for settled in (True, False):
        program = torch.export.export(Flat(settled), (pictures,), dynamic_shapes=free, strict=False)
        assert isinstance(program_shape(program)[0], int) == settled


def test_a_small_detector_detects_the_same(pictures: Path, tmp_path: Path) -> None:
    detects_the_same(saved("small", tmp_path / "run"), pictures)


def operations(run: Path) -> set[str]:
    """Of the ONNX file of a run."""
    return {node.op_type for node in onnx.load(run / "model.onnx").graph.node}


def detects_the_same(run: Path, pictures: Path, **options: Any) -> None:
    done = export(run, size=SIZE, verify=pictures, **options)
    assert done.exported.size == SIZE
    assert done.verification is not None
    assert [row.batch for row in done.verification.rows] == [1, 2, 5]
    assert all(row.detections > 0 and row.unmatched == 0 for row in done.verification.rows), (
        done.verification
    )
    assert done.verification.passed
    assert done.verification.ap is None
    assert "its data are not known" in str(done.verification.table().caption)


@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
def test_gathers_are_samples(border: bool, align_corners: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 5, 7, 4, generator=generator)
    grid = 3 * torch.rand(3, 40, 6, 2, generator=generator) - 1.5  # some of it outside
    how = {"border": border, "align_corners": align_corners}
    torch.testing.assert_close(by_gathers(maps, grid, **how), grid_sample(maps, grid, **how))


@pytest.mark.parametrize("name", ["sam_detr_plus_r50_smca_dn", "salience_detr_r50"])
def test_no_part_samples_for_tensorrt(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the program that is to become the file, which takes longer than all else."""
    programs: list[torch.export.ExportedProgram] = []

    def keep(program: torch.export.ExportedProgram, names: object, file: Path, *_: object) -> None:
        programs.append(program)
        file.touch()

    monkeypatch.setattr(write, "_write_onnx", lambda *given, fp16: keep(*given))
    export(saved(name, tmp_path / "run"), size=SIZE, tensorrt=True)
    assert program_sides(programs[0]) == SIZE
    assert not [node for node in programs[0].graph.nodes if "grid_sampl" in str(node.target)]


@pytest.fixture(scope="module")
def written(
    exported: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[ExportFormat, bool], ExportResult]:
    """The run's network in a format, verified; each is made once, and all of one program."""
    folder = tmp_path_factory.mktemp("formats")

    @cache
    def make(format_: ExportFormat, fp16: bool) -> ExportResult:
        out = folder / f"{'half' if fp16 else 'full'}{SUFFIXES[format_]}"
        how: dict[str, Any] = {"format": format_, "size": SIZE, "fp16": fp16, "verify": pictures}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(write, "_traced", traced)
            return export(exported, out, **how)

    programs: list[torch.export.ExportedProgram] = []

    def traced(*given: Any) -> torch.export.ExportedProgram:
        programs[:] = programs or [_traced(*given)]
        return programs[0]

    return make


def test_openvino_is_asked_for_float32(
    written: Callable[[ExportFormat, bool], ExportResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself it takes what a CPU is fastest with: bf16 where there is AMX, which most have not."""
    openvino = pytest.importorskip("openvino")
    asked: dict[str, object] = {}

    class Core(openvino.Core):
        def set_property(self, device: str, properties: dict[str, object]) -> None:
            asked.update(properties)
            super().set_property(device, properties)

    made = written("openvino", False)
    monkeypatch.setattr(openvino, "Core", Core)
    load(made.exported.out)
    assert asked["INFERENCE_PRECISION_HINT"] == "f32"


@pytest.mark.parametrize(
    ("format_", "fp16"), [("onnx", True), ("torch", False), ("openvino", False), ("openvino", True)]
)
def test_other_formats_detect_the_same(
    format_: ExportFormat,
    fp16: bool,
    exported: Path,
    written: Callable[[ExportFormat, bool], ExportResult],
) -> None:
    if format_ == "openvino":
        pytest.importorskip("openvino")
    done = written(format_, fp16)
    assert done.verification is not None
    assert all(row.detections > 0 for row in done.verification.rows)
    assert done.verification.passed
    if format_ == "torch":
        with pytest.raises(UserError, match="runs and no more"):  # to read it is to unpickle it
            load(done.exported.out)
    else:
        assert load(done.exported.out).classes == load(exported).classes


def test_ranked_detections_are_those_of_the_run(exported: Path, pictures: Path) -> None:
    network = load_exported(exported / "model.onnx")[0].network
    pixels = np.stack(
        [np.asarray(Image.open(p).resize((64, 96))) for p in sorted(pictures.iterdir())[:3]]
    )
    outputs = network.run(
        np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / 255
    )
    expected = (
        torch.from_numpy(outputs["logits"])
        .softmax(-1)[..., :-1]
        .max(-1)
        .values.sort(descending=True)
        .values
    )
    count = outputs["scores"].shape[1]
    torch.testing.assert_close(torch.from_numpy(outputs["scores"]), expected[:, :count])
    assert outputs["corners"].shape == (3, count, 4)
    assert ((outputs["corners"] >= 0) & (outputs["corners"] <= 1)).all()


def test_the_file_says_what_it_is(exported: Path) -> None:
    properties = {p.key: p.value for p in onnx.load(exported / "model.onnx").metadata_props}
    assert json.loads(properties["classes"]) == [f"class {i}" for i in range(CLASSES)]
    assert json.loads(properties["detrellis"])["recipe"]["data"]["mean"] == [0.485, 0.456, 0.406]
    model = load(exported / "model.onnx")
    assert model.classes == load(exported).classes


def test_openvino_has_the_threads_of_torch(
    written: Callable[[ExportFormat, bool], ExportResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino, made, threads = pytest.importorskip("openvino"), [], torch.get_num_threads()
    out = written("openvino", False).exported.out
    compile_model = openvino.Core.compile_model

    def kept(*given: Any) -> Any:
        made.append(compile_model(*given))
        return made[-1]

    monkeypatch.setattr(openvino.Core, "compile_model", kept)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            load_exported(out)
            about = made[-1].get_property("DEVICE_PROPERTIES")["CPU"]
            assert about["INFERENCE_NUM_THREADS"] == count
    finally:
        torch.set_num_threads(threads)


def test_pictures_to_verify_on_may_lie_in_folders(tmp_path: Path) -> None:
    (tmp_path / "images" / "val").mkdir(parents=True)
    data = of_one_size("detr_r50").data
    with pytest.raises(UserError, match="no images in this folder"):
        check_pictures(tmp_path / "images", data)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "val" / "1.png")
    check_pictures(tmp_path / "images", data)


def test_pictures_of_another_size_are_refused_before_the_tracing(tmp_path: Path) -> None:
    run = saved("detr_r50", tmp_path / "run", ("data.match_orientation=true",))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "broken.png").write_bytes(b"")
    Image.new("RGB", (60, 90)).save(pictures / "fits.png")
    data = load(run).recipe.data
    check_pictures(pictures, data, SIZE)
    Image.new("RGB", (60, 60)).save(pictures / "square.png")
    check_pictures(pictures, data)
    with pytest.raises(UserError, match=r"--size 96x64 does not take .*square.png, which becomes"):
        export(run, size=SIZE, verify=pictures)
    assert not list(run.glob("model.*"))


def test_a_verifier_sees_another_network(exported: Path, pictures: Path) -> None:
    model = load(exported)
    with torch.no_grad():
        for parameter in model.detector.decoder.heads.parameters():
            parameter += 0.05
    rows = compare_on_pictures(model, load(exported / "model.onnx"), pictures, fp16=False)
    assert all(row.unmatched > 0 for row in rows)


def test_the_command_line_predicts_with_it(
    exported: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = (exported / "model.onnx", exported)
    found = [
        json.loads(
            call(
                "predict",
                path,
                pictures,
                "--out",
                tmp_path / str(i),
                "--threshold",
                0,
                "--json",
                capsys=capsys,
            )
        )
        for i, path in enumerate(paths)
    ]
    assert len(found[0]) == len(found[1]) > 0
    assert {row["category_name"] for row in found[0]} == {row["category_name"] for row in found[1]}


class SamePadded(nn.Sequential):
    """Convolutions that halve the picture four times, as EfficientNet pads them."""

    def __init__(self) -> None:
        super().__init__(*(Conv2dSame(1, 1, kernel, 2) for kernel in (3, 5, 3, 5)))


def test_sizes_of_same_padding_are_short_formulas() -> None:
    network, auto = SamePadded().eval(), torch.export.Dim.AUTO
    with short_sizes():
        program = torch.export.export(
            network,
            (torch.rand(1, 1, 62, 58),),
            dynamic_shapes=({2: auto, 3: auto},),
            strict=False,
        )
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    rows = str(output.args[0][0].meta["val"].shape[2])
    assert rows.count("s") == 1, rows  # a formula that names the picture's side once
    for height, width in ((62, 58), (61, 57), (33, 90), (64, 47)):
        picture = torch.rand(1, 1, height, width)
        torch.testing.assert_close(program.module()(picture), network(picture))


def test_same_padding_is_timms() -> None:
    given = [range(1, 40), range(1, 8), range(1, 5), range(1, 4)]
    for side, kernel, stride, dilation in itertools.product(*given):
        expected = get_same_padding(side, kernel, stride, dilation)
        assert same_padding(side, kernel, stride, dilation) == expected
    with short_sizes():
        assert padding.get_same_padding is same_padding
    assert padding.get_same_padding is get_same_padding


def test_what_is_behind_is_so_in_every_runtime(tmp_path: Path) -> None:
    class Order(nn.Module):
        def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
            return behind(scores > 0.5), best_first(scores)

    scores = torch.rand(2, 500, generator=torch.Generator().manual_seed(0))
    places = [sorted(range(500), key=lambda place: row[place] > 0.5) for row in scores.tolist()]
    best = scores.argsort(dim=1, descending=True).tolist()
    free = {"scores": {1: torch.export.Dim.AUTO}}  # a picture may have fewer tokens
    example = (torch.rand(2, 40),)
    program = torch.export.export(Order(), example, dynamic_shapes=free, strict=False)
    file = tmp_path / "order.onnx"
    names: dict[str, Any] = {"input_names": ["scores"], "output_names": ["behind", "best"]}
    torch.onnx.export(program, dynamo=True, verbose=False, **names).save(file)
    session = onnxruntime.InferenceSession(file)
    inputs = {"scores": scores.numpy()}
    runtimes = [Order()(scores), program.module()(scores), session.run(None, inputs)]
    if importlib.util.find_spec("openvino"):
        model = importlib.import_module("openvino").compile_model(file, "CPU")
        runtimes.append([model(inputs)[i] for i in range(2)])
    for found in runtimes:
        assert [order.tolist() for order in found] == [places, best]


def test_schemes_leave_no_trace() -> None:
    counts = []
    for schemes in ((), ("group=2",)):
        recipe = of_one_size("detr_r50", schemes)
        model = Model(build(recipe, CLASSES).detector, recipe, CLASS_MAP, torch.device("cpu"))
        program = _traced(_graph(model, False), recipe, SIZE)
        counts.append(Counter(str(node.target) for node in program.graph.nodes))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"out": "model.pt"}, "end in .onnx"),
        ({"format": "torch", "fp16": True}, "--fp16 with --format torch"),
        ({"format": "openvino", "tensorrt": True}, "--tensorrt with --format openvino"),
        ({"verify": "no_such_folder"}, "no_such_folder: no such file or folder"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str, exported: Path) -> None:
    with pytest.raises(UserError, match=words):
        export(exported, **options)


def test_a_missing_package_is_named(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package onnx") as error:
        export(exported, "other.onnx")
    assert "detrellis[export]" in str(error.value.remedy)


def test_masks_and_exported_networks_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exported already"):
        export(exported / "model.onnx", tmp_path / "again.onnx")
    with pytest.raises(UserError, match="an exported network, which runs and no more"):
        load_weights(exported / "model.onnx")
    with pytest.raises(UserError, match="masks are not exported"):
        export(saved("mask2former_r50", tmp_path / "masks"))


def test_bad_files_and_pictures_of_other_sizes_are_named(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a network")
    with pytest.raises(UserError, match=r"bad\.onnx: ONNX Runtime cannot load it"):
        load(tmp_path / "bad.onnx")
    Image.fromarray(np.zeros((40, 90, 3), dtype=np.uint8)).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match="takes pictures of 96x64"):
        load(exported / "model.onnx").predict(tmp_path / "wide.png")


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_rounds_of_nms_are_nms(threshold: float) -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(3, 200, 4, generator=generator) * torch.tensor([0.5, 0.5, 0.5, 0.5]) + 0.2
    assert torch.equal(_overlapping_in_rounds(boxes, threshold), overlapping(boxes, threshold))


def test_pictures_of_other_sizes_go_in_apart_and_without_padding() -> None:
    """Each row of the outputs is its own picture's: here its sum, and its size."""
    seen: list[tuple[int, ...]] = []

    def run(pixels: NDArray[Any]) -> dict[str, NDArray[Any]]:
        seen.append(pixels.shape)
        boxes = np.tile(np.float32([pixels.shape[2], pixels.shape[3], 0, 0]), (len(pixels), 1, 1))
        return {"logits": pixels.sum((1, 2, 3))[:, None, None], "boxes": boxes}

    recipe = small("detr_r50")
    detector = ExportedDetector(
        Network(run, {}, (None, None)), Card(recipe, CLASS_MAP, {}), Path("fake.onnx")
    )
    batch = images(((32, 48), (48, 32), (32, 48)))
    output = detector(batch)
    assert seen == [(2, 3, 32, 48), (1, 3, 48, 32)]
    assert output.boxes[0, :, 0, :2].tolist() == [[32, 48], [48, 32], [32, 48]]
    torch.testing.assert_close(output.logits[0, :, 0, 0], batch.pixels.sum((1, 2, 3)))
