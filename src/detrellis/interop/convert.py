"""`detrellis convert`: a checkpoint from one format to the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from detrellis.arguments import checked
from detrellis.data.classes import ClassMap
from detrellis.data.formats.coco import load_json
from detrellis.engine.checkpoint import Card, load_whole, save_weights
from detrellis.errors import UserError
from detrellis.interop.files import HUB
from detrellis.interop.load import is_foreign, load_foreign
from detrellis.interop.save import save_huggingface
from detrellis.outputs import Outputs

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
    """Weights and card of a run, of a weights file, or of anybody else's checkpoint: all that its recipe needs."""
    if not is_foreign(place):
        return load_whole(Path(place))
    found = load_foreign(place)
    return dict(found.weights), Card(found.recipe, found.classes, {}, weights=str(place))


@checked
def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Format | None = None,
    classes: str | Path | ClassMap | None = None,
    dilation: bool = False,
) -> Conversion:
    """Write `source` in the other format: a foreign checkpoint as a run's weights, ours as a Hugging Face folder.

    `to` forces a format. `classes`: a COCO file that names the classes of a source that does not. `dilation`: a `.pth`
    file is of a DC5 model, which its tensors do not tell.
    """
    foreign, folder = is_foreign(source), Path(out)
    target: Format = to or ("detrellis" if foreign else "hf")
    outputs = Outputs(folder, "folder")
    outputs.alone([] if str(source).startswith(HUB) else [source])
    named = None if classes is None else classes if isinstance(classes, ClassMap) else read_classes(Path(classes))
    if named is not None and not foreign:
        raise UserError(f"{source}: its classes are known", "Leave --classes out.")
    skipped: tuple[str, ...] = ()
    if foreign:
        found = load_foreign(source, classes=named, dilation=dilation)
        weights, card = dict(found.weights), Card(found.recipe, found.classes, {}, weights=str(source))
        skipped = _kinds(found.skipped)
    else:
        weights, card = load_whole(Path(source))
    outputs.clear()
    differences: list[str] = []
    if target == "hf":
        differences = save_huggingface(folder, weights, card.recipe, card.classes)
    else:
        save_weights(folder / WEIGHTS, weights, card)
    outputs.note()
    parameters = sum(w.numel() for w in weights.values())
    return Conversion(folder, target, card.recipe.name, parameters, len(card.classes), skipped, tuple(differences))


def _kinds(names: tuple[str, ...]) -> tuple[str, ...]:
    """Their first parts, counted."""
    return tuple(f"{kind} ({count})" for kind, count in Counter(n.split(".")[0] for n in names).items())


def read_classes(path: Path) -> ClassMap:
    """The classes of a COCO file."""
    content = load_json(path)
    try:
        return ClassMap.from_categories(content["categories"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: no COCO categories ({error})", "Give an annotation file.") from None
