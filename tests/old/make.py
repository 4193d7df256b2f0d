"""Writes what the present version leaves on disk into one archive:
`python -m tests.old.make`, once for each release.

`tests/old/VERSION.tar.xz` then stays as it is. It holds a run that was stopped (state, weights,
log), weights of other networks, all recipes as cards hold them, and what the weights predict.
Numbers are rounded to three bits: some of the networks' parts are the same, and all of it together
stays small.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import detrellis
from detrellis.data.shapes import write_shapes
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import save_weights
from detrellis.recipes import RECIPES, find_recipe
from detrellis.recipes.build import build
from detrellis.recipes.migrate import FORMAT

from ..engine.test_resume import stop_at
from ..small import small

SMALLEST = [
    *(
        "detector.backbone.name=test_efficientnet",
        "detector.backbone.frozen=all",
        "detector.width=32",
    ),
    *(
        "detector.decoder.hidden=32",
        "detector.queries.count=8",
        "detector.decoder.heads=2",
        "data.size=[96, 96]",
    ),
]
NETWORKS = ("detr_r50", "deformable_detr_r50_two_stage", "rtdetr_r18")  # besides the run's
SCHEMES = ("cdn=4", "align=2", "group=2")
PLACE = "/data"  # what paths in cards begin with


def picture() -> np.ndarray[Any, Any]:
    """A picture that is a formula: 64x64, (H, W, 3)."""
    row, column = np.mgrid[:64, :64]
    return np.stack([row * 4, column * 4, (row * column) % 256], axis=-1).astype(np.uint8)


def predicted(weights: Path) -> list[list[float]]:
    """Class, score and box of the eight best detections."""
    (found,) = detrellis.load(weights).predict(picture(), threshold=0.0)
    rows = zip(found.labels, found.scores, found.boxes, strict=True)
    return [[int(label), float(score), *map(float, box)] for label, score, box in list(rows)[:8]]


def rounded(value: Any) -> Any:
    """Tensors within plain containers, to three bits."""
    if isinstance(value, Tensor) and value.is_floating_point():
        mantissa, exponent = torch.frexp(value)
        return torch.ldexp((mantissa * 8).round() / 8, exponent)
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def rewrite(run: Path, base: Path) -> None:
    """Round the numbers in a run's files, and take this machine's paths out of them."""
    for file in run.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            metadata = {
                name: text.replace(str(base), PLACE) for name, text in opened.metadata().items()
            }
            tensors = {name: rounded(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
        save_file(tensors, file, metadata)
    state = rounded(torch.load(run / "last.state.pt", weights_only=True))
    state["card"] = {name: text.replace(str(base), PLACE) for name, text in state["card"].items()}
    torch.save(state, run / "last.state.pt")


def stopped_run(base: Path) -> Path:
    """A run of two epochs that is stopped after the first."""
    import pytest

    data, run = write_shapes(base / "shapes", train=11, val=5, size=(64, 64)), base / "run"
    settings = [*_settings("tiny"), "optim.batch_size=4"]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        detrellis.train(
            "tiny",
            data=data,
            out=run,
            scheme=SCHEMES,
            override=settings,
            epochs=2,
            workers=0,
            device="cpu",
        )
    rewrite(run, base)
    return run


def _settings(name: str) -> list[str]:
    """What makes a recipe as small as it goes."""
    from ..small import SMALL

    hidden = find_recipe(name).detector.encoder.kind in ("deformable", "dense")
    return [*SMALL, *SMALLEST, *(["detector.encoder.hidden=32"] if hidden else [])]


def main() -> None:
    """Write the archive of this version."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder).resolve()
        run, weights = stopped_run(base), base / "weights"
        weights.mkdir()
        classes = detrellis.load(run / "last.safetensors").classes
        for name in NETWORKS:
            recipe = small(name).override(_settings(name) if name != "rtdetr_r18" else SMALLEST)
            detector = build(recipe, len(classes)).detector
            save_weights(
                weights / f"{name}.safetensors",
                rounded(dict(detector.state_dict())),
                Card(recipe, classes, {}),
            )
        files = [run / "last.safetensors", *sorted(weights.iterdir())]
        told = {file.relative_to(base).as_posix(): predicted(file) for file in files}
        (base / "predictions.json").write_text(json.dumps(told, indent=1))
        recipes = {name: recipe().model_dump(mode="json") for name, recipe in RECIPES.items()}
        (base / "recipes.json").write_text(json.dumps({"format": FORMAT, "recipes": recipes}))
        kept = [
            *(
                run / name
                for name in (
                    "last.state.pt",
                    "best.safetensors",
                    "last.safetensors",
                    "metrics.jsonl",
                )
            )
        ]
        kept += [*sorted(weights.iterdir()), base / "predictions.json", base / "recipes.json"]
        out = Path(__file__).with_name(f"{detrellis.__version__}.tar.xz")
        with tarfile.open(out, "x:xz", preset=9) as archive:
            for file in kept:
                archive.add(file, file.relative_to(base).as_posix())
        print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
