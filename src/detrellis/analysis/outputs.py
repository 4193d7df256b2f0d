"""What measurements read of a run:
its batches, and what its detector says about each image of a split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy
from detrellis.data.annotations import Annotations
from detrellis.data.batch import Batch
from detrellis.engine.console import track
from detrellis.engine.eval_result import Kind
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit
from detrellis.matching import Candidates, Hungarian, Match, assign
from detrellis.predictions.model import Model
from detrellis.supervision import Supervision
from detrellis.types import Assignment, DecoderOutput, Targets


def batches(opened: OpenedSplit, show: bool, what: str = "analyze") -> Iterator[Batch]:
    """This process's batches, on the model's device;
    `show` puts a progress bar, called `what`, on a terminal.
    """
    for batch in track(opened.loader, what, len(opened.loader), show):
        yield batch.to(opened.model.device, non_blocking=True)


def annotation_rows(opened: OpenedSplit) -> dict[int, int]:
    """The row of each image among the annotations, by its id."""
    return {int(image_id): row for row, image_id in enumerate(opened.annotations.image_ids)}


class ImageOutput(NamedTuple):
    """One image as a detector's last layer sees it, and its ground truth;
    on the host, boxes in float64.

    Boxes are pixel `xyxy` in the original image, as the evaluator compares them: the truth is the
    annotations' own, not what resizing and clipping leave of it.
    """

    image_id: int
    scores: Tensor  # (N, C) of all queries, as detections are ranked by
    boxes: Tensor  # (N, 4)
    labels: Tensor  # (n,) int64 class index of each ground-truth box; no crowd regions
    truth: Tensor  # (n, 4)


def kind_of_ap(model: Model) -> Kind:
    """Whose AP a detector is compared by: masks where its queries predict masks alone."""
    return "box" if model.recipe.detector.boxes else "mask"


def refuse_without_boxes(model: Model, run: str) -> None:
    """Raises `UserError` for a detector whose queries predict masks alone."""
    if not model.recipe.detector.boxes:
        raise UserError(
            f"{run}: its queries predict masks, and no boxes to measure",
            "Take a run of a box detector.",
        )


def image_outputs(opened: OpenedSplit, show: bool = False) -> Iterator[ImageOutput]:
    """Every image of this process, in the loader's order; `show` puts a progress bar on a terminal.

    Raises `UserError` where an output is not finite, or the detector predicts no boxes.
    """
    refuse_without_boxes(opened.model, opened.run)
    detector, rows = opened.model.detector, annotation_rows(opened)
    for batch in batches(opened, show):
        with torch.no_grad():
            output = detector(batch.images)
            scores = detector.postprocess.scores(output).cpu()
            boxes = output.boxes[-1].cpu().double()
        check_finite(opened, scores, boxes)
        pixels = cxcywh_to_xyxy(boxes) * batch.sizes.cpu().flip(-1).repeat(1, 2)[:, None]
        for image_id, image_scores, image_boxes in zip(
            batch.image_ids, scores, pixels, strict=True
        ):
            yield ImageOutput(
                image_id, image_scores, image_boxes, *truth(opened.annotations, rows[image_id])
            )


def check_finite(opened: OpenedSplit, *values: Tensor) -> None:
    """Raises `UserError` where a value is NaN or infinite: it could not be ranked."""
    if not all(v.isfinite().all() for v in values):
        raise UserError(
            f"{opened.run}: its outputs are not finite",
            "Its training went wrong: take other weights.",
        )


def one_to_one(
    supervision: Supervision, output: DecoderOutput, targets: Targets, copies: int = 1
) -> Assignment:
    """Hungarian matching by the recipe's cost, at each layer and in each copy; one query a target,
    however the run was trained, so that runs can be compared."""
    hungarian = supervision.assign
    assert isinstance(hungarian, Hungarian)
    (assignment,) = assign(
        [Match(output, targets, replace(hungarian, candidates=Candidates()), copies)]
    )
    return assignment


def last_layer(output: DecoderOutput) -> DecoderOutput:
    """The output `(1, B, N, ...)` of the last of its layers."""
    return output.map(lambda t: t[-1:])


def truth(annotations: Annotations, row: int) -> tuple[Tensor, Tensor]:
    """Labels `(n,)` and pixel `xyxy` boxes `(n, 4)` of an image, without its crowd regions."""
    rows = slice(annotations.starts[row], annotations.starts[row + 1])
    kept = ~annotations.crowd[rows]
    corner, size = torch.from_numpy(annotations.boxes[rows][kept]).split(2, dim=1)
    return torch.from_numpy(annotations.labels[rows][kept]), torch.cat([corner, corner + size], 1)
