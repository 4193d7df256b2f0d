"""`detrellis convert`: a checkpoint from one format to the other.
Ours become a Hugging Face folder, which transformers loads without us."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from detrellis.arguments import checked
from detrellis.atomic import Write, replace_files
from detrellis.data.batch import Normalise
from detrellis.data.classes import ClassMap
from detrellis.data.formats.coco import load_json
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import load_whole, metadata_of, save_weights
from detrellis.errors import UserError
from detrellis.interop import mask2former
from detrellis.interop.family import Family
from detrellis.interop.files import HUB, OURS, fetch
from detrellis.interop.huggingface import FAMILIES, config_of
from detrellis.interop.links import link_up, missing, to_theirs
from detrellis.interop.load import is_foreign, load_foreign
from detrellis.interop.lwdetr import RF_PROCESSOR
from detrellis.outputs import Outputs
from detrellis.recipes.config import Recipe

Format = Literal["detrellis", "hf"]
WEIGHTS = "best.safetensors"


@dataclass(frozen=True)
class Conversion:
    """What was written, and what is different about it."""

    out: Path
    format: Format
    recipe: str
    parameters: int
    classes: int
    skipped: tuple[str, ...]  # tensors of the source that a detector has no use for, by kind
    differences: tuple[str, ...]  # between the two formats, in words

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"out": str(self.out)}


def load_any(place: str | Path) -> tuple[dict[str, Tensor], Card]:
    """Weights and card of a run, of a weights file, or of anybody else's checkpoint:
    all that its recipe needs.
    """
    if not is_foreign(place):
        return load_whole(Path(place))
    if (pushed := pushed_weights(place)) is not None:
        return load_whole(pushed)
    checkpoint = load_foreign(place)
    return dict(checkpoint.weights), Card(
        checkpoint.recipe, checkpoint.classes, {}, weights=str(place)
    )


def pushed_weights(place: str | Path) -> Path | None:
    """The weights file of an `hf:org/name` that `push` has written; None for everything else."""
    if not str(place).startswith(HUB):
        return None
    file = fetch(str(place).removeprefix(HUB)) / OURS
    return file if "detrellis" in (metadata_of(file) or {}) else None


@checked
def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Format | None = None,
    classes: str | Path | ClassMap | None = None,
    dilation: bool = False,
) -> Conversion:
    """Write `source` in the other format:
    a foreign checkpoint as a run's weights, ours as a Hugging Face folder.

    `to` forces a format. `classes`: a COCO file that names the classes of a source that does not.
    `dilation`: a `.pth` file is of a DC5 model, which its tensors do not tell.
    """
    foreign, folder = is_foreign(source), Path(out)
    target: Format = to or ("detrellis" if foreign else "hf")
    outputs = Outputs(folder, "folder")
    outputs.alone([] if str(source).startswith(HUB) else [source])
    named = (
        None
        if classes is None
        else classes
        if isinstance(classes, ClassMap)
        else read_classes(Path(classes))
    )
    if named is not None and not foreign:
        raise UserError(f"{source}: its classes are known", "Leave --classes out.")
    skipped: tuple[str, ...] = ()
    if foreign and pushed_weights(source) is None:
        checkpoint = load_foreign(source, classes=named, dilation=dilation)
        weights = dict(checkpoint.weights)
        card = Card(checkpoint.recipe, checkpoint.classes, {}, weights=str(source))
        kinds = Counter(name.split(".")[0] for name in checkpoint.skipped)
        skipped = tuple(f"{kind} ({count})" for kind, count in kinds.items())
    else:
        weights, card = load_any(source)
    outputs.clear()
    differences: list[str] = []
    if target == "hf":
        differences = save_huggingface(folder, weights, card.recipe, card.classes)
    else:
        save_weights(folder / WEIGHTS, weights, card)
    outputs.note()
    parameters = sum(w.numel() for w in weights.values())
    return Conversion(
        folder, target, card.recipe.name, parameters, len(card.classes), skipped, tuple(differences)
    )


def read_classes(path: Path) -> ClassMap:
    """The classes of a COCO file."""
    content = load_json(path)
    try:
        return ClassMap.from_categories(content["categories"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no COCO categories ({error})", "Give an annotation file."
        ) from None


def save_huggingface(
    folder: Path, weights: Mapping[str, Tensor], recipe: Recipe, classes: ClassMap
) -> list[str]:
    """Write `config.json`, `model.safetensors` and `preprocessor_config.json`;
    returns what differs there, in words.

    Their class index is ours; the data set's own ids stand in `detrellis_category_ids`. Raises
    `UserError` for a detector that transformers does not have.
    """
    config = config_of(recipe, dict(enumerate(_distinct(classes.names))))
    config["detrellis_category_ids"] = list(classes.ids)
    detector = recipe.detector
    family = FAMILIES[config["model_type"]]
    links = link_up(weights, family.names(detector), detector.decoder.layers)
    assert not (left := missing(weights, links)), f"no table names {left[0]}"
    ready = dict(weights)
    # Theirs has no channel kept free: its zero becomes a part of the pattern.
    if detector.queries.kind == "anchors" and detector.queries.indicator:
        ready["queries.content"] = F.pad(weights["queries.content"], (0, 1))
    if not detector.boxes:
        ready = mask2former.turned(ready, detector)
    stored = family.stored(to_theirs(ready, links), recipe, len(classes))
    theirs = {name: value.detach().cpu().contiguous() for name, value in stored.items()}
    replace_files(
        (folder / "model.safetensors", lambda path: save_file(theirs, path, {"format": "pt"})),
        (folder / "config.json", _json(config)),
        (folder / "preprocessor_config.json", _json(processor(family, recipe))),
    )
    return _differences(family, recipe)


def _json(value: Mapping[str, Any]) -> Write:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def _distinct(names: tuple[str, ...]) -> list[str]:
    """Names as keys of their `label2id`."""
    return [name if names.count(name) == 1 else f"{name} {i}" for i, name in enumerate(names)]


def processor(family: Family, recipe: Recipe) -> dict[str, Any]:
    """What `preprocessor_config.json` says of the recipe's pictures, for a model of that family."""
    data, normalise = recipe.data, Normalise.of(**recipe.data.statistics())
    config: dict[str, Any] = {
        "image_processor_type": family.processor,
        "format": "coco_detection",
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": normalise != Normalise((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        "image_mean": list(normalise.mean),
        "image_std": list(normalise.std),
        "do_pad": True,
        "resample": 2,
    }
    config = {
        name: value for name, value in (config | dict(family.pictures)).items() if value is not None
    }
    if isinstance(data.size, int):
        longest = data.max_side or round(data.size * 1333 / 800)
        return config | {"size": {"shortest_edge": data.size, "longest_edge": longest}}
    height, width = data.size
    if data.match_orientation and height != width:
        return config | {"size": {"shortest_edge": min(data.size), "longest_edge": max(data.size)}}
    if not data.keep_aspect:
        return config | {"size": {"height": height, "width": width}}
    return config | {
        "size": {"max_height": height, "max_width": width},
        "pad_size": {"height": height, "width": width},
    }


