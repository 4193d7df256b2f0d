"""D-FINE's checkpoints: random models of transformers to ours and back,
and files with its authors' names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detrellis.data.classes import ClassMap
from detrellis.errors import UserError
from detrellis.interop.convert import save_huggingface
from detrellis.interop.dfine import config_of, recipe_of
from detrellis.interop.dfine_pth import table
from detrellis.interop.links import link_up, to_theirs
from detrellis.interop.load import load_foreign
from detrellis.loading import load
from detrellis.recipes import Recipe, find_recipe
from detrellis.recipes.network import build_detector

from ..small import resized

CLASSES = ClassMap(tuple(range(4)), ("a", "b", "c", "d"))


def small(size: str, **parts: Any) -> Recipe:
    """On the smallest HGNetV2, whose levels and norms stay those of the size."""
    recipe = find_recipe(f"dfine-{size}")
    backbone = recipe.detector.backbone.replace(name="hgnetv2_b0", pretrained=False)
    sizes: dict[str, Any] = {
        "width": 32,
        "encoder": {"hidden": 48, "heads": 4},
        "queries": {"count": 20},
    }
    sizes["decoder"] = {"hidden": 48, "heads": 4, "layers": 2}
    detector = resized(
        recipe.detector.replace(backbone=backbone), **(sizes | {"top_k": 20} | parts)
    )
    return recipe.model_copy(
        update={"detector": detector, "data": recipe.data.replace(size=(96, 128))}
    )


def weights_of(recipe: Recipe) -> dict[str, Tensor]:
    """Random everywhere, and running statistics too."""
    torch.manual_seed(0)
    detector = build_detector(recipe.detector, len(CLASSES))
    generator = torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {}
    for key, value in detector.state_dict().items():
        if key.endswith("running_var"):
            state[key] = torch.rand(value.shape, generator=generator) + 0.5
        elif value.is_floating_point():
            state[key] = value + 0.05 * torch.randn(value.shape, generator=generator)
    return state


def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((200, 150), Image.Resampling.BICUBIC).save(
        tmp_path / "picture.jpg", quality=95
    )
    return tmp_path / "picture.jpg"


@pytest.mark.parametrize("size", ["n", "s", "l", "x"])
def test_transformers_finds_the_same_boxes_with_its_own_processor(
    size: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    recipe = (
        small(size) if size != "x" else small(size, encoder={"hidden": 48, "heads": 4, "inner": 48})
    )
    weights = weights_of(recipe)
    save_huggingface(tmp_path / "theirs", weights, recipe, CLASSES)
    model, report = transformers.DFineForObjectDetection.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "theirs")
    image = Image.open(picture(tmp_path))
    with torch.no_grad():
        output = model.eval()(**processor(image, return_tensors="pt"))
    (theirs,) = processor.post_process_object_detection(
        output, threshold=0.0, target_sizes=[image.size[::-1]]
    )

    found = load_foreign(tmp_path / "theirs")
    assert found.classes.names == CLASSES.names
    (ours,) = load(tmp_path / "theirs", device="cpu").predict(
        [tmp_path / "picture.jpg"], threshold=0.0
    )
    assert len(ours.scores) == len(theirs["scores"]) == recipe.detector.queries.count
    torch.testing.assert_close(torch.as_tensor(ours.scores), theirs["scores"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.as_tensor(ours.boxes), theirs["boxes"], atol=1e-2, rtol=1e-4)

    for key, value in weights.items():
        assert torch.equal(found.weights[key], value), key
    model.save_pretrained(tmp_path / "again")
    again = load_foreign(tmp_path / "again")
    assert all(torch.equal(value, found.weights[key]) for key, value in again.weights.items())
    assert again.recipe.detector == found.recipe.detector


@pytest.mark.parametrize("size", ["n", "s", "l", "x"])
def test_the_authors_file_gives_the_same_detector(size: str, tmp_path: Path) -> None:
    heads = {
        "encoder": {"hidden": 48},
        "decoder": {"hidden": 48, "layers": 2},
        "queries": {"count": 300},
    }
    recipe = small(size, **heads, top_k=300)
    weights = weights_of(recipe)
    links = link_up(weights, table(recipe.detector), recipe.detector.decoder.layers)
    theirs = to_theirs(weights, links) | {"decoder.up": torch.tensor([0.5])}
    assert recipe.detector.decoder.distributions is not None
    assert recipe.detector.cross_attention.kind == "deformable"
    theirs["decoder.reg_scale"] = torch.tensor([recipe.detector.decoder.distributions.scale])
    points = recipe.detector.cross_attention.points
    assert isinstance(points, tuple)
    shares = torch.tensor([1 / count for count in points for _ in range(count)])
    theirs["decoder.decoder.layers.0.cross_attn.num_points_scale"] = shares
    if size in "ns":
        theirs["backbone.stem.stem1.bn.num_batches_tracked"] = torch.tensor(7)
    worse = {name: torch.zeros_like(value) for name, value in theirs.items()}
    torch.save({"model": worse, "ema": {"module": theirs}, "last_epoch": 3}, tmp_path / "dfine.pth")
    found = load_foreign(tmp_path / "dfine.pth", classes=CLASSES)
    for key, value in weights.items():
        assert torch.equal(found.weights[key], value), key
    assert found.recipe.detector == resized(
        recipe.detector,
        encoder={"expansion": recipe_expansion(found.recipe), "inner": inner_of(recipe)},
    )


def recipe_expansion(recipe: Recipe) -> float:
    """As a shape tells it, which the published one may be rounded to."""
    assert recipe.detector.encoder.kind == "hybrid"
    return recipe.detector.encoder.expansion


def inner_of(recipe: Recipe) -> int:
    assert recipe.detector.encoder.kind == "hybrid"
    return recipe.detector.encoder.inner or recipe.detector.width


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_idx": 2},
        {"layer_scale": 2.0},
        {"lqe_layers": 3},
        {"backbone_config": {"model_type": "resnet"}},
    ],
)
def test_what_no_release_has_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        recipe_of({**config_of(small("s")), **changes})
