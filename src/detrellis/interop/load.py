"""From anybody's checkpoint to a detector of ours:
weights, recipe and classes. Nothing is ever half-loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detrellis.data.classes import ClassMap
from detrellis.engine.card import OTHER_COPY
from detrellis.errors import UserError, cut, first_line
from detrellis.interop import huggingface, mask2former
from detrellis.interop.coco import COCO_IDS, COCO_NAMES
from detrellis.interop.files import (
    HUB,
    fetch,
    read_config,
    read_folder,
    read_pickle,
    read_pth,
    read_safetensors,
)
from detrellis.interop.links import Link, Pair, link_up, missing, to_ours, unused
from detrellis.interop.lwdetr import RF_PROCESSOR
from detrellis.interop.reference import REPEATED
from detrellis.interop.repositories import repository_of
from detrellis.recipes.config import Recipe
from detrellis.recipes.network import build_detector

# What reading tables, sizes and names raises where another kind of value stands than any checkpoint
# has.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
# A recipe's `data`, and a processor's names
STATISTICS = {"mean": "image_mean", "std": "image_std"}


@dataclass(frozen=True)
class Converted:
    """A checkpoint in our names."""

    weights: Mapping[str, Tensor]
    recipe: Recipe
    classes: ClassMap
    skipped: tuple[str, ...]  # their tensors that a detector has no use for


def is_foreign(place: str | Path) -> bool:
    """Whether `place` is somebody else's checkpoint: `hf:org/name`, a folder with `config.json` or
    the `model.safetensors` in it, a `.pth` file, or detectron2's `.pkl`."""
    text = str(place)
    path = Path(text)
    if text.startswith(HUB) or path.suffix in (".pth", ".pt", ".bin", ".pkl"):
        return True
    folder = path if path.is_dir() else path.parent
    return (path.is_dir() or path.name == "model.safetensors") and (
        folder / "config.json"
    ).is_file()


def load_foreign(
    place: str | Path, *, classes: ClassMap | None = None, dilation: bool = False
) -> Converted:
    """Read a Hugging Face folder, `hf:org/name`, or a reference repository's `.pth` or `.pkl`.

    `classes` names the classes of a file that does not (default: COCO's where there are 91 or 80);
    `dilation` says that a `.pth` file is of a DC5 model. Raises `UserError`, naming the file, for
    whatever does not fit.
    """
    text = str(place)
    path = fetch(text.removeprefix(HUB)) if text.startswith(HUB) else Path(text)
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder",
            f"Give {HUB}org/name, a folder with config.json, or a file.",
        )
    try:
        if path.is_dir() or path.name == "model.safetensors":
            return _from_huggingface(path if path.is_dir() else path.parent, classes)
        return _from_reference(path, classes, dilation)
    except UserError as error:
        message = error.message if str(path) in error.message else f"{path}: {error.message}"
        raise UserError(message, error.remedy or OTHER_COPY) from error.__cause__


@contextmanager
def _reading() -> Iterator[None]:
    """While a file's content is read, and nothing of ours is built:
    what goes wrong then is the content's fault.

    Any value in it may be of another kind or size; to ask each before it is used would double the
    readers.
    """
    try:
        yield
    except UserError:
        raise
    except MALFORMED as error:
        what = f"its content is malformed ({type(error).__name__}: {cut(first_line(error))})"
        raise UserError(what, OTHER_COPY) from error


def _from_huggingface(folder: Path, classes: ClassMap | None) -> Converted:
    with _reading():
        config = read_config(folder / "config.json")
        recipe = with_processor(huggingface.recipe_of(config), folder / "preprocessor_config.json")
        labels = _labels(config)
        family = huggingface.FAMILIES[huggingface.kind_of(config)]
        weights, rows = family.loaded(read_folder(folder), recipe.detector, config)
    named = labels if classes is None else _fitting(classes, len(labels))
    return _convert(weights, rows, recipe, named)


def _labels(config: Mapping[str, Any]) -> ClassMap:
    """The file's `id2label`: their label index is our class index,
    and the id unless we saved the file.
    """
    given = config.get("id2label") or {
        i: f"LABEL_{i}" for i in range(int(config.get("num_labels", 2)))
    }
    labels = {int(i): str(name) for i, name in given.items()}
    if sorted(labels) != list(range(len(labels))):
        raise UserError("config.json: id2label does not count from 0")
    ids = config.get("detrellis_category_ids", range(len(labels)))
    return ClassMap(tuple(int(i) for i in ids), tuple(labels[i] for i in range(len(labels))))