def _differences(family: Family, recipe: Recipe) -> list[str]:
    differences = []
    queries = recipe.detector.queries
    if queries.kind in ("proposals", "mixed") and not queries.empty_compete:
        differences.append(
            "tokens that can propose nothing compete with their score there, ours come last"
        )
    if queries.kind in ("proposals", "mixed") and queries.distinct is not None:
        differences.append("queries start at the best proposals, whether they are distinct or not")
    if family is FAMILIES["dab-detr"] and recipe.detector.eps != 1e-5:
        differences.append(
            "boxes at the image's very edge: their inverse sigmoid clamps at 1e-5, ours at "
            f"{recipe.detector.eps}"
        )
    usual = queries.count if family.detections is None else family.detections
    if recipe.detector.top_k != usual and family is not FAMILIES["detr"]:
        differences.append(
            f"post-processing keeps {usual} detections unless told top_k={recipe.detector.top_k}"
        )
    if family.processor == RF_PROCESSOR and recipe.data.antialias:
        differences.append("pictures are made smaller without antialiasing")
    if recipe.detector.pads_to > 1:
        differences.append(
            f"pictures are not padded to multiples of {recipe.detector.pads_to} pixels"
        )
    if recipe.detector.soft_nms is not None:
        differences.append("post-processing has no soft-NMS")
    return differences
