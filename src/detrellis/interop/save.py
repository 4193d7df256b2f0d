"""A detector as a Hugging Face folder, which `transformers` loads without us."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from detrellis.atomic import Write, replace_files
from detrellis.data.classes import ClassMap
from detrellis.data.loader import MEAN, STD
from detrellis.interop import huggingface
from detrellis.interop.links import link_up, missing, to_theirs
from detrellis.interop.names import huggingface as huggingface_names
from detrellis.recipes.config import Recipe


def save_huggingface(folder: Path, weights: Mapping[str, Tensor], recipe: Recipe, classes: ClassMap) -> list[str]:
    """Write `config.json`, `model.safetensors` and `preprocessor_config.json`; returns what differs there, in words.

    Their class index is ours; the data set's own ids stand in `detrellis_category_ids`. Raises `UserError` for a
    detector that transformers does not have.
    """
    config = huggingface.config_of(recipe, dict(enumerate(_distinct(classes.names))))
    config["detrellis_category_ids"] = list(classes.ids)
    kind, detector = config["model_type"], recipe.detector
    links = link_up(weights, huggingface_names(detector), detector.decoder.layers)
    assert not (left := missing(weights, links)), f"no table names {left[0]}"
    ready = dict(weights)
    if (
        detector.queries.kind == "anchors" and detector.queries.indicator
    ):  # theirs has no channel kept free: its zero becomes a part of the pattern
        ready["queries.content"] = F.pad(weights["queries.content"], (0, 1))
    theirs = {huggingface.on_disk(k, kind): v.detach().cpu().contiguous() for k, v in to_theirs(ready, links).items()}
    replace_files(
        (folder / "model.safetensors", lambda path: save_file(theirs, path, {"format": "pt"})),
        (folder / "config.json", _json(config)),
        (folder / "preprocessor_config.json", _json(_processor(kind, recipe))),
    )
    return _differences(kind, recipe)


def _json(value: Mapping[str, Any]) -> Write:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def _distinct(names: tuple[str, ...]) -> list[str]:
    """Names as keys of their `label2id`."""
    return [name if names.count(name) == 1 else f"{name} {i}" for i, name in enumerate(names)]


def _processor(kind: str, recipe: Recipe) -> dict[str, Any]:
    data = recipe.data
    config: dict[str, Any] = {
        "image_processor_type": huggingface.FAMILIES[kind].processor,
        "format": "coco_detection",
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_pad": True,
        "resample": 2,
    }
    if isinstance(data.size, int):
        longest = data.max_side or round(data.size * 1333 / 800)
        return config | {"size": {"shortest_edge": data.size, "longest_edge": longest}}
    height, width = data.size
    if not data.keep_aspect:
        return config | {"size": {"height": height, "width": width}}
    return config | {"size": {"max_height": height, "max_width": width}, "pad_size": {"height": height, "width": width}}


def _differences(kind: str, recipe: Recipe) -> list[str]:
    found = []
    queries = recipe.detector.queries
    if queries.kind == "proposals" and not queries.empty_compete:
        found.append("tokens that can propose nothing compete with their score there, ours come last")
    if queries.kind == "proposals" and queries.distinct is not None:
        found.append("queries start at the best proposals, whether they are distinct or not")
    if kind == "dab-detr" and recipe.detector.eps != 1e-5:
        found.append(
            f"boxes at the image's very edge: their inverse sigmoid clamps at 1e-5, ours at {recipe.detector.eps}"
        )
    if recipe.detector.top_k != 100 and kind != "detr":
        found.append(f"post-processing keeps 100 detections unless told top_k={recipe.detector.top_k}")
    if recipe.detector.soft_nms is not None:
        found.append("post-processing has no soft-NMS")
    return found
