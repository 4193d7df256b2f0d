"""Runs that nobody has trained: random weights, with all that a measurement reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from detrellis.analysis.runs import ComparedRuns
from detrellis.data.doctor.check import prepare
from detrellis.data.layout import find_data
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import load_weights, save_weights
from detrellis.engine.eval_result import EvalResult
from detrellis.recipes import Recipe, find_recipe, tiny_sized
from detrellis.recipes.build import build

from ..small import SMALL

# Wider than the pictures: all are padded
SETTINGS = [*SMALL, "data.size=[64, 96]", "optim.batch_size=4"]


def compared(places: str | Path | Sequence[str | Path], **how: Any) -> ComparedRuns:
    """Runs to compare on the CPU, with images loaded in this process."""
    return ComparedRuns(places, device="cpu", workers=0, **how)


def small_recipe(name: str, *settings: str) -> Recipe:
    recipe = find_recipe(name)
    return (recipe if name == "tiny" else tiny_sized(recipe)).override([*SETTINGS, *settings])


def untrained(place: Path, data: Path, recipe: Recipe) -> Path:
    """The folder of a run of this recipe that has done no step."""
    source = find_data(data)
    _, _, classes, _ = prepare(source)
    model = build(recipe, len(classes))
    save_weights(
        place / "last.safetensors",
        model.detector.state_dict(),
        Card(recipe, classes, source.to_dict()),
    )
    torch.save({"model": model.state_dict()}, place / "last.state.pt")
    return place


def broken(run: Path) -> Path:
    """Weights beside those of the run, none of them a number."""
    weights, card = load_weights(run / "last.safetensors")
    nan = {
        k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in weights.items()
    }
    save_weights(run / "broken.safetensors", nan, card)
    return run / "broken.safetensors"


def without_boxes(*stats: str) -> EvalResult:
    """What a set without a box gives: no number."""
    counts = {"images": 1, "images_in_set": 1, "ground_truth": 0, "detections": 0}
    return EvalResult(stats=dict.fromkeys(stats), per_class=(), **counts)
