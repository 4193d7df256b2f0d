"""Co-DETR, Eq. 9 to 12: how much the heads that share an encoder disagree about where to look.

Each head's class activation map says where; two heads are compared by the Kullback-Leibler
divergence of their maps, taken as distributions over the pixels of an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from detrellis.analysis.activation_maps import Cam, activation_map, activations
from detrellis.analysis.figures import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    Axes,
    Figure,
    canvas,
    heading,
    run_rows,
    tidy,
)
from detrellis.analysis.outputs import batches, check_finite
from detrellis.analysis.pictures import Picture, outline, picture
from detrellis.analysis.runs import ComparedRuns, Result, RunResult, add_run, as_json, run_table
from detrellis.analysis.schemes import DECODER, check_alone, check_collaborative, load_with_scheme
from detrellis.arguments import checked
from detrellis.data.batch import Batch
from detrellis.engine.console import number
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.training import TrainableDetector

# Added to each pixel of a map whose maximum is 1: what a place that a head ignores counts as
EPS = 1e-3
IMAGES = 2  # that are drawn with their maps


def conflict_matrix(cams: Tensor, eps: float = 1e-8) -> Tensor:
    """Eq. 11: entry (i, j) is the mean over images of KL(i || j).

    `cams (H, I, h, w)` of H heads on I images, none negative, to `(H, H)`. `eps` is added before
    each map is divided by its sum: KL is infinite where the second map is 0.
    """
    maps = cams.flatten(2) + eps
    maps = maps / maps.sum(-1, keepdim=True)  # (H, I, h * w) distributions
    logs = maps.log()
    rows = [(p * (log - logs)).sum(-1).mean(-1) for p, log in zip(maps, logs, strict=True)]
    return torch.stack(rows)


def head_conflict(matrix: Tensor) -> Tensor:
    """Eq. 12: each head's mean divergence from the others and of the others from it,
    `(H, H)` to `(H,)`; H >= 2.
    """
    heads = len(matrix)
    assert heads > 1, "a head alone has no conflict"
    both = matrix + matrix.T
    return (both.sum(1) - both.diagonal()) / (2 * (heads - 1))


class MappedImage(NamedTuple):
    """An image to be drawn with each head's map."""

    picture: Picture
    maps: NDArray[np.float32]  # (H, h, w), each with a maximum of 1


@dataclass(frozen=True)
class RunConflicts(RunResult):
    """The conflicts within one run. `H` heads:
    the decoder, then the branches in the recipe's order.
    """

    heads: tuple[str, ...]
    images: int  # that count
    empty: int  # images left out, because there is no object
    flat: int  # images left out, because a head's map is 0 everywhere
    # (H, H) mean divergences of the row's map from the column's
    matrix: tuple[tuple[float, ...], ...]
    examples: tuple[MappedImage, ...]

    @property
    def conflicts(self) -> tuple[float, ...]:
        """Eq. 12: of each head with all others."""
        return tuple(head_conflict(torch.tensor(self.matrix)).tolist())

    @property
    def distance(self) -> float:
        """Fig. 6: the mean over the branches of their conflict with each other,
        or where there is one branch with the decoder."""
        matrix = torch.tensor(self.matrix)
        return float(head_conflict(matrix[1:, 1:] if len(matrix) > 2 else matrix).mean())

    def to_dict(self) -> dict[str, Any]:
        values = {
            k: getattr(self, k)
            for k in ("name", "run", "data", "images", "empty", "flat", "distance")
        }
        conflicts = dict(zip(self.heads, self.conflicts, strict=True))
        return values | {
            "heads": list(self.heads),
            "matrix": as_json(self.matrix),
            "conflicts": conflicts,
        }


@dataclass(frozen=True)
class ConflictsResult(Result):
    """The conflicts within several runs."""

    name = "conflicts"
    runs: tuple[RunConflicts, ...]
    cam: Cam
    eps: float
    split: str

    def table(self) -> Table:
        """For each run, a row for each head, for a rich console."""
        caption = (
            "Mean divergence (KL) of the map of where a head looks from the others' maps, of "
            "theirs from its own, and S, the mean of both; over the images that have an object "
            "and a map of each head. Distance: S of the branches among themselves, or where "
            "there is one, of it and the decoder."
        )
        columns = ("images", "left\nout", "distance", "head", "from\nothers", "of\nothers", "S")
        table = run_table(
            "Conflicts between heads (Co-DETR, Eq. 11 and 12)", caption, *columns, left=("head",)
        )
        for run in self.runs:
            first_row = (run.name, str(run.images), str(run.empty + run.flat), number(run.distance))
            others = len(run.heads) - 1
            for i, (head, conflict) in enumerate(zip(run.heads, run.conflicts, strict=True)):
                name, *counts = first_row if i == 0 else [""] * len(first_row)
                away = sum(run.matrix[i]) / others
                towards = sum(row[i] for row in run.matrix) / others
                values = [number(x) for x in (away, towards, conflict)]
                add_run(table, name, *counts, head, *values, end_section=i == others)
        return table


