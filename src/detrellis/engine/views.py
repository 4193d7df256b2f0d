"""Test-time augmentation: each image at several sizes and mirrored,
and what is detected in all of them merged.

What every view gives is brought back to the original image and put together; within each class,
linear soft-NMS from an IoU of 0.8 on (Co-DETR's) lowers the scores of what others found too, NMS
drops it, or weighted boxes average it (Solovyev et al. 2021, here around the best box of each
cluster). No scores are averaged but by the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from detrellis.boxes import pairwise_iou
from detrellis.data.annotations import Annotations
from detrellis.data.batch import Batch
from detrellis.data.operations import Picture, horizontal_flip
from detrellis.data.transforms import Resize, eval_transform
from detrellis.detector import Detector, evaluating
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.evaluate import completed
from detrellis.errors import UserError
from detrellis.postprocess import Postprocess, hard_nms, soften
from detrellis.recipes.data import DataConfig
from detrellis.types import DecoderOutput, Detections

Merge = Literal["soft_nms", "nms", "wbf"]
THRESHOLDS: dict[Merge, float] = {"soft_nms": 0.8, "nms": 0.5, "wbf": 0.55}  # IoUs
SCALES = (0.8, 1.0, 1.2)  # of the recipe's short side, where no sizes are given
SIDES = range(16, 4097)  # short sides that make sense
EXAMPLE = 'For example "640,800,flip" or "auto"; the last words may be soft_nms, nms or wbf.'


@dataclass(frozen=True)
class View:
    """One of the ways in which an image is looked at."""

    resize: Resize
    mirrored: bool = False

    @property
    def pad_to(self) -> tuple[int, int] | None:
        """See `Resize`."""
        return self.resize.pad_to

    def target(self, height: int, width: int) -> tuple[int, int]:
        """See `Resize`."""
        return self.resize.target(height, width)

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor) -> Picture:
        """The image resized, and then mirrored; see `Transform`."""
        image, boxes, labels = self.resize(image, boxes, labels)
        return (*horizontal_flip(image, boxes), labels) if self.mirrored else (image, boxes, labels)

    def detections(
        self, postprocess: Postprocess, output: DecoderOutput, sizes: Tensor
    ) -> list[Detections]:
        """The best detections of each image without any suppression, on the host, in pixels of the
        original images of `sizes (B, 2)`. Raises `UserError` for a detector that gives masks."""
        if output.mask_embeds is not None:
            raise UserError(
                "test-time augmentation merges boxes, and this detector gives masks",
                "Leave out --tta and --tta-views.",
            )
        images = [
            image._replace(queries=None)
            for image in postprocess.best(output, sizes, postprocess.top_k)
        ]
        return [
            self._back(image, int(width))
            for image, width in zip(images, sizes[:, 1].tolist(), strict=True)
        ]

    def _back(self, image: Detections, width: int) -> Detections:
        boxes = image.boxes.cpu()
        if self.mirrored:
            boxes = torch.stack(
                [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=-1
            )
        return Detections(image.scores.cpu(), image.labels.cpu(), boxes)


@dataclass(frozen=True)
class Views:
    """All views of an image, and how what they give is merged."""

    views: tuple[View, ...]
    merge: Merge = "soft_nms"

    def merged(self, views: Sequence[Detections], size: tuple[int, int], k: int) -> Detections:
        """The `k` best detections of an image of `size` height,
        width, of which each view has `detections`.
        """
        together = Detections(
            torch.cat([image.scores for image in views]),
            torch.cat([image.labels for image in views]),
            torch.cat([image.boxes for image in views]),
        )
        together = together.take(together.scores.argsort(descending=True, stable=True))
        threshold = THRESHOLDS[self.merge]
        if self.merge == "soft_nms":
            return soften(together, size, threshold, k)
        return (
            hard_nms(together, threshold, k)
            if self.merge == "nms"
            else self._weighted(together, threshold, k)
        )

    def _weighted(self, detections: Detections, threshold: float, k: int) -> Detections:
        """The best of each cluster, at the mean of the cluster's boxes, weighted by scores; its
        score is the mean of theirs, times the part of the views that it was found in."""
        best = hard_nms(detections, threshold, len(detections.scores))
        overlap = pairwise_iou(best.boxes, detections.boxes) * (
            best.labels.unsqueeze(1) == detections.labels
        )
        place = torch.arange(len(best.scores)).unsqueeze(1)
        member = (overlap.argmax(0) == place) * detections.scores if len(best.scores) else overlap
        counts = (member > 0).sum(1)
        total = member.sum(1).clamp(min=1e-12)
        scores = total / counts.clamp(min=1) * (counts / len(self.views)).clamp(max=1)
        merged = best._replace(scores=scores, boxes=member @ detections.boxes / total.unsqueeze(1))
        return merged.take(scores.argsort(descending=True, stable=True)[:k])


def read_views(tta: bool | str, config: DataConfig, nms: float | None = None) -> Views | None:
    """What `tta` asks for: nothing (False), three sizes, each mirrored too (True or `"auto"`), or
    the short sides and words of a text such as `"640,800,flip,wbf"`. None where that is the plain
    view alone."""
    if tta is False:
        return None
    if nms is not None:
        raise UserError(
            "--nms and --tta both say which of several detections is left", "Leave one of them out."
        )
    if config.pad is not None:
        what = (
            f"data.pad={config.pad}: this detector reads pictures of one size, with their padding"
        )
        raise UserError(what, "Leave out --tta and --tta-views.")
    words = [] if tta is True else [word.strip().lower() for word in tta.split(",")]
    short = config.size if isinstance(config.size, int) else min(config.size)
    if words in ([], ["auto"]):
        sides, words = [round(short * scale) for scale in SCALES], ["flip"]
    else:
        sides = [int(word) for word in words if word.isdecimal()] or [short]
    for word in words:
        if (
            word != "flip"
            and word not in get_args(Merge)
            and (not word.isdecimal() or int(word) not in SIDES)
        ):
            raise UserError(
                f"--tta-views {tta}: {word!r} is no short side, and no word that it takes", EXAMPLE
            )
    merges = [merge for merge in get_args(Merge) if merge in words]
    if len(merges) > 1:
        raise UserError(f"--tta-views {tta}: {' and '.join(merges)} both merge", EXAMPLE)
    mirrors = (False, True) if "flip" in words else (False,)
    views = tuple(
        View(_resize(config, side), mirrored)
        for side in dict.fromkeys(sides)
        for mirrored in mirrors
    )
    plain = views == (View(_resize(config, short)),)
    return None if plain else Views(views, *merges)


def _resize(config: DataConfig, side: int) -> Resize:
    """The recipe's resizing to another short side, all else in proportion."""
    size, longest = config.size, config.max_side
    scale = side / (size if isinstance(size, int) else min(size))
    options = config.resizing() | {
        "max_size": None if longest is None else max(round(longest * scale), side)
    }
    if isinstance(size, int):
        return eval_transform(side, **options)
    return eval_transform((round(size[0] * scale), round(size[1] * scale)), **options)


def collect_views(
    detector: Detector,
    views: Views,
    batches: Callable[[View], Iterable[Batch]],
    annotations: Annotations,
) -> CocoEvaluator:
    """As `engine.evaluate.collect`, of what all views of each image give;
    `batches` yields all images in a view.
    """
    by_image: dict[int, dict[View, Detections]] = {}
    sizes: dict[int, tuple[int, int]] = {}
    device = next(detector.parameters()).device
    for view in views.views:
        for batch in batches(view):
            batch = batch.to(device, non_blocking=True)
            with evaluating(detector):
                images = view.detections(detector.postprocess, detector(batch.images), batch.sizes)
            for image_id, size, image in zip(
                batch.image_ids, batch.sizes.tolist(), images, strict=True
            ):
                by_image.setdefault(image_id, {})[view] = image
                sizes[image_id] = (size[0], size[1])
    k = detector.postprocess.top_k
    evaluator = CocoEvaluator(annotations, top_k=k)
    for image_id, of_views in by_image.items():
        evaluator.update([image_id], [views.merged(list(of_views.values()), sizes[image_id], k)])
    return completed(evaluator)
