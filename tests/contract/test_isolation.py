"""Invariant 3 of docs/architecture.md: a block's output is that of the block alone; copies do not see each other."""

from __future__ import annotations

import pytest
import torch

from detrellis.schemes.base import QueryBlock, Step
from detrellis.training import TrainableDetector
from detrellis.types import DecoderOutput, ImageBatch, Memory, Queries, Segment

from ..small import images, targets
from .models import every_detector, every_stack, flat, make

pytestmark = pytest.mark.filterwarnings("ignore::detrellis.errors.Advice")  # stacks of two that do the same work


def decode_parts(name: str, stack: str = "own") -> tuple[TrainableDetector, Memory, Queries, Step]:
    model = make(name, stack).double()
    model.eval()
    truth = targets((2, 3))
    step = model.begin(ImageBatch(images().pixels.double()), truth._replace(boxes=truth.boxes.double()))
    return model, step.memory, step.queries, step


def compare(actual: DecoderOutput, expected: DecoderOutput) -> None:
    torch.testing.assert_close(flat(actual), flat(expected), atol=1e-9, rtol=0)


@every_stack
@torch.no_grad()
def test_blocks_are_isolated(name: str, stack: str) -> None:
    model, memory, queries, step = decode_parts(name, stack)
    main = QueryBlock("main", queries, model.supervision)
    blocks = [main, *(b for s in model.training_schemes for b in s.extend(step).blocks)]
    together = model.detector.decode(memory, {b.segment: b.queries for b in blocks})
    compare(together["main"], model.detector.decode(memory, {main.segment: queries})["main"])
    for block in blocks[1:]:
        seen = {b.segment: b.queries for b in blocks if b.name == block.name or b.name in block.sees}
        compare(together[block.name], model.detector.decode(memory, seen)[block.name])


@every_detector
@torch.no_grad()
def test_copies_are_isolated(name: str) -> None:
    model, memory, queries, _ = decode_parts(name)
    parts = [Queries(*(None if t is None else t.roll(k, 1) * 0.9 for t in queries)) for k in range(3)]
    joined = Queries(*(None if t[0] is None else torch.cat(t, 1) for t in zip(*parts, strict=True)))  # type: ignore[arg-type]
    count = queries.content.shape[1]
    together = model.detector.decode(memory, {Segment("copies", 3 * count, 3): joined})["copies"]
    for k, part in enumerate(parts):
        alone = model.detector.decode(memory, {Segment("alone", count): part})["alone"]
        compare(together.map(lambda t, k=k: t[:, :, k * count : (k + 1) * count]), alone)
