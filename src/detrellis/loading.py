"""Loading what is trained: a run, weights or somebody else's checkpoint;
and the split that it is evaluated on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from detrellis.arguments import Classes, checked
from detrellis.data.annotations import Annotations
from detrellis.data.batch import Batch
from detrellis.data.classes import ClassMap
from detrellis.data.doctor.check import prepare_split
from detrellis.data.loader import Loader
from detrellis.distributed import World, pick_device
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import fill, find_weights, load_weights
from detrellis.engine.console import track
from detrellis.engine.evaluate import EvalOptions, eval_loader, evaluated_split
from detrellis.engine.views import View
from detrellis.errors import UserError
from detrellis.exported import OPENERS, ExportedDetector, load_exported
from detrellis.interop.convert import load_any
from detrellis.interop.load import is_foreign
from detrellis.precision import check_bfloat16
from detrellis.predictions.model import Model
from detrellis.recipes import find_recipe
from detrellis.recipes.build import build, build_untrained


@checked
def load(
    source: str | Path,
    *,
    classes: ClassMap | Classes | None = None,
    device: str | None = None,
    half: bool = False,
) -> Model:
    """A trained detector from a run's folder or weights file, from an exported `.onnx` or `.xml`,
    from a Hugging Face folder, `hf:org/name` or a reference repository's `.pth`; or an untrained
    one from a recipe's name.

    `classes` is for a recipe only: the class map, or a number of classes (default 80). `half` lets
    it compute products in bfloat16, on a device that has it. Raises `UserError` for another device,
    and for an exported network, whose precision is its file's.
    """
    place, target = Path(source), pick_device(device)
    if half:
        check_bfloat16(target)
    if place.suffix in OPENERS and place.is_file():
        if half:
            raise UserError(
                f"{place}: an exported network has the precision of its file",
                "Leave half precision out, or export with --fp16.",
            )
        return exported_model(*load_exported(place), target)
    model = _in_torch(source, classes, target)
    model.detector.mixed = half
    return model


def _in_torch(source: str | Path, classes: ClassMap | int | None, target: torch.device) -> Model:
    """A trained detector that torch executes, as `load` gives it."""
    place = Path(source)
    if place.exists() or is_foreign(source):
        file = place if is_foreign(source) else find_weights(place)
        weights, card = load_any(source) if is_foreign(source) else load_weights(file)
        detector = fill(build_untrained(card.recipe, len(card.classes)), weights, file)
        return Model(
            detector.to(target).eval(), card.recipe, card.classes, target, card.data or None
        )
    if len(place.parts) > 1:
        raise UserError(
            f"{place}: no such run", "Give a run, a weights file, hf:org/name, or a recipe's name."
        )
    recipe = find_recipe(str(source))
    if not isinstance(classes, ClassMap):
        count = 80 if classes is None else classes
        classes = ClassMap(tuple(range(count)), tuple(f"class {i}" for i in range(count)))
    return Model(build(recipe, len(classes)).detector.to(target).eval(), recipe, classes, target)


def exported_model(network: ExportedDetector, card: Card, device: torch.device) -> Model:
    """An exported network that predicts, and its card, as `load` gives them."""
    return Model(network.to(device).eval(), card.recipe, card.classes, device, card.data or None)


def trained(run: str | Path) -> str | Path:
    """The weights file of a run, or somebody else's checkpoint as it was named. Raises `UserError`
    for a recipe's name: it would predict with random weights."""
    return run if is_foreign(run) else find_weights(Path(run))


def load_trained(run: str | Path, device: str | None, half: bool = False) -> Model:
    """As `load`, of what is `trained` alone."""
    return load(trained(run), device=device, half=half)


class OpenedSplit(NamedTuple):
    """A trained detector, and those images of a split that this process evaluates it on."""

    run: str
    model: Model
    annotations: Annotations
    loader: Loader
    files: str  # where the annotations come from

    def seen(
        self, options: EvalOptions, world: World, progress: bool, view: View
    ) -> Iterator[Batch]:
        """Those images again, in another view."""
        data = self.model.recipe.data
        loader = eval_loader(
            self.annotations, data, options.batch_size, options.workers, world, view
        )
        with contextlib.closing(loader):
            yield from track(loader, "evaluate a view", len(loader), progress)


@contextlib.contextmanager
def open_split(
    run: str | Path,
    world: World,
    options: EvalOptions | None = None,
    model: Model | None = None,
    half: bool = False,
) -> Iterator[OpenedSplit]:
    """Load a run (where it is not the `model` already) and what it is evaluated on;
    the loader's workers end with the context.
    """
    options = options or EvalOptions()
    model = model or load_trained(run, str(world.device), half)
    source, split = evaluated_split(run, model.data, options)
    annotations, _ = prepare_split(source, split, model.classes, options.skip_bad)
    loader = eval_loader(annotations, model.recipe.data, options.batch_size, options.workers, world)
    with contextlib.closing(loader):
        yield OpenedSplit(
            str(run), model, annotations, loader, str(source.splits[split].annotations)
        )
