"""The detector: what runs at inference, and nothing else."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from detrellis.boxes import cxcywh_to_xyxy, soft_nms
from detrellis.types import DecoderOutput, Detections, ImageBatch, Memory, Proposals, Queries, Segment

IouBranch = Literal["none", "product", "root"]


class Detector(nn.Module):
    """Backbone, neck, encoder, queries, decoder with its heads. `softmax`: the classes exclude each other (DETR).
    `iou_branch` says how the IoU that the heads predict enters the scores: as a factor, or under a root with them.
    `soft_nms`: the IoU from which a detection lowers worse ones of its class (Co-DINO); None: all scores stay.

    Training schemes never enter it: they call `encode`, `queries` and `decode` from outside with more queries. Its
    `state_dict` is therefore the same whatever the detector was trained with.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        encoder: nn.Module,
        queries: nn.Module,
        decoder: nn.Module,
        *,
        top_k: int,
        softmax: bool = False,
        iou_branch: IouBranch = "none",
        soft_nms: float | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.neck, self.encoder = backbone, neck, encoder
        self.queries, self.decoder = queries, decoder
        self.top_k, self.softmax, self.iou_branch, self.soft_nms = top_k, softmax, iou_branch, soft_nms

    def forward(self, images: ImageBatch) -> DecoderOutput:
        """Outputs of the last decoder layer (L = 1)."""
        memory = self.encode(images)
        queries, _ = self.propose(memory)
        segments = (Segment("main", queries.content.shape[1]),)
        output: DecoderOutput = self.decoder(queries, memory, segments, every_layer=False)
        return output

    def encode(self, images: ImageBatch) -> Memory:
        """Images to encoded memory."""
        memory: Memory = self.encoder(self.neck(self.backbone(images.pixels), images.padding))
        return memory

    def propose(self, memory: Memory) -> tuple[Queries, Proposals | None]:
        """The main queries, and the proposals they came from in a two-stage detector."""
        queries: tuple[Queries, Proposals | None] = self.queries(memory)
        return queries

    def decode(self, memory: Memory, blocks: Mapping[Segment, Queries]) -> dict[str, DecoderOutput]:
        """Several query blocks in one pass, every layer's outputs, by block name."""
        segments, queries = tuple(blocks), list(blocks.values())
        output = self.decoder(concatenate(queries), memory, segments, every_layer=True)
        sizes = [s.size for s in segments]
        ends = list(itertools.accumulate(sizes))
        spans = (slice(end - size, end) for end, size in zip(ends, sizes, strict=True))
        return {s.name: output.map(lambda t, span=span: t[:, :, span]) for s, span in zip(segments, spans, strict=True)}

    @torch.no_grad()
    def detect(self, images: ImageBatch, sizes: Tensor) -> list[Detections]:
        """Final detections, boxes in pixels of the original images of `sizes (B, 2)` height, width."""
        return self.select(self(images), sizes)

    def select(self, output: DecoderOutput, sizes: Tensor, k: int | None = None) -> list[Detections]:
        """The best detections of an output of any of its queries, in each image.

        At most `top_k`, after soft-NMS if the detector has it; `k`: so many instead, and never soft-NMS.
        """
        rule = select_per_query if self.softmax else select_top_k
        scores, boxes = self.scores(output), output.boxes[-1]
        if k is not None or self.soft_nms is None:
            return rule(scores, boxes, sizes, self.top_k if k is None else k)
        candidates = rule(scores, boxes, sizes, boxes.shape[1])  # as many pairs as queries
        pairs = zip(candidates, sizes.tolist(), strict=True)
        return [soften(found, size, self.soft_nms, self.top_k) for found, size in pairs]

    def scores(self, output: DecoderOutput) -> Tensor:
        """The last layer's score of each query and class, as detections are ranked by: `(B, N, C)` in [0, 1].

        Sigmoid, times the IoU that an IoU branch predicts, or the root of that product; or softmax without its last
        column, "no object".
        """
        if self.softmax:
            return output.logits[-1].softmax(-1)[..., :-1]
        scores = output.logits[-1].sigmoid()
        if output.iou_logits is None:
            return scores
        product = scores * output.iou_logits[-1].sigmoid().unsqueeze(-1)
        return product.sqrt() if self.iou_branch == "root" else product


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; each part is then in the mode that it was in before."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def concatenate(parts: list[Queries]) -> Queries:
    """One sequence from several blocks."""

    def joined(values: list[Tensor | None]) -> Tensor | None:
        present = [v for v in values if v is not None]
        assert len(present) in (0, len(values)), "every block must come with the same kind of queries"
        return torch.cat(present, dim=1) if present else None

    content = torch.cat([p.content for p in parts], dim=1)
    return Queries(content, joined([p.position for p in parts]), joined([p.boxes for p in parts]))


def select_top_k(scores: Tensor, boxes: Tensor, sizes: Tensor, k: int) -> list[Detections]:
    """The `k` best (query, class) pairs of each image; a query may give several classes; no NMS.

    `scores (B, N, C)`, `boxes (B, N, 4)`, `sizes (B, 2)` height and width in pixels.
    """
    classes = scores.shape[-1]
    best, index = scores.flatten(1).topk(min(k, scores[0].numel()), dim=1)
    query, labels = index // classes, index % classes
    pixels = _pixels(boxes.gather(1, query.unsqueeze(-1).expand(-1, -1, 4)), sizes)
    return [Detections(*row) for row in zip(best, labels, pixels, strict=True)]


def select_per_query(scores: Tensor, boxes: Tensor, sizes: Tensor, k: int) -> list[Detections]:
    """DETR's rule for softmax scores: each query has one class.

    Shapes as `select_top_k`; the `k` best queries of each image.
    """
    highest, labels = scores.max(-1)
    best, query = highest.topk(min(k, highest.shape[1]), dim=1)
    pixels = _pixels(boxes.gather(1, query.unsqueeze(-1).expand(-1, -1, 4)), sizes)
    return [Detections(*row) for row in zip(best, labels.gather(1, query), pixels, strict=True)]


def soften(found: Detections, size: tuple[int, int], threshold: float, k: int) -> Detections:
    """The `k` best after linear soft-NMS within each class, of boxes clipped to the image of `size` height, width.

    Fewer where scores have fallen below 0.001, which drops them (Co-DETR).
    """
    boxes = clip_boxes_to_image(found.boxes, size)
    scores, order = soft_nms(boxes, found.scores, found.labels, threshold).sort(descending=True, stable=True)
    order = order[scores != 0][:k]
    return Detections(scores[: len(order)], found.labels[order], boxes[order])


def _pixels(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Normalised `(B, N, 4)` boxes as `xyxy` in pixels of images of `sizes (B, 2)`."""
    return cxcywh_to_xyxy(boxes) * sizes.flip(-1).repeat(1, 2).to(boxes)[:, None]
