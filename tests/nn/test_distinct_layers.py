"""Queries that are held to be distinct from layer to layer,
against one image at a time, without any mask.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy, pairwise_iou
from detrellis.detector import concatenate
from detrellis.errors import UserError
from detrellis.nn.decoder import Decoder
from detrellis.nn.distinct import NEVER
from detrellis.nn.refine import moved
from detrellis.recipes.build import build
from detrellis.schemes.base import QueryBlock, Step
from detrellis.training import TrainableDetector
from detrellis.types import ImageBatch, Memory, Queries, Segment

from ..small import CLASSES, images, small, targets

# A stack of two that do the same work
pytestmark = pytest.mark.filterwarnings("ignore::detrellis.errors.Advice")

ON = (
    "detector.decoder.distinct=0.5",
    "detector.decoder.layers=3",
    "detector.decoder.shared_heads=false",
)


def model_of(name: str, *schemes: str) -> tuple[TrainableDetector, Step]:
    """A detector in float64 whose boxes move,
    and overlap, from layer to layer, and a step of it.
    """
    model = build(small(name, ["none", *schemes]).override(list(ON)), CLASSES).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i, head in enumerate(model.detector.decoder.heads.boxes):
            head.get_parameter("layers.2.weight").copy_(
                0.2 * torch.randn(4, 64, generator=generator)
            )
            head.get_parameter("layers.2.bias")[2:] = 2.5 if i == 0 else 0.0
    truth = targets((2, 3))
    batch = images(((64, 96), (48, 64)))
    step = model.begin(
        batch._replace(pixels=batch.pixels.double()), truth._replace(boxes=truth.boxes.double())
    )
    return model, step


def kept_of(boxes: Tensor, scores: Tensor) -> list[int]:
    """Greedy NMS of one image, in the queries' order."""
    corners = cxcywh_to_xyxy(boxes)
    overlap, kept = pairwise_iou(corners, corners), list[int]()
    for q in scores.argsort(descending=True).tolist():
        if all(overlap[q, better] <= 0.5 for better in kept):
            kept.append(q)
    return sorted(kept)


def row(memory: Memory, i: int) -> Memory:
    """One image's memory."""
    fields = (
        None if t is None else t[min(i, len(t) - 1)][None] for t in (memory.tokens, memory.position)
    )
    tokens, position = fields
    padding, ratios = (
        None if t is None else t[i : i + 1] for t in (memory.padding, memory.valid_ratios)
    )
    assert tokens is not None
    assert position is not None
    return Memory(tokens, position, memory.shapes, padding, ratios)


def naive(
    decoder: Decoder, queries: Queries, memory: Memory
) -> tuple[list[Tensor], list[Tensor], list[list[int]]]:
    """Logits and boxes of each layer for the queries `(1, N, ...)` of one image,
    and which of them each layer keeps.

    The kept ones run as if the others did not exist, and each of the others as if it were the only
    one of them.
    """
    x, boxes = queries.content, queries.boxes
    assert boxes is not None
    count, logits, refined, every = x.shape[1], [], [], []
    kept = list(range(count))

    def part(t: Tensor | None, rows: list[int]) -> Tensor | None:
        return None if t is None else t[:, rows]

    def run(i: int, rows: list[int]) -> Tensor:
        some = Queries(x[:, rows], part(queries.position, rows), part(queries.boxes, rows))
        where = decoder.position(i, some.content, some, boxes[:, rows], memory)
        out: Tensor = decoder.layers[i](some.content, where, memory, (Segment("some", len(rows)),))[
            0
        ]
        return out

    for i in range(len(decoder.layers)):
        new = torch.empty_like(x)
        new[:, kept] = run(i, kept)
        for q in set(range(count)) - set(kept):
            new[:, q] = run(i, [*kept, q])[:, -1]
        x = new
        states = x if decoder.final_norm is None else decoder.final_norm(x)
        logits.append(decoder.heads.logits(i, states))
        refined.append(moved(decoder.heads.deltas(i, states), boxes, decoder.eps))
        every.append(kept)
        boxes = moved(decoder.heads.deltas(i, x), boxes, decoder.eps)
        kept = kept_of(boxes[0], logits[-1][0].amax(-1))
    return logits, refined, every


def check(
    model: TrainableDetector, memory: Memory, queries: Queries, logits: Tensor, boxes: Tensor
) -> int:
    """Compare a copy's outputs `(L, B, N, ...)`; returns how many queries have been dropped."""
    dropped = 0
    for image in range(len(memory.tokens)):
        one = Queries(*(None if t is None else t[image : image + 1] for t in queries))
        expected, refined, every = naive(model.detector.decoder, one, row(memory, image))
        for layer, kept in enumerate(every):
            gone = [q for q in range(one.content.shape[1]) if q not in kept]
            torch.testing.assert_close(
                logits[layer, image, kept], expected[layer][0, kept], atol=1e-9, rtol=0
            )
            torch.testing.assert_close(boxes[layer, image], refined[layer][0], atol=1e-9, rtol=0)
            assert (logits[layer, image, gone] == NEVER).all()
            dropped += len(gone)
    return dropped


