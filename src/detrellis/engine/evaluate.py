"""COCO evaluation of a detector over a loader, on one process or many."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from detrellis.arguments import BatchSize, Split, Workers
from detrellis.data.annotations import Annotations
from detrellis.data.batch import Batch, Normalise
from detrellis.data.dataset import DetectionDataset
from detrellis.data.findings import SkipBad
from detrellis.data.layout import DataSource, find_data
from detrellis.data.loader import Loader, build_loader
from detrellis.data.sampler import EvalSampler
from detrellis.data.transforms import Transform, eval_transform
from detrellis.detector import Detector, evaluating
from detrellis.distributed import World, all_gather
from detrellis.engine.coco_backend import Masks
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.eval_result import EvalResult
from detrellis.engine.resume import check_data_exists
from detrellis.errors import UserError
from detrellis.recipes.config import Recipe
from detrellis.recipes.data import DataConfig
from detrellis.recipes.refuse import refuse
from detrellis.types import DecoderOutput

NMS = 0.7  # IoU above which the weaker one of two detections of a class counts as a duplicate
DOUBLED = 0.01  # AP that NMS adds where objects are found more than once


class EvalTransform(Transform, Protocol):
    """A transform that makes the same of every image of a size."""

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of that size gets."""


@dataclass(frozen=True)
class EvalOptions:
    """What a trained detector is evaluated on: by default the validation split of its own run."""

    data: str | Path | DataSource | None = None
    val: str | Path | None = None  # a COCO file, instead of `data` and `split`
    val_images: str | Path | None = None
    split: Split = "val"
    batch_size: BatchSize = 4  # images at a time
    skip_bad: SkipBad = False  # drop bad records instead of refusing the data set
    workers: Workers = 2  # processes that load images


def evaluated_split(
    run: str | Path, run_data: Mapping[str, Any] | None, options: EvalOptions
) -> tuple[DataSource, str]:
    """The data set and the split to evaluate on, of a run that was trained on `run_data`.

    Other data whose files do not tell what validates are evaluated on as a whole.
    """
    data, split = options.data, options.split
    if options.val is not None:
        return find_data(None, options.val, options.val_images), "train"
    if data is None and run_data is None:
        raise UserError(
            f"{run}: no run of ours, so its data are not known", "Say on what: --data or --val."
        )
    if data is None:
        source = DataSource.from_dict(run_data or {})
    else:
        source = find_data(data)
        if (own := _of_the_run(source, run_data)) is not None:
            source = own
        elif split in source.splits and source.splits[split].part is not None:
            return source.as_whole(), "train"
    if split not in source.splits:
        others = " or ".join(f"--split {name}" for name in source.splits)
        where = (
            f"{run}: the data set that it was trained on"
            if data is None
            else f"{data}: this data set"
        )
        raise UserError(
            f"{where} has no split `{split}`", f"Take {others}, or name annotations: --val FILE."
        )
    if data is None:
        check_data_exists(Path(run), source, (split,), ("eval", Path(run)))
    return source, split


def _of_the_run(source: DataSource, run_data: Mapping[str, Any] | None) -> DataSource | None:
    """The data set with the images held out that a run trained on `run_data` held out;
    None where that was trained on other files.
    """
    if not run_data:
        return None
    trained = DataSource.from_dict(run_data)
    files = [data.splits["train"].annotations for data in (trained, source)]
    return source.divided_as(trained) if files[0] == files[1] else None


def eval_loader(
    annotations: Annotations,
    config: DataConfig,
    batch_size: int,
    workers: int,
    world: World,
    transform: EvalTransform | None = None,
) -> Loader:
    """Every image once over all processes,
    resized as the recipe says, or by another `transform`.
    """
    transform = transform or eval_transform(config.size, **config.resizing())
    sampler = EvalSampler(
        len(annotations),
        batch_size,
        shapes=_shapes(annotations, transform),
        rank=world.rank,
        world_size=world.size,
    )
    normalise, pin = Normalise.of(**config.statistics()), world.device.type == "cuda"
    dataset = DetectionDataset(annotations, transform)
    return build_loader(dataset, sampler, normalise=normalise, workers=workers, pin_memory=pin)


