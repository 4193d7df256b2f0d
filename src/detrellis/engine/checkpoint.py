"""What a run leaves behind.

| file in the run's folder | holds |
| --- | --- |
| `last.safetensors`, `best.safetensors` | the detector's weights with a `Card`: enough to rebuild and to name it |
| `last.state.pt` | everything that continuing needs: the trained modules, the optimizer, the average, the position |
| `metrics.jsonl` | the log |

Every file is written beside its place and moved there, so a crash leaves the old one whole. Nothing is ever unpickled
but plain tensors and containers (`weights_only`).
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import detrellis
from detrellis.data.classes import ClassMap
from detrellis.data.findings import SkipBad
from detrellis.errors import UserError
from detrellis.recipes.config import Recipe

FORMAT = 1


@dataclass(frozen=True)
class Card:
    """Where weights come from: what is needed to rebuild the detector and to name its classes."""

    recipe: Recipe
    classes: ClassMap
    data: Mapping[str, Any]  # the run's `DataSource`, as `to_dict` gives it
    seed: int = 0
    skip_bad: SkipBad = False  # whether bad records were left out of the data
    epoch: int = 0
    stats: Mapping[str, float | None] | None = None  # evaluation of these weights
    weights: str | None = None  # where the run started from, if not from the recipe's own
    boxes: str | None = None  # where its reference boxes started from, if they came alone
    version: str = detrellis.__version__

    def to_metadata(self) -> dict[str, str]:
        """As safetensors stores it: strings only."""
        card = {
            "recipe": self.recipe.model_dump(mode="json"),
            "classes": self.classes.to_dict(),
            "data": dict(self.data),
            "seed": self.seed,
            "skip_bad": self.skip_bad,
            "epoch": self.epoch,
            "stats": None if self.stats is None else dict(self.stats),
            "weights": self.weights,
            "boxes": self.boxes,
            "version": self.version,
        }
        return {"format": str(FORMAT), "detrellis": json.dumps(card)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, path: Path) -> Card:
        """The inverse; `UserError` where the file is not one of ours."""
        if not metadata or "detrellis" not in metadata:
            raise UserError(f"{path}: weights without a Detrellis card", "Give a run's folder or a file from one.")
        if int(metadata.get("format", 0)) > FORMAT:
            raise UserError(f"{path}: written by a newer Detrellis", "Update Detrellis.")
        card = json.loads(metadata["detrellis"])
        try:
            recipe = Recipe.checked(card.pop("recipe"))
        except UserError as error:  # of a version whose fields or ranges were others
            raise UserError(f"{path}: its recipe does not fit this Detrellis: {error.message}", error.remedy) from None
        return cls(recipe, ClassMap.from_dict(card.pop("classes")), **card)


def _atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write through a file beside `path`; readers see the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_weights(path: Path, weights: Mapping[str, Tensor], card: Card) -> None:
    """A detector's weights with their card."""
    plain = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    _atomically(path, lambda file: save_file(plain, file, card.to_metadata()))


def find_weights(place: Path) -> Path:
    """The weights of a run: the best ones, else the last; or the file itself."""
    if place.is_file():
        return place
    for name in ("best.safetensors", "last.safetensors"):
        if (place / name).is_file():
            return place / name
    what = "an empty run" if place.is_dir() else "no such folder or file"
    raise UserError(f"{place}: {what}", "Give the folder of a run, or a .safetensors file from one.")


def load_weights(place: Path) -> tuple[dict[str, Tensor], Card]:
    """Weights and card of a run's folder or of one file; a file that is broken gives one error and nothing else."""
    path = find_weights(place)
    try:
        with safe_open(path, framework="pt") as file:
            card = Card.from_metadata(file.metadata(), path)
            return {name: file.get_tensor(name) for name in file.keys()}, card  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: not a whole checkpoint ({error})", "Take another copy, or the run's other file."
        ) from None


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Everything that resuming needs."""
    _atomically(path, lambda file: torch.save(dict(state), file))


def load_state(run: Path) -> dict[str, Any]:
    """The state to resume `run` from, on the host."""
    path = run / "last.state.pt"
    if not path.is_file():
        raise UserError(f"{run}: nothing to resume: {path.name} is missing", "Give the folder of a started run.")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"{path}: not a whole checkpoint ({first})", "Its weights may still be whole: see eval."
        ) from None
    return state
