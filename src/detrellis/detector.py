"""The detector: what runs at inference, and nothing else."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from detrellis.errors import UserError
from detrellis.nn.backbone import Backbone
from detrellis.nn.decoder import Decoder
from detrellis.nn.fusion import fuse
from detrellis.nn.masked import MaskedDecoder
from detrellis.nn.masks import MaskBranch
from detrellis.nn.queries import QuerySource
from detrellis.postprocess import Postprocess
from detrellis.types import (
    DecoderOutput,
    Detections,
    ImageBatch,
    Memory,
    Proposals,
    Queries,
    Segment,
)

SIDE = 128  # pixels: no level of a pyramid is then a single one


class Detector(nn.Module):
    """Backbone, neck, encoder, queries, decoder with its heads,
    and how their outputs become detections.

    Training schemes never enter it: they call `encode`, `queries` and `decode` from outside with
    more queries. Its `state_dict` is therefore the same whatever the detector was trained with.
    With `masks` the backbone gives one map more, the finest, which is the branch's alone.
    `size_divisor`: images are padded to multiples of it; 1 where there are masks, which are of the
    images as they are. `mixed`: whether `evaluating` computes products in bfloat16; `is_fused`:
    whether this is what `fused` gave.
    """

    mixed, is_fused = False, False

    def __init__(
        self,
        backbone: Backbone,
        neck: nn.Module,
        encoder: nn.Module,
        queries: QuerySource,
        decoder: Decoder | MaskedDecoder,
        *,
        postprocess: Postprocess,
        masks: MaskBranch | None = None,
        size_divisor: int = 1,
    ) -> None:
        super().__init__()
        self.size_divisor = size_divisor
        self.backbone, self.neck, self.encoder = backbone, neck, encoder
        self.queries, self.decoder, self.masks = queries, decoder, masks
        self.postprocess = postprocess

    def forward(self, images: ImageBatch) -> DecoderOutput:
        """Outputs of the last decoder layer (L = 1)."""
        memory = self.encode(images)
        queries, _ = self.propose(memory)
        segments = (Segment("main", queries.content.shape[1]),)
        output: DecoderOutput = self.decoder(queries, memory, segments, every_layer=False)
        return output

    def encode(self, images: ImageBatch) -> Memory:
        """The encoded memory of the images."""
        images = padded_to_multiple(images, self.size_divisor)
        maps = self.backbone(images.pixels)
        if self.masks is None:
            memory: Memory = self.encoder(self.neck(maps, images.padding), self.queries.head)
            return memory
        memory = self.encoder(self.neck(maps[1:], images.padding), self.queries.head)
        return memory._replace(masks=self.masks(maps[0], memory, images))

    def propose(self, memory: Memory) -> tuple[Queries, Proposals | None]:
        """The main queries, and the proposals they came from in a two-stage detector."""
        queries: tuple[Queries, Proposals | None] = self.queries(memory)
        return queries

    def decode(self, memory: Memory, blocks: Mapping[Segment, Queries]) -> dict[str, DecoderOutput]:
        """Every layer's outputs of several blocks in one pass, by the block's name."""
        together = self.decoder(
            concatenate(list(blocks.values())), memory, tuple(blocks), every_layer=True
        )
        if len(blocks) == 1:
            return {segment.name: together for segment in blocks}
        outputs: dict[str, DecoderOutput] = {}
        first = 0
        for segment in blocks:
            outputs[segment.name] = together.rows(first, segment.size)
            first += segment.size
        return outputs

    def fused(self) -> Self:
        """A copy for inference whose norms and parallel branches are fused with convolutions
        (`nn/fusion.py`), wherever they are: the same outputs up to rounding, sooner. Its state dict
        is another one, and it cannot be trained."""
        copied = copy.deepcopy(self).eval().requires_grad_(False)
        pixels = next(copied.parameters()).new_zeros(1, 3, SIDE, SIDE)
        with torch.no_grad():
            fuse(copied, lambda: copied.encode(ImageBatch(pixels)))
        copied.is_fused = True
        return copied

    def train(self, mode: bool = True) -> Self:
        """As of every module; `UserError` for what `fused` gave, which without its norms would be
        trained as another network."""
        if mode and self.is_fused:
            raise UserError(
                "a fused detector cannot be trained: its norms are part of its convolutions",
                "Train the one that it is a copy of, and fuse it afterwards.",
            )
        return super().train(mode)

    @torch.no_grad()
    def detect(self, images: ImageBatch, sizes: Tensor) -> list[Detections]:
        """Final detections, boxes in pixels of the original images of `sizes (B, 2)` height,
        width.
        """
        return self.postprocess(self(images), sizes)


def padded_to_multiple(images: ImageBatch, divisor: int) -> ImageBatch:
    """The images padded at the bottom and right to multiples of `divisor`.

    A last cell that lies half on the image counts whole to deformable attention: its map is then
    wider than the image, coarse ones more than fine ones, so that levels disagree on where things
    are. Where it lies on padding its centre decides.
    """
    below, right = (-side % divisor for side in images.pixels.shape[-2:])
    # Sizes that a traced program leaves open are numbers of no value: it pads by whatever it takes.
    if isinstance(below, int) and isinstance(right, int) and not (below or right):
        return images
    return images.padded(below, right)


@contextlib.contextmanager
def evaluating(detector: Detector) -> Iterator[None]:
    """Evaluation mode, without gradients, in half precision where the detector is `mixed` or its
    weights are halves; each part is then in the mode that it was in before.
    """
    modes = [(part, part.training) for part in detector.modules()]
    like = next(detector.parameters())
    halves = like.dtype if like.dtype.itemsize == 2 else None
    half = torch.bfloat16 if detector.mixed else halves
    detector.eval()
    try:
        with torch.no_grad(), torch.autocast(like.device.type, half, enabled=half is not None):
            yield
    finally:
        for part, training in modes:
            part.training = training


def concatenate(parts: list[Queries]) -> Queries:
    """The queries of several blocks, `(B, N, ...)` each, as one sequence."""

    def joined(values: list[Tensor | None]) -> Tensor | None:
        present = [v for v in values if v is not None]
        assert len(present) in (0, len(values)), (
            "every block must come with the same kind of queries"
        )
        return torch.cat(present, dim=1) if present else None

    content = torch.cat([p.content for p in parts], dim=1)
    return Queries(content, joined([p.position for p in parts]), joined([p.boxes for p in parts]))