@pytest.mark.parametrize("name", ["dino_r50", "deformable_detr_r50_two_stage_plus", "dab_detr_r50"])
@torch.no_grad()
def test_as_if_the_dropped_did_not_exist(name: str) -> None:
    model, step = model_of(name)
    output = model.detector.decode(step.memory, {model.main(step).segment: step.queries})["main"]
    assert check(model, step.memory, step.queries, output.logits, output.boxes) > 2
    last = model.detector.decoder(
        step.queries, step.memory, (model.main(step).segment,), every_layer=False
    )
    assert torch.equal(last.logits[0], output.logits[-1])


@torch.no_grad()
def test_each_group_and_what_denoising_reads() -> None:
    model, step = model_of("dino_r50", "cdn", "group=3", "hybrid", "co=atss")
    model.reseed(0)
    blocks = [model.main(step), *(b for s in model.training_schemes for b in s.extend(step).blocks)]
    outputs = model.detector.decode(step.memory, {b.segment: b.queries for b in blocks})
    for block in blocks:
        output = outputs[block.name]
        if block.repeats:
            assert (output.logits > NEVER).all(), block.name
            continue
        size = block.queries.content.shape[1] // block.copies
        for copy in range(block.copies):
            part = slice(copy * size, (copy + 1) * size)
            queries = Queries(*(None if t is None else t[:, part] for t in block.queries))
            assert (
                check(
                    model, step.memory, queries, output.logits[:, :, part], output.boxes[:, :, part]
                )
                > 0
            )
    assert {b.name for b in blocks if b.repeats} == {"cdn", "hybrid", "co_atss"}
    assert_denoising_reads_the_kept(model, step, blocks)


def assert_denoising_reads_the_kept(
    model: TrainableDetector, step: Step, blocks: list[QueryBlock]
) -> None:
    """What the dropped main queries contain changes nothing for denoising queries in the layer
    after.
    """
    main, cdn = (next(b for b in blocks if b.name == name) for name in ("main", "cdn"))
    decoder = model.detector.decoder
    together = concatenate([main.queries, cdn.queries])
    size = main.segment.size
    dropped = torch.zeros(2, size, dtype=torch.bool)
    dropped[:, 1::2] = True
    segments = (main.segment._replace(unused=dropped), cdn.segment)
    x = together.content.clone()
    where = decoder.position(0, x, together, together.boxes, step.memory)
    before = decoder.layers[0](x, where, step.memory, segments)[0]
    x[:, 1:size:2] += 1
    after = decoder.layers[0](x, where, step.memory, segments)[0]
    assert torch.equal(before[:, size:], after[:, size:])
    assert torch.equal(before[:, 0:size:2], after[:, 0:size:2])
    assert not torch.equal(before[:, 1:size:2], after[:, 1:size:2])


def test_the_dropped_learn_no_class_and_all_trains() -> None:
    model = build(small("dino_r50", ["none", "cdn"]).override(list(ON)), CLASSES)
    losses = model(images(), targets((2, 3))).losses
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    # More targets than queries, so more than distinct ones
    many = model(images(), targets((15, 1))).losses
    assert all(loss.isfinite() for loss in many.values())


@torch.no_grad()
def test_what_is_dropped_is_detected_last() -> None:
    model, _ = model_of("dino_r50")
    batch = images(((64, 96), (48, 64)))
    output = model.detector(ImageBatch(batch.pixels.double(), batch.padding))
    gone = (output.logits[0] == NEVER).all(-1)
    assert gone.any()
    found = model.detector.detect(
        ImageBatch(batch.pixels.double(), batch.padding), torch.tensor([[1, 1], [1, 1]])
    )
    for image, last in zip(found, gone, strict=True):
        assert int((image.scores > 1e-12).sum()) == min(20, int((~last).sum()) * CLASSES)


@pytest.mark.parametrize(
    ("name", "other"),
    [("deformable_detr_r50", "decoder.refine=none"), ("dab_detr_r50", "scores=softmax")],
)
def test_boxes_that_are_not_refined_and_softmax_are_refused(name: str, other: str) -> None:
    with pytest.raises(UserError, match=f"decoder.distinct and {other} do not combine"):
        build(small(name).override([f"detector.{other}", "detector.decoder.distinct=0.8"]), CLASSES)