def _shapes(annotations: Annotations, transform: EvalTransform) -> NDArray[np.int64] | None:
    """Height and width of each image after the transform, `(I, 2)`; None where all are padded to
    one size."""
    if transform.pad_to is not None or not len(annotations):
        return None
    sizes, index = np.unique(annotations.sizes, axis=0, return_inverse=True)
    return np.array([transform.target(*size) for size in sizes.tolist()])[index.reshape(-1)]


def collect(
    detector: Detector,
    batches: Iterable[Batch],
    annotations: Annotations,
    device: torch.device,
    nms: Sequence[float | None] = (None,),
    check: Callable[[DecoderOutput], None] | None = None,
    truth: Masks | None = None,
) -> list[CocoEvaluator]:
    """Run the detector over the batches;
    in every process the evaluators hold the detections of all.

    One for each threshold of `nms`: where it is None, of what the detector detects; otherwise after
    NMS at that IoU. `check` sees each output first. `truth` are the masks of the annotations, where
    they have been read.
    """
    ways = [replace(detector.postprocess, nms=threshold) for threshold in nms]
    evaluators = [CocoEvaluator(annotations, top_k=way.top_k, truth=truth) for way in ways]
    for batch in batches:
        batch = batch.to(device, non_blocking=True)
        with evaluating(detector):
            output = detector(batch.images)
            if check is not None:
                check(output)
            detections = [way(output, batch.sizes) for way in ways]
        for evaluator, detected in zip(evaluators, detections, strict=True):
            evaluator.update(batch.image_ids, detected)
    return [completed(evaluator) for evaluator in evaluators]


def gives_masks(output: DecoderOutput) -> None:
    """Raises `UserError` for what a detector without masks gives."""
    if output.mask_embeds is None:
        raise UserError(
            "the detector gives boxes without masks", "Evaluate its boxes: --metric coco."
        )


def completed(evaluator: CocoEvaluator) -> CocoEvaluator:
    """The evaluator with the detections of all processes; each must call it."""
    others = all_gather(evaluator.arrays())
    if len(others) > 1:
        evaluator.merge(*others)
    return evaluator


def duplicates_line(
    result: EvalResult, after_nms: EvalResult, recipe: Recipe, needed: Set[str]
) -> str | None:
    """Advice where AP is higher after NMS, because objects are found more than once;
    None where it is not. It names what would make the queries of the `recipe` distinct, and leaves
    its detector the capabilities `needed` by the schemes.
    """
    if result.ap is None or after_nms.ap is None or after_nms.ap - result.ap < DOUBLED:
        return None
    dials = " ".join(f"-o {dial}" for dial in _distinct_dials(recipe, needed))
    return (
        f"Objects are found more than once: NMS at IoU {NMS} raises AP from {result.ap:.3f} to "
        f"{after_nms.ap:.3f}. One query for each object is what DETRs learn last. Train longer, "
        + (f"train with {dials}, " if dials else "")
        + f"or predict with --nms {NMS}."
    )


def _distinct_dials(recipe: Recipe, needed: Set[str]) -> list[str]:
    """The overrides that make queries distinct where they are not, of those the recipe can take."""
    dials: list[str] = []
    for part in ("queries", "decoder"):
        if getattr(getattr(recipe.detector, part), "distinct", NMS) is not None:
            continue
        dial = f"detector.{part}.distinct={NMS}"
        with contextlib.suppress(UserError), warnings.catch_warnings(action="ignore"):
            changed = recipe.override([*dials, dial])
            refuse(changed)  # its advice was given when the run began
            if needed <= changed.detector.capabilities:
                dials.append(dial)
    return dials