def with_processor(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with image size, mean and std of a `preprocessor_config.json`;
    without one, DETR's.
    """
    recipe = recipe.replace(data=recipe.data.replace(exact_long=True))
    if not path.is_file():
        return recipe
    config = read_config(path)
    known: dict[str, Any] = {
        ours: tuple(map(float, config[theirs]))
        for ours, theirs in STATISTICS.items()
        if config.get(theirs)
    }
    if config.get("do_normalize") is False:
        known = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if config.get("image_processor_type") == RF_PROCESSOR:
        known["antialias"] = False
    recipe = recipe.replace(data=recipe.data.replace(**known))
    size = config.get("size", {})
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if "shortest_edge" in size:
        update = {
            "size": int(size["shortest_edge"]),
            "max_side": size.get("longest_edge"),
            "keep_aspect": True,
        }
        update |= {"augment": "detr", "zoom": None}
    elif "max_height" in size:
        update = {"size": (int(size["max_height"]), int(size["max_width"])), "keep_aspect": True}
    elif "height" in size:
        update = {"size": (int(size["height"]), int(size["width"])), "keep_aspect": False}
    else:
        return recipe
    if not isinstance(update["size"], int) and recipe.data.augment == "detr":
        update["augment"] = "fixed"
    return recipe.replace(data=recipe.data.replace(**update))


def _from_reference(path: Path, classes: ClassMap | None, dilation: bool) -> Converted:
    plain = {".safetensors": read_safetensors, ".pkl": read_pickle}.get(path.suffix)
    weights, arguments = read_pth(path) if plain is None else (plain(path), {})
    repository = repository_of(weights)
    with _reading():
        try:
            recipe = repository.recipe_of(weights, {"dilation": dilation} | arguments)
            count = repository.class_count(weights, recipe.detector)
        except KeyError as error:  # a tensor whose shape tells a size
            raise UserError(
                f"{error.args[0]} is missing", "The file is not complete, or of another model."
            ) from None
        given, names = repository.loaded(weights, recipe.detector)
    named = _numbered(count) if classes is None else _fitting(classes, count)
    return _convert(given, names, recipe, named)


def _fitting(classes: ClassMap, count: int) -> ClassMap:
    """`classes` for `count` rows:
    one each, or the rows are the data set's own ids and some stand for nothing.
    """
    if len(classes) == count:
        return classes
    if classes.ids and classes.ids[-1] < count and classes.ids[0] >= 0:
        names = dict(zip(classes.ids, classes.names, strict=True))
        return ClassMap(tuple(range(count)), tuple(names.get(i, f"N/A {i}") for i in range(count)))
    raise UserError(f"{len(classes)} classes are named, the weights have {count}")


def _numbered(count: int) -> ClassMap:
    """Classes of a file that names none: COCO's where it has as many, else numbers."""
    if count == 91:  # raw COCO ids
        return _fitting(ClassMap(COCO_IDS, COCO_NAMES), 91)
    if count == 80:
        return ClassMap(COCO_IDS, COCO_NAMES)
    return ClassMap(tuple(range(count)), tuple(f"class {i}" for i in range(count)))


def _convert(
    weights: Mapping[str, Tensor], table: list[Pair], recipe: Recipe, classes: ClassMap
) -> Converted:
    with torch.device("meta"):
        detector = build_detector(recipe.detector, len(classes))
    state = detector.state_dict()
    links: list[Link] = link_up(state, table, recipe.detector.decoder.layers)
    assert not (left := missing(state, links)), f"no table names {left[0]}"
    shapes = {name: value.shape for name, value in state.items()}
    with _reading():
        if recipe.detector.boxes:
            converted = to_ours(weights, links, shapes)
        else:
            converted = mask2former.turned(
                to_ours(mask2former.as_linear(weights), links, shapes), recipe.detector
            )
        floats = {name: value.float() for name, value in converted.items()}
        if bad := [name for name, value in floats.items() if not value.isfinite().all()]:
            raise UserError(
                f"{bad[0]} holds values that are not finite", "Take another copy of the file."
            )
    # Steps that BatchNorm has seen, which not every file counts.
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    floats |= {name: torch.tensor(0) for name in counters}
    skipped = [n for n in unused(weights, links) if not REPEATED.match(n)]
    return Converted(floats, recipe, classes, tuple(skipped))
