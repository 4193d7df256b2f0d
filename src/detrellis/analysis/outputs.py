"""What measurements begin with: runs with short names, and what each says about the images of a split."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy
from detrellis.data.annotations import Annotations
from detrellis.data.loader import Batch
from detrellis.distributed import process_group
from detrellis.engine.console import track
from detrellis.engine.evaluate import EvalOptions
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit, open_split
from detrellis.matching import Candidates, Hungarian, Match, assign
from detrellis.supervision import Supervision
from detrellis.types import Assignment, DecoderOutput, Targets

Found = TypeVar("Found")


def each_run(
    runs: str | Path | Sequence[str | Path],
    names: Sequence[str] | None,
    device: str | None,
    progress: bool,
    on: EvalOptions,
    measure: Callable[[OpenedSplit, str, bool], Found],
    check: Callable[[str | Path], object] = Path,
) -> tuple[Found, ...]:
    """What `measure(opened, name, show)` finds of one run or several; `show` says whether to draw progress.

    `check` is called with all runs before minutes are spent on the first. Raises `UserError` as `run_names` does, and
    where there is no run.
    """
    places = listed(runs)
    called = run_names(places, names)
    for place in places:
        check(place)
    found = []
    with process_group(device) as own:
        for place, name in zip(places, called, strict=True):
            with open_split(place, own, **on) as opened:
                found.append(measure(opened, name, progress and own.is_main_process))
    return tuple(found)


def batches(opened: OpenedSplit, show: bool, what: str = "analyze") -> Iterator[Batch]:
    """This process's share, on the model's device; `show` puts a progress bar on a terminal."""
    for batch in track(opened.loader, what, len(opened.loader), show):
        yield batch.to(opened.model.device, non_blocking=True)


class Seen(NamedTuple):
    """One image as a detector's last layer sees it, and what is there; on the host, boxes in float64.

    Boxes are pixel `xyxy` in the original image, as the evaluator compares them: the truth is the annotations' own, not
    what resizing and clipping leave of it.
    """

    image_id: int
    scores: Tensor  # (N, C) of all queries, as detections are ranked by
    boxes: Tensor  # (N, 4)
    labels: Tensor  # (n,) int64 class index of each ground-truth box; no crowd regions
    truth: Tensor  # (n, 4)


def seen(opened: OpenedSplit, show: bool = False) -> Iterator[Seen]:
    """Every image of this process's share, in the loader's order; `show` puts a progress bar on a terminal.

    Raises `UserError` where an output is not finite.
    """
    detector = opened.model.detector
    rows = {int(image_id): row for row, image_id in enumerate(opened.annotations.image_ids)}
    for batch in batches(opened, show):
        with torch.no_grad():
            output = detector(batch.images)
            scores, boxes = detector.postprocess.scores(output).cpu(), output.boxes[-1].cpu().double()
        check_finite(opened, scores, boxes)
        pixels = cxcywh_to_xyxy(boxes) * batch.sizes.cpu().flip(-1).repeat(1, 2)[:, None]
        for image_id, own_scores, own_boxes in zip(batch.image_ids, scores, pixels, strict=True):
            yield Seen(image_id, own_scores, own_boxes, *truth(opened.annotations, rows[image_id]))


def check_finite(opened: OpenedSplit, *values: Tensor) -> None:
    """Raises `UserError` where something is not a number: it could not be ranked."""
    if not all(v.isfinite().all() for v in values):
        raise UserError(f"{opened.run}: its outputs are not finite", "Its training went wrong: take other weights.")


def one_to_one(supervision: Supervision, output: DecoderOutput, targets: Targets, copies: int = 1) -> Assignment:
    """Hungarian matching by the recipe's cost, at each layer and in each copy; one query a target, however the run
    was trained, so that runs can be compared."""
    hungarian = supervision.assign
    assert isinstance(hungarian, Hungarian)
    (found,) = assign([Match(output, targets, replace(hungarian, candidates=Candidates()), copies)])
    return found


def truth(annotations: Annotations, row: int) -> tuple[Tensor, Tensor]:
    """Labels `(n,)` and pixel `xyxy` boxes `(n, 4)` of an image, without its crowd regions."""
    own = slice(annotations.starts[row], annotations.starts[row + 1])
    kept = ~annotations.crowd[own]
    boxes = torch.from_numpy(annotations.boxes[own][kept])
    return torch.from_numpy(annotations.labels[own][kept]), torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def listed(runs: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """One run or several, as a list; `UserError` where there is none."""
    found = [runs] if isinstance(runs, str | Path) else list(runs)
    if not found:
        raise UserError("no run to measure", "Name at least one.")
    return found


def split_name(on: EvalOptions) -> str:
    """What a report calls the images that `on` means."""
    return on.get("split", "val") if on.get("val") is None else "val"


def run_names(runs: Sequence[str | Path], names: Sequence[str] | None = None) -> list[str]:
    """What figures and tables call the runs: `names`, or as much of the end of each path as tells them apart.

    The same run twice gets a number. Raises `UserError` unless `names` are different and one a run.
    """
    if names is not None:
        if len(names) != len(runs) or len(set(names)) != len(names) or not all(names):
            raise UserError(f"names {', '.join(names)}", f"Give one a run ({len(runs)}), all different.")
        return list(names)
    parts = [Path(os.path.abspath(run)).parts for run in runs]
    different = len(set(parts))
    depth = 1
    while len({p[-depth:] for p in parts}) < different:
        depth += 1
    found = ["/".join(p[-depth:]) for p in parts]
    return [f"{name}-{found[: i + 1].count(name)}" if name in found[:i] else name for i, name in enumerate(found)]
