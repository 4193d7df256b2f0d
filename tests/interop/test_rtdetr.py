"""Random RT-DETRs of transformers to ours and back:
equal boxes of a picture, through either's own preprocessing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import detrellis
from detrellis.cli import app
from detrellis.errors import UserError
from detrellis.interop.convert import save_huggingface
from detrellis.interop.load import load_foreign
from detrellis.interop.rtdetr import kind_of
from detrellis.predictions.record import Prediction
from detrellis.recipes import find_recipe
from detrellis.recipes.rtdetr import small_rtdetr

transformers = pytest.importorskip("transformers")

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtdetr-r18": ("RTDetr", {}),
    "rtdetrv2-r18": ("RTDetrV2", {"decoder_offset_scale": 0.4, "decoder_n_points": 3}),
    "rtdetrv2-r18, discrete": ("RTDetrV2", {"decoder_method": "discrete"}),
}
SIDE = 160


def make(kind: str) -> Any:
    """A model on a ResNet-18-vd, with every parameter random, and running statistics too."""
    name, options = MODELS[kind]
    backbone = transformers.RTDetrResNetConfig(
        layer_type="basic",
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
        out_features=["stage2", "stage3", "stage4"],
    )
    sizes = {
        "d_model": 32,
        "encoder_hidden_dim": 48,
        "encoder_in_channels": [128, 256, 512],
        "hidden_expansion": 0.5,
    }
    sizes |= {
        "decoder_in_channels": [48] * 3,
        "decoder_layers": 2,
        "num_queries": 15,
        "num_labels": 4,
    }
    sizes |= {
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 56,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 8,
    }
    config = getattr(transformers, f"{name}Config")(backbone_config=backbone, **sizes, **options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            norm = tensor.ndim == 1 and key.endswith("weight")  # some start near 0, and hide all
            if norm or key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif key.endswith("embedder.embedder.0.convolution.weight"):
                tensor.mul_(30)  # so that the picture decides
            elif tensor.is_floating_point() and "backbone" not in key and "points_scale" not in key:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def picture(path: Path) -> Path:
    """A picture larger and of another aspect than the detector's input."""
    generator = torch.Generator().manual_seed(2)
    small = torch.rand(1, 3, 9, 12, generator=generator)
    pixels = torch.nn.functional.interpolate(small, size=(301, 407), mode="bicubic").clamp(0, 1)
    image = Image.fromarray((pixels[0].permute(1, 2, 0) * 255).byte().numpy())
    image.save(path, quality=95)
    return path


@torch.no_grad()
def their_detections(
    model: Any, processor: Any, path: Path, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    image = Image.open(path)
    out = model(**processor(image, return_tensors="pt"))
    sizes = [image.size[::-1]]
    (found,) = processor.post_process_object_detection(
        out, threshold=0.0, target_sizes=sizes, **options
    )
    return found["scores"], found["labels"], found["boxes"]


def check_detections(ours: Prediction, scores: Tensor, labels: Tensor, boxes: Tensor) -> None:
    """Equal up to 1e-4 of the picture, in whatever order:
    scores of random weights are nearly equal.
    """
    # Where ours end
    inside = boxes.clamp(min=0).minimum(torch.tensor([407.0, 301.0, 407.0, 301.0]))
    mine, theirs = torch.as_tensor(ours.boxes), inside
    key = torch.tensor([1.0, 0.7, 0.3, 0.1]).double()  # no two boxes of a class have the same
    order, other = (
        (found.double() @ key + 1e4 * torch.as_tensor(classes)).argsort()
        for found, classes in ((mine, ours.labels), (theirs, labels))
    )
    assert len(mine) == len(theirs)
    torch.testing.assert_close(mine[order], theirs[other], rtol=0, atol=1e-4 * 407)
    torch.testing.assert_close(
        torch.as_tensor(ours.scores)[order], scores[other], rtol=0, atol=1e-4
    )
    assert torch.equal(torch.as_tensor(ours.labels)[order], labels[other])


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    theirs, path = make(kind), picture(tmp_path / "picture.jpg")
    processor = transformers.RTDetrImageProcessor(size={"height": SIDE, "width": SIDE})
    theirs.save_pretrained(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    scores, labels, boxes = their_detections(theirs, processor, path)

    ours = detrellis.load(tmp_path / "theirs")
    (found,) = ours.predict([path], threshold=0.0)
    check_detections(found, scores, labels, boxes)

    loaded = load_foreign(tmp_path / "theirs")
    assert all("denoising" in name or "points_scale" in name for name in loaded.skipped)
    assert loaded.recipe.name == kind.split(",")[0]
    assert loaded.recipe.data.mean == (0, 0, 0)
    assert not save_huggingface(tmp_path / "back", loaded.weights, loaded.recipe, loaded.classes)
    back, report = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not [
        k
        for k in report["missing_keys"]
        if not k.endswith(("num_batches_tracked", "n_points_scale"))
    ]
    assert not report["unexpected_keys"]
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path / "back")
    for actual, expected in zip(
        their_detections(back.eval(), again, path), (scores, labels, boxes), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)  # pixels, not fractions


def test_a_run_from_a_checkpoint_of_theirs(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/fine-tuning.md says, of a folder instead of the hub: trained with a scheme that the
    checkpoint was not, and predicted with."""
    monkeypatch.setenv("DETRELLIS_MSDA", "eager")  # compiling would take longer than all the rest
    make("rtdetr-r18").save_pretrained(tmp_path / "theirs")
    processor = transformers.RTDetrImageProcessor(size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path / "theirs")
    source, out = str(tmp_path / "theirs"), str(tmp_path / "run")
    told = ["--data", str(shapes), "--scheme", "align=1", "--epochs", "1", "--out", out]
    command = ["train", "--weights", source, *told, "-o", "optim.batch_size=6"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    run = detrellis.load(out)
    assert run.recipe.schemes.align is not None
    assert run.recipe.data.size == (64, 64)
    assert run.recipe.data.mean == (0, 0, 0)

    loaded = load_foreign(tmp_path / "theirs").weights
    trained = run.detector.state_dict()
    assert trained.keys() == loaded.keys()
    body = {key: value for key, value in loaded.items() if value.ndim > 1 and "class" not in key}
    moved = [float((trained[k] - v).abs().max() / v.abs().max()) for k, v in body.items()]
    assert 0 < max(moved) < 0.5  # it started from there, and learned

    pictures = sorted(shapes.rglob("*.jpg"))[:2] or sorted(shapes.rglob("*.png"))[:2]
    found = run.predict(pictures, threshold=0.0)
    assert [len(each.scores) for each in found] == [15, 15]
    assert set(found[0].names) <= set(run.classes.names)


def test_what_is_not_theirs_is_not_written(tmp_path: Path) -> None:
    assert kind_of(find_recipe("rtdetr-r50").detector) == "rt_detr"
    recipe = small_rtdetr()
    assert kind_of(recipe.detector) is None
    with pytest.raises(UserError, match="transformers"):
        save_huggingface(tmp_path, {}, recipe, detrellis.data.classes.ClassMap((1,), ("cat",)))