@checked
def analyze(runs: ComparedRuns, *, cam: Cam = "gradcam", eps: float = EPS) -> ConflictsResult:
    """Measure how much the heads that share an encoder disagree about where to look.

    `cam` is how maps are made (see `activation_maps.py`), `eps` is added to each pixel of a map
    whose maximum is 1. Raises `UserError` for a run without branches or without its
    `last.state.pt`, under torchrun, and where no image has an object that every head finds.
    """
    if not 0 < eps < 1:
        raise UserError(f"eps {eps:g}", "Give a number above 0 and below 1.")
    return ConflictsResult(
        runs.measure(partial(_measure, cam, eps), check_collaborative), cam, eps, runs.split
    )


def _measure(cam: Cam, eps: float, opened: OpenedSplit, name: str, show: bool) -> RunConflicts:
    check_alone()
    matrices: list[Tensor] = []
    examples: list[MappedImage] = []
    flat = 0
    model, co = load_with_scheme(opened, Collaborative)
    for batch, image, maps in _maps(opened, model.requires_grad_(False), co, cam, show):
        if not maps.flatten(1).any(1).all():
            flat += 1
            continue
        matrices.append(conflict_matrix(maps.unsqueeze(1), eps).cpu())
        if len(examples) < IMAGES:
            examples.append(
                MappedImage(
                    picture(batch, image, opened.model.normalise), maps.float().cpu().numpy()
                )
            )
    if not matrices:
        where = f"{opened.files}: no image with an object that every head finds"
        raise UserError(where, "Take another --split or --data, or train longer.")
    return RunConflicts(
        name=name,
        run=opened.run,
        data=opened.files,
        heads=(DECODER, *co.named),
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
        for i, count in enumerate(batch.targets.sizes):
            if count:
                yield (
                    batch,
                    i,
                    torch.stack([activation_map(tokens[i], memory, i) for tokens in cams.values()]),
                )


# The figure
# Inches: width of the matrix and the bars, of a picture; height of a run
VALUES, CELL, HEIGHT = 7.6, 2.1, 3.9


def draw(result: ConflictsResult) -> Figure:
    """The runs below each other, on one scale, with some maps.
    Raises `UserError` where matplotlib is missing.
    """
    runs = result.runs
    columns = max(1 + len(run.heads) for run in runs)
    figure = canvas(VALUES + CELL * columns, HEIGHT * len(runs) + 0.5, "Conflicts between heads")
    highest = max(max(row) for run in runs for row in run.matrix)
    tallest = max(max(run.conflicts) for run in runs)
    distances = [f"distance {run.distance:.2f} (mean of {run.images:,} images)" for run in runs]
    for run, part in zip(runs, run_rows(figure, runs, distances), strict=True):
        halves = part.subfigures(1, 2, width_ratios=[VALUES, CELL * columns], squeeze=False)
        values, pictures = halves.flatten().tolist()
        left, right = values.subplots(1, 2, width_ratios=[1.15, 1])
        _matrix(left, run, highest)
        _bars(right, run, tallest)
        _examples(pictures, run, columns)
    return figure


def _matrix(axes: Axes, run: RunConflicts, highest: float) -> None:
    """Fig. 8 and 9."""
    axes.imshow(run.matrix, cmap="Blues", vmin=0, vmax=highest)
    places = range(len(run.heads))
    axes.set_xticks(places, run.heads, rotation=45 if len(run.heads) > 3 else 0, fontsize=9)
    axes.set_yticks(places, run.heads, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for i, j in np.ndindex(len(run.heads), len(run.heads)):
        value = run.matrix[i][j]
        colour = "white" if value > 0.6 * highest else INK
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    heading(axes, "KL of the row's map from the column's")


def _bars(axes: Axes, run: RunConflicts, tallest: float) -> None:
    """Eq. 12."""
    tidy(axes)
    colours = [ORANGE, *[BLUE] * (len(run.heads) - 1)]
    bars = axes.bar(run.heads, run.conflicts, color=colours, width=0.65)
    axes.bar_label(bars, [f"{v:.2f}" for v in run.conflicts], fontsize=8, padding=2)
    axes.set_xticks(
        range(len(run.heads)), run.heads, rotation=45 if len(run.heads) > 3 else 0, fontsize=9
    )
    axes.set_ylim(0, 1.1 * tallest)
    heading(axes, "conflict S of each head with the others")


def _examples(part: Any, run: RunConflicts, columns: int) -> None:
    """A row an image: itself, and each head's map."""
    grid = part.subplots(len(run.examples), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, example in zip(grid, run.examples, strict=True):
        _example(line, example)
    for axes, title in zip(grid[0], ("image", *run.heads), strict=False):
        axes.set_title(title, fontsize=9, color=FAINT)


def _example(line: Any, example: MappedImage) -> None:
    height, width = example.picture.pixels.shape[:2]
    line[0].imshow(example.picture.pixels)
    outline(line[0], example.picture)
    for axes, heat in zip(line[1:], example.maps, strict=False):
        # In pixels of the image, whose boxes are drawn over it.
        axes.imshow(
            heat, cmap="magma", vmin=0, vmax=1, extent=(-0.5, width - 0.5, height - 0.5, -0.5)
        )
        outline(axes, example.picture)
