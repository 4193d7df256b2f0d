"""Co-DETR, Eq. 9 to 12: how much the heads that share an encoder disagree about where to look.

Each head's class activation map says where; two heads are compared by the Kullback-Leibler divergence of their maps,
taken as distributions over the pixels of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detrellis.analysis.activation_maps import Cam, activation_map, activations
from detrellis.analysis.collaborative import DECODER, check_alone, check_collaborative
from detrellis.analysis.figures import OfRun, Result, sheet
from detrellis.analysis.outputs import batches, check_finite, each_run, split_name
from detrellis.analysis.pictures import Picture, picture
from detrellis.analysis.schemes import load_trained
from detrellis.arguments import checked
from detrellis.data.loader import Batch
from detrellis.engine.console import number
from detrellis.engine.evaluate import EvalOptions
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.training import TrainableDetector

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

EPS = 1e-3  # added to each pixel of a map whose maximum is 1: what a place that a head ignores counts as
IMAGES = 2  # that are drawn with their maps


def conflict_matrix(cams: Tensor, eps: float = 1e-8) -> Tensor:
    """Eq. 11: entry (i, j) is the mean over images of KL(i || j).

    `cams (H, I, h, w)` of H heads on I images, none negative, to `(H, H)`. `eps` is added before each map is divided by
    its sum: KL is infinite where the second map is 0.
    """
    shares = cams.flatten(2) + eps
    shares = shares / shares.sum(-1, keepdim=True)  # (H, I, h * w)
    logs = shares.log()
    rows = [(own * (log - logs)).sum(-1).mean(-1) for own, log in zip(shares, logs, strict=True)]
    return torch.stack(rows)


def head_conflict(matrix: Tensor) -> Tensor:
    """Eq. 12: each head's mean divergence from the others and of the others from it, `(H, H)` to `(H,)`; H >= 2."""
    heads = len(matrix)
    assert heads > 1, "a head alone has no conflict"
    both = matrix + matrix.T
    return (both.sum(1) - both.diagonal()) / (2 * (heads - 1))


class Example(NamedTuple):
    """An image to be drawn with its maps."""

    picture: Picture
    maps: NDArray[np.float32]  # (H, h, w) of each head, with a maximum of 1


@dataclass(frozen=True)
class Measured(OfRun):
    """One run. `H` heads: the decoder, then the branches in the recipe's order."""

    heads: tuple[str, ...]
    images: int  # that count
    empty: int  # images left out, because there is no object
    flat: int  # images left out, because a head's map is 0 everywhere
    matrix: tuple[tuple[float, ...], ...]  # (H, H) mean divergences of the row's map from the column's
    examples: tuple[Example, ...]

    @property
    def conflicts(self) -> tuple[float, ...]:
        """Eq. 12: of each head with all others."""
        return tuple(head_conflict(torch.tensor(self.matrix)).tolist())

    @property
    def distance(self) -> float:
        """Fig. 6: the mean over the branches of their conflict with each other, or where there is one branch with the
        decoder."""
        matrix = torch.tensor(self.matrix)
        return float(head_conflict(matrix[1:, 1:] if len(matrix) > 2 else matrix).mean())

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; examples are in the figure only."""
        named = {k: getattr(self, k) for k in ("name", "run", "data", "images", "empty", "flat", "distance")}
        conflicts = dict(zip(self.heads, self.conflicts, strict=True))
        return named | {"heads": list(self.heads), "matrix": [list(r) for r in self.matrix], "conflicts": conflicts}


@dataclass(frozen=True)
class Comparison(Result):
    """Several runs, measured in the same way."""

    name = "conflicts"

    cam: Cam
    eps: float
    split: str
    runs: tuple[Measured, ...]

    def settings(self) -> dict[str, Any]:
        """What it was measured with."""
        return {"cam": self.cam, "eps": self.eps, "split": self.split}

    def table(self) -> Table:
        """For each run, a row for each head, for a rich console."""
        from rich.text import Text

        caption = (
            "Mean divergence (KL) of the map of where a head looks from the others' maps, of theirs from its own, and "
            "S, the mean of both; over the images that have an object and a map of each head. Distance: S of the "
            "branches among themselves, or where there is one, of it and the decoder."
        )
        table = sheet("Conflicts between heads (Co-DETR, Eq. 11 and 12)", caption)
        for column in ("images", "left\nout", "distance", "head", "from\nothers", "of\nothers", "S"):
            table.add_column(column, justify="left" if column == "head" else "right", no_wrap=True)
        for run in self.runs:
            counts = [str(run.images), str(run.empty + run.flat), number(run.distance)]
            others = len(run.heads) - 1
            for i, (head, conflict) in enumerate(zip(run.heads, run.conflicts, strict=True)):
                own = [run.name, *counts] if i == 0 else [""] * 4
                away, towards = sum(run.matrix[i]) / others, sum(row[i] for row in run.matrix) / others
                numbers = [number(x) for x in (away, towards, conflict)]
                # Text: a run may be called "[bold]"
                table.add_row(Text(own[0]), *own[1:], head, *numbers, end_section=i == others)
        return table

    def figure(self) -> Figure:
        """The matrices, each head's conflict, and some maps. Raises `UserError` without matplotlib."""
        from detrellis.analysis.conflicts_figure import draw

        return draw(self)


