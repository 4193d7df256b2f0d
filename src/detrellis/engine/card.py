"""What a weights file says of itself, as JSON that anybody may have written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from detrellis.data.classes import ClassMap
from detrellis.data.findings import SkipBad
from detrellis.errors import UserError, cut, first_line
from detrellis.recipes.config import Recipe
from detrellis.recipes.migrate import FORMAT, read_recipe
from detrellis.version import __version__

OTHER_COPY = "Take another copy of the file."


@dataclass(frozen=True)
class Card:
    """Where weights come from: what is needed to rebuild the detector and to name its classes."""

    recipe: Recipe
    classes: ClassMap
    data: Mapping[str, Any]  # the run's `DataSource`, as `to_dict` gives it
    seed: int = 0
    skip_bad: SkipBad = False  # whether bad records were left out of the data
    epoch: int = 0
    step: int = 0  # optimizer steps done
    stats: Mapping[str, float | None] | None = None  # evaluation of these weights
    weights: str | None = None  # where the run started from, if not from the recipe's own
    # Where its backbone's pretrained weights came from, if it started from any
    backbone: str | None = None
    boxes: str | None = None  # where its reference boxes started from, if they came alone
    # What was set when the run was resumed: epoch, step, and what
    changes: Sequence[Mapping[str, Any]] = ()
    version: str = __version__

    def to_metadata(self) -> dict[str, str]:
        """The card as safetensors stores it: strings only."""
        stats = None if self.stats is None else dict(self.stats)
        card = {
            **vars(self),
            "recipe": self.recipe.model_dump(mode="json"),
            "classes": self.classes.to_dict(),
        }
        card |= {
            "data": dict(self.data),
            "stats": stats,
            "changes": [dict(change) for change in self.changes],
        }
        return {"format": str(FORMAT), "detrellis": json.dumps(card)}

    def settings(self) -> dict[str, Any]:
        """What is trained, as JSON holds it, without a path of this machine:
        what trackers are told.
        """
        recipe = self.recipe.untrained().model_dump(mode="json")
        return {"recipe": recipe, "seed": self.seed, "version": self.version}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, path: Path) -> Card:
        """The inverse of `to_metadata`;
        `UserError` where the file is not one of ours, or of a newer version.
        """
        if not isinstance(metadata, Mapping) or "detrellis" not in metadata:
            raise UserError(
                f"{path}: weights without a Detrellis card",
                "Give a run's folder or a file from one, a Hugging Face folder, or a "
                "reference's .pth.",
            )
        text, version = metadata["detrellis"], ""
        try:
            written = int(metadata.get("format", 0))
            newer = written > FORMAT
            card = json.loads(text)
            version = str(card.get("version", ""))
            if not newer:
                recipe = read_recipe(card.pop("recipe"), written)
                classes = ClassMap.from_dict(card.pop("classes"))
                return _types().validate_python(vars(cls(recipe, classes, **card)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            newer = _version_numbers(version) > _version_numbers(__version__)
            # Of a version whose fields or ranges were others
            if not newer and isinstance(error, UserError):
                raise UserError(
                    f"{path}: its recipe does not fit this Detrellis: {error.message}",
                    error.remedy or OTHER_COPY,
                ) from None
            if not newer:
                raise UserError(
                    f"{path}: its card cannot be read ({_misread(error)})", OTHER_COPY
                ) from None
        by = f" ({version})" if version else ""
        raise UserError(
            f"{path}: written by a newer Detrellis{by}; this is {__version__}",
            "Update Detrellis to read it.",
        )


@cache
def _types() -> TypeAdapter[Card]:
    """What checks the types of a card's fields: anybody may have written it."""
    return TypeAdapter(Card)


def _misread(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return cut(first_line(error))
    wrong = error.errors()[0]
    return cut(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}")


def _version_numbers(version: str) -> list[int]:
    """The numbers of a version such as "0.2.0", by which versions are ordered."""
    return [int(part) for part in re.findall(r"\d+", version)[:3]]
