"""From what the heads say to detections:
scores, the best pairs of query and class, suppression, and masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from detrellis.boxes import cxcywh_to_xyxy, iou, ragged
from detrellis.masks import draw_masks, frames
from detrellis.rle import Size
from detrellis.types import DecoderOutput, Detections

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

IouBranch = Literal["none", "product", "root"]
FLOOR = 1e-3  # a score that soft-NMS lowers below this counts as 0


@dataclass(frozen=True)
class Postprocess:
    """How a detector's outputs become detections, at most `top_k` in an image.

    The best pairs of query and class, so that a query may give several classes. `softmax`: the
    classes exclude each other, and each query gives its best one (DETR). `iou_branch` says how the
    IoU that the heads predict enters the scores: as a factor, or under a root with them. `soft_nms`
    is the IoU from which a detection lowers the scores of worse ones of its class (Co-DINO). `nms`
    is the IoU above which a worse detection of a class is dropped; it takes the place of soft-NMS.
    A DETR needs neither, unless it has not learned yet to keep its queries apart.

    Where the detector gives masks, those of the detections are drawn, and a mask's mean probability
    is a factor of the score (`mask_scores`). With `boxes_of_masks` (Mask2Former) the box is the one
    around the mask, detections without a mask are dropped, and queries give several classes with
    softmax too.
    """

    top_k: int
    softmax: bool = False
    iou_branch: IouBranch = "none"
    soft_nms: float | None = None
    nms: float | None = None
    mask_scores: bool = True
    boxes_of_masks: bool = False

    def __call__(self, output: DecoderOutput, sizes: Tensor) -> list[Detections]:
        """The detections of each image,
        boxes in pixels of the original images of `sizes (B, 2)` height, width.
        """
        if output.mask_embeds is None:
            return self._apart(self._candidates(output, sizes), sizes)
        # Suppression needs boxes, and masks take long: whichever the boxes are of comes first.
        if self.boxes_of_masks:
            return self._apart(
                self._with_masks(self._candidates(output, sizes), output, sizes), sizes
            )
        return self._with_masks(self._apart(self._candidates(output, sizes), sizes), output, sizes)

    def _candidates(self, output: DecoderOutput, sizes: Tensor) -> list[Detections]:
        """As many of each image as suppression needs."""
        queries, classes = output.logits.shape[2:]
        if self.nms is not None:
            return self.best(output, sizes, queries * classes)
        return self.best(output, sizes, self.top_k if self.soft_nms is None else queries)

    def _apart(self, images: list[Detections], sizes: Tensor) -> list[Detections]:
        """What suppression leaves of each image."""
        if self.nms is not None:
            return [hard_nms(image, self.nms, self.top_k) for image in images]
        if self.soft_nms is None:
            return images
        return [
            soften(i, size, self.soft_nms, self.top_k)
            for i, size in zip(images, sizes.tolist(), strict=True)
        ]

    def _with_masks(
        self, images: list[Detections], output: DecoderOutput, sizes: Tensor
    ) -> list[Detections]:
        """The detections of each image with their masks, ranked anew."""
        assert output.masks is not None
        assert output.mask_embeds is not None
        rows = zip(
            images,
            output.mask_embeds[-1],
            output.masks.map,
            frames(output.masks, len(images)),
            sizes.tolist(),
            strict=True,
        )
        padded = output.masks.size
        return [
            self._masked(detections, e, m, (padded, frame, (h, w)))
            for detections, e, m, frame, (h, w) in rows
        ]

    def _masked(
        self,
        detections: Detections,
        embeds: Tensor,
        features: Tensor,
        sizes: tuple[Size, Size, Size],
    ) -> Detections:
        assert detections.queries is not None
        chosen, place = detections.queries.unique(return_inverse=True)
        drawn = draw_masks(embeds[chosen], features, *sizes)
        quality, runs = drawn.scores[place], tuple(drawn.runs[i] for i in place.tolist())
        scores = (
            detections.scores * quality.to(detections.scores)
            if self.mask_scores
            else detections.scores
        )
        boxes = drawn.boxes[place].to(detections.boxes) if self.boxes_of_masks else detections.boxes
        order = scores.argsort(descending=True, stable=True)
        if self.boxes_of_masks:
            order = order[quality[order] > 0]
        return detections._replace(scores=scores, boxes=boxes, masks=runs).take(order)

    def best(self, output: DecoderOutput, sizes: Tensor, k: int) -> list[Detections]:
        """The `k` best of each image by the last layer's scores, without any suppression."""
        boxes = output.boxes[-1]
        if self.boxes_of_masks:  # which are not drawn yet
            boxes = boxes.new_zeros(*boxes.shape[:2], 4)
        best, labels, query = self.ranked(output, k)
        corners = cxcywh_to_xyxy(boxes.gather(1, query.unsqueeze(-1).expand(-1, -1, 4)))
        pixels = corners * sizes.flip(-1).repeat(1, 2).to(boxes)[:, None]
        images = zip(best, labels, pixels, query, strict=True)
        return [Detections(s, c, b, queries=q) for s, c, b, q in images]

    def ranked(self, output: DecoderOutput, k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, classes and queries of the `k` best detections of each image (None: `top_k`),
        `(B, k)` each.
        """
        k, scores = self.top_k if k is None else k, self.scores(output)
        one_class = self.softmax and not self.boxes_of_masks
        best, query, labels = top_queries(scores, k) if one_class else top_pairs(scores, k)
        return best, labels, query

    def scores(self, output: DecoderOutput) -> Tensor:
        """The last layer's score of each query and class, as detections are ranked by:
        `(B, N, C)` in [0, 1].

        Sigmoid, times the IoU that an IoU branch predicts, or the root of that product; or softmax
        without its last column, "no object".
        """
        if self.softmax:
            return output.logits[-1].softmax(-1)[..., :-1]
        scores = output.logits[-1].sigmoid()
        if output.iou_logits is None:
            return scores
        product = scores * output.iou_logits[-1].sigmoid().unsqueeze(-1)
        return product.sqrt() if self.iou_branch == "root" else product


def top_pairs(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Score, query and class of the `k` best pairs, `(..., k)` each, of `scores (..., N, C)`;
    fewer if there are.
    """
    best, index = scores.flatten(-2).topk(min(k, scores.shape[-2:].numel()))
    classes = scores.shape[-1]
    return best, index // classes, index % classes


def top_queries(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `top_pairs`, of each query's best class alone."""
    highest, labels = scores.max(-1)
    best, query = highest.topk(min(k, highest.shape[-1]))
    return best, query, labels.gather(-1, query)


def hard_nms(detections: Detections, threshold: float, k: int) -> Detections:
    """The `k` best of an image after NMS within each class; `detections` are best first."""
    kept = nms(detections.boxes, detections.scores, detections.labels, threshold, k, first=8 * k)
    return detections.take(kept)


def nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, k: int, *, first: int
) -> Tensor:
    """Indices `(n,)` of the best boxes that NMS within each group leaves, at most `k`, best first.

    `boxes (N, 4)` xyxy, `scores (N,)` and `groups (N,)`, best first. NMS is greedy: whether a box
    stays depends on better ones alone. So the `first` of them are tried before all, which takes
    long where most boxes lie apart.
    """
    tried = first
    while True:
        kept: Tensor = batched_nms(
            boxes[:tried], scores[:tried].to(boxes), groups[:tried], threshold
        )
        if len(kept) >= k or tried >= len(boxes):
            return kept[:k]
        tried *= 4


def soften(detections: Detections, size: tuple[int, int], threshold: float, k: int) -> Detections:
    """The `k` best after linear soft-NMS within each class,
    of boxes clipped to the image of `size` height, width.

    Fewer where scores have fallen below 0.001, which drops them (Co-DETR).
    """
    boxes = clip_boxes_to_image(detections.boxes, size)
    scores, order = soft_nms(boxes, detections.scores, detections.labels, threshold).sort(
        descending=True, stable=True
    )
    order = order[scores != 0][:k]
    return detections._replace(boxes=boxes).take(order)._replace(scores=scores[: len(order)])


def soft_nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Scores `(N,)` after linear soft-NMS within each class (Bodla et al. 2017);
    0 where they fall below `FLOOR`.

    From the best down, each box multiplies by 1 - IoU the score of every box of its class that is
    still to come and whose IoU with it is `threshold` or more. `boxes (N, 4)` xyxy, `scores (N,)`,
    `labels (N,)`, in any order. Computed on the host.
    """
    corners, classes = boxes.cpu().double(), labels.cpu().numpy()
    # Pairs of one class that overlap by the threshold or more.
    first, second = _candidates(corners.numpy(), classes, threshold)
    overlap = iou(corners[first], corners[second]).numpy()
    near = (overlap >= threshold) & (classes[first] == classes[second])
    first, second, factor = first[near], second[near], 1 - overlap[near]
    # Only boxes in such a pair must take turns, few mostly: a matrix of what each multiplies the
    # others by.
    crowded = np.zeros(len(boxes), dtype=np.bool_)
    crowded[first] = crowded[second] = True
    count, place = crowded.sum(), crowded.cumsum() - 1
    factors = np.ones((count, count))
    factors[place[first], place[second]] = factors[place[second], place[first]] = factor
    # All others keep their score.
    before = scores.cpu().double().numpy()
    lowered = np.where(before < FLOOR, 0, before)
    lowered[crowded] = _in_turn(before[crowded], factors)
    return torch.from_numpy(lowered).to(scores)


def _candidates(boxes: Floats, classes: Ints, threshold: float) -> tuple[Ints, Ints]:
    """Rows of two boxes each, among them all pairs of one class whose IoU reaches the threshold.

    They lie less than 1 - `threshold` of a width apart. Sorted by their left sides, with the
    classes one beside the other, the candidates for a box follow it; all `N * N` pairs would take
    most of the time.
    """
    left, width = boxes[:, 0], boxes[:, 2] - boxes[:, 0]
    left = left + classes * (2 * np.ptp(boxes) + 1 if len(boxes) else 1)
    order = left.argsort()
    # 0.001: more than any rounding
    left, reach = left[order], (left + (1.001 - threshold) * width)[order]
    first, rank = ragged(left.searchsorted(reach, side="right") - np.arange(1, len(left) + 1))
    return order[first], order[first + 1 + rank]


def _in_turn(left: Floats, factors: Floats) -> Floats:
    """The scores `left (K,)` when the best of those left,
    over and over, is taken and multiplies the others.
    """
    taken = np.zeros_like(left)
    for _ in range(len(left)):
        best = left.argmax()
        if left[best] < FLOOR:
            break
        taken[best], left[best] = left[best], 0
        left *= factors[best]
    return taken
