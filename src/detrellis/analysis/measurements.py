"""The measurements of the papers, each a module that measures and draws, in one tuple."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from detrellis.analysis import (
    attention,
    branches,
    conflicts,
    discriminability,
    groups,
    instability,
    misalignment,
    one_to_many,
    query_distance,
)
from detrellis.analysis.figures import DPI, Figure, need_matplotlib
from detrellis.analysis.runs import Result
from detrellis.outputs import Outputs


@dataclass(frozen=True)
class Measurement:
    """How something is measured and drawn:
    `analyze(runs, **dials)` takes `ComparedRuns`, `draw` what it returns.
    """

    result: type[Result]
    analyze: Callable[..., Result]
    draw: Callable[[Any], Figure]


MEASUREMENTS = (
    Measurement(misalignment.MisalignmentResult, misalignment.analyze, misalignment.draw),
    Measurement(groups.GroupsResult, groups.analyze, groups.draw),
    Measurement(one_to_many.OneToManyResult, one_to_many.analyze, one_to_many.draw),
    Measurement(
        discriminability.DiscriminabilityResult, discriminability.analyze, discriminability.draw
    ),
    Measurement(instability.InstabilityResult, instability.analyze, instability.draw),
    Measurement(branches.BranchesResult, branches.analyze, branches.draw),
    Measurement(conflicts.ConflictsResult, conflicts.analyze, conflicts.draw),
    Measurement(query_distance.QueryDistanceResult, query_distance.analyze, query_distance.draw),
    Measurement(attention.AttentionResult, attention.analyze, attention.draw),
)


def measurement(name: str) -> Measurement:
    """The one of this name, as its files have it."""
    (named,) = (m for m in MEASUREMENTS if m.result.name == name)
    return named


class SavedFiles(NamedTuple):
    """What `save` wrote."""

    figure: Path  # PNG
    values: Path  # JSON


def ready(out: Path, name: str, inputs: Iterable[Path] = ()) -> None:
    """Raises `UserError` where the figure of measurement `name` could not be drawn, or not be
    written without losing something, such as one of the `inputs`: to ask before minutes of
    measuring."""
    need_matplotlib()
    Outputs(out).ready((f"{name}.png", f"{name}.json"), inputs)


def save(result: Result, out: str | Path) -> SavedFiles:
    """Write `OUT/NAME.png` and `OUT/NAME.json`, over those of an earlier measurement only.

    Raises `UserError` where matplotlib is missing, or another file would be written over.
    """
    ready(Path(out), result.name)
    outputs, picture = Outputs(out), io.BytesIO()
    measurement(result.name).draw(result).savefig(picture, format="png", dpi=DPI)
    figure = outputs.write(f"{result.name}.png", picture.getvalue())
    return SavedFiles(
        figure, outputs.write(f"{result.name}.json", json.dumps(result.to_dict(), indent=1))
    )