@checked
def analyze(
    runs: str | Path | Sequence[str | Path],
    *,
    cam: Cam = "gradcam",
    eps: float = EPS,
    names: Sequence[str] | None = None,
    device: str | None = None,
    progress: bool = False,
    **on: Unpack[EvalOptions],
) -> Comparison:
    """Measure one run or several, each on its own validation split or on what `on` says (see `engine/evaluate.py`).

    `cam` is how maps are made (see `activation_maps.py`), `eps` is added to each pixel of a map whose maximum is 1,
    `names` are what the runs are called (default: their folders). Raises `UserError` for a run without branches or
    without its `last.state.pt`, under torchrun, and where no image has an object that every head finds.
    """
    if not 0 < eps < 1:
        raise UserError(f"eps {eps:g}", "Give a number above 0 and below 1.")
    measured = each_run(runs, names, device, progress, on, partial(_measure, cam, eps), check_collaborative)
    return Comparison(cam, eps, split_name(on), measured)


def _measure(cam: Cam, eps: float, opened: OpenedSplit, name: str, show: bool) -> Measured:
    check_alone()
    matrices: list[Tensor] = []
    examples: list[Example] = []
    flat = 0
    model, co = load_trained(opened, Collaborative)
    for batch, image, maps in _maps(opened, model.requires_grad_(False), co, cam, show):
        if not maps.flatten(1).any(1).all():
            flat += 1
            continue
        matrices.append(conflict_matrix(maps.unsqueeze(1), eps).cpu())
        if len(examples) < IMAGES:
            examples.append(Example(picture(batch, image), maps.float().cpu().numpy()))
    if not matrices:
        where = f"{opened.files}: no image with an object that every head finds"
        raise UserError(where, "Take another --split or --data, or train longer.")
    return Measured(
        name=name,
        run=opened.run,
        data=opened.files,
        heads=(DECODER, *co.names),
        images=len(matrices),
        empty=len(opened.annotations) - flat - len(matrices),
        flat=flat,
        matrix=tuple(map(tuple, torch.stack(matrices).mean(0).tolist())),
        examples=tuple(examples),
    )


def _maps(
    opened: OpenedSplit, model: TrainableDetector, co: Collaborative, cam: Cam, show: bool
) -> Iterator[tuple[Batch, int, Tensor]]:
    """The maps `(H, h, w)` of each image with an object, by its batch and its place there."""
    for batch in batches(opened, show):
        if not len(batch.targets.labels):
            continue
        memory, cams = activations(model, co, batch, cam)
        check_finite(opened, *cams.values())
        for i in (i for i, count in enumerate(batch.targets.sizes) if count):
            yield batch, i, torch.stack([activation_map(tokens[i], memory, i) for tokens in cams.values()])
