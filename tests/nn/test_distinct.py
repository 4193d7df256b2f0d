"""Distinct query selection, against a plain loop over the boxes of each image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detrellis.boxes import cxcywh_to_xyxy, pairwise_iou
from detrellis.engine.measure import measure
from detrellis.errors import UserError
from detrellis.nn.distinct import POOL, ROUNDS, overlapping
from detrellis.nn.proposals import ProposalHead
from detrellis.recipes import find_recipe
from detrellis.recipes.build import build
from detrellis.types import ImageBatch, Memory, Proposals

from ..small import CLASSES, images, small, targets
from ..waits import as_on_a_gpu

ON = "detector.queries.distinct=0.5"
TWO_STAGE = ("tiny", "deformable_detr_r50_two_stage", "deformable_detr_r50_two_stage_plus")


def naive(boxes: Tensor, threshold: float) -> list[bool]:
    """Greedy NMS of one image's `boxes (N, 4)`, best first: which are dropped."""
    corners = cxcywh_to_xyxy(boxes.double())
    overlap, kept = pairwise_iou(corners, corners).tolist(), []
    for row in range(len(boxes)):
        if all(overlap[row][better] <= threshold for better in kept):
            kept.append(row)
    return [row not in kept for row in range(len(boxes))]


def clusters(images: int, count: int, seed: int = 0) -> Tensor:
    """Boxes `(images, count, 4)` around few objects."""
    generator = torch.Generator().manual_seed(seed)
    objects = torch.rand(images, 5, 4, generator=generator) * 0.3 + 0.1
    which = torch.randint(5, (images, count, 1), generator=generator).expand(-1, -1, 4)
    return objects.gather(1, which) + 0.03 * torch.rand(images, count, 4, generator=generator)


@pytest.fixture(params=["at hand", "as on a GPU"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where boxes are read at once, and where they are not."""
    if request.param == "as on a GPU":
        as_on_a_gpu(monkeypatch)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("count", [1, 40, 400])  # torchvision takes other ways for many boxes
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8])
def test_as_greedy_nms_of_each_image(count: int, threshold: float) -> None:
    boxes = clusters(3, count)
    found = overlapping(boxes, threshold)
    assert found.tolist() == [naive(image, threshold) for image in boxes]
    for image, alone in zip(found, boxes, strict=True):
        assert torch.equal(image, overlapping(alone[None], threshold)[0])
    assert not found[:, 0].any()
    assert count == 1 or found.any()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("seed", range(3))
def test_of_a_pool_and_of_chains(seed: int) -> None:
    """Each box of a chain overlaps the next and no other: every second one stays. Of as many as are
    promised, best first, and of hundreds in any order, where few are behind many."""
    chain = torch.tensor([[0.0, 0.5, 0.4, 0.4]]).repeat(400, 1)
    chain[:, 0] = 0.1 * torch.arange(400)  # IoU of neighbours 0.6, and 1/3 of the next but one
    assert overlapping(chain[None, : ROUNDS + 1], 0.5)[0].tolist() == [
        bool(i % 2) for i in range(ROUNDS + 1)
    ]
    order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
    pool = torch.cat([chain[order], clusters(1, 400, seed)[0]])
    assert overlapping(pool[None], 0.5)[0].tolist() == naive(pool, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_half_precision_change_nothing(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Nor that the boxes have it, whose corners would be rounded to others."""
    boxes = clusters(2, 300).to(dtype)
    expected = overlapping(boxes, 0.5)
    as_on_a_gpu(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(overlapping(boxes, 0.5), expected)


@pytest.mark.usefixtures("device")
def test_an_iou_of_the_threshold_stays_and_nothing_needs_boxes() -> None:
    halves = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.25]]])  # IoU 0.5
    assert overlapping(halves, 0.5).tolist() == [[False, False]]
    assert overlapping(halves, 0.499).tolist() == [[False, True]]
    assert overlapping(torch.zeros(2, 0, 4), 0.5).shape == (2, 0)


def chosen(
    head: ProposalHead, proposals: Proposals, image: int, tokens: list[int], count: int
) -> list[int]:
    """What `count` queries of an image are chosen from `tokens`, best first, in plain words."""
    pool = tokens[: POOL * count]
    boxes = head.boxes(proposals)[image, pool]
    usable = [bool(proposals.scores[image, t] > -torch.inf) for t in pool]
    first = [not dropped and use for dropped, use in zip(naive(boxes, 0.5), usable, strict=True)]
    return sorted(pool, key=lambda token: not first[pool.index(token)])[:count]


def proposed(name: str, batch: ImageBatch) -> tuple[ProposalHead, Memory, Proposals]:
    """The proposals of a detector whose boxes have left their anchors and overlap."""
    model = build(small(name, ["none"]).override(ON), CLASSES).eval()
    head = model.detector.queries.head
    assert head is not None
    torch.manual_seed(0)
    with torch.no_grad():
        head.move.get_parameter("layers.2.weight").normal_(std=0.3)
        head.move.get_parameter("layers.2.bias")[2:] = 3
        memory = model.detector.encode(batch)
        return head, memory, head(memory)


@pytest.mark.parametrize("name", TWO_STAGE)
@torch.no_grad()
def test_distinct_proposals_come_first(name: str) -> None:
    head, memory, proposals = proposed(name, images(((64, 96), (32, 64))))
    assert memory.padding is not None
    assert not torch.equal(proposals.best, proposals.ranked(12))  # or this shows nothing
    every = head.boxes(proposals)
    for i in range(2):
        order = proposals.scores[i].argsort(descending=True, stable=True).tolist()
        assert proposals.best[i].tolist() == chosen(head, proposals, i, order, 12)
        torch.testing.assert_close(proposals.boxes[i], every[i, proposals.best[i]])


@torch.no_grad()
def test_further_queries_are_distinct_among_themselves() -> None:
    """The next-best of H-DETR; of Group DETR, which the groups choose in turns."""
    head, _, proposals = proposed("tiny", images())
    every = head.boxes(proposals)
    for copies, count in ((1, 15), (2, 12)):
        boxes = head.further(proposals, count, copies).boxes
        for i in range(2):
            order = proposals.scores[i].argsort(descending=True).tolist()
            left = [t for t in order if t not in proposals.best[i].tolist()][
                : copies * POOL * count
            ]
            left = left[: len(left) // copies * copies]
            rows = [
                t for k in range(copies) for t in chosen(head, proposals, i, left[k::copies], count)
            ]
            torch.testing.assert_close(boxes[i], every[i, rows])


@torch.no_grad()
def test_few_tokens_and_what_can_propose_nothing_comes_last() -> None:
    head, memory, _ = proposed("tiny", images(((64, 96), (32, 32))))
    head.proposals = 100  # the smaller image has 16 + 4 + 1 tokens
    again = head(memory)
    usable = again.scores.gather(1, again.best) > -torch.inf
    assert (usable.long().diff(dim=1) <= 0).all()
    assert not usable.all()
    for row in again.best:
        assert len(set(row.tolist())) == 100
    assert head.further(again, 100).boxes.shape == (2, 26, 4)


@torch.no_grad()
def test_an_image_has_the_same_queries_in_any_batch() -> None:
    head, memory, proposals = proposed("tiny", images(((64, 96), (48, 64), (64, 80))))
    for i in range(3):
        ratios = None if memory.valid_ratios is None else memory.valid_ratios[i : i + 1]
        padding = None if memory.padding is None else memory.padding[i : i + 1]
        alone = head(
            Memory(memory.tokens[i : i + 1], memory.position, memory.shapes, padding, ratios)
        )
        assert torch.equal(alone.best[0], proposals.best[i])


def test_it_has_no_weights_and_costs_the_boxes_of_the_pool() -> None:
    on, off = (
        build(small("dino_r50").override(f"detector.queries.distinct={v}"), CLASSES)
        for v in (0.7, "null")
    )
    off.load_state_dict(on.state_dict())
    on.load_state_dict(off.state_dict())
    recipes = (
        find_recipe("dino-r50").override(f"detector.queries.distinct={v}") for v in (0.7, "null")
    )
    one, other = (measure(recipe, CLASSES).gflops for recipe in recipes)
    box = 256 * 256 * 2 + 256 * 4  # multiply-adds of the box head
    # Both are rounded to 0.01
    assert one - other == pytest.approx((POOL - 1) * 900 * box / 1e9, abs=0.011)


@pytest.mark.parametrize("scheme", ["none", "hybrid", "group=3", "align=1,group=3,co=atss"])
def test_gradients_reach_the_boxes_of_the_chosen(scheme: str) -> None:
    model = build(small("tiny", ["none", scheme]).override(ON), CLASSES)
    losses = model(images(), targets((2, 3))).losses
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert model.detector.queries.head is not None
    grads = [p.grad for p in model.detector.queries.head.move.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)


def test_it_can_be_exported() -> None:
    head, memory, proposals = proposed("tiny", images())

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, tokens: Tensor) -> Tensor:
            best: Tensor = self.head(memory._replace(tokens=tokens)).best
            return best

    program = torch.export.export(Wrapped(), (memory.tokens,))
    assert torch.equal(program.module()(memory.tokens), proposals.best)


@pytest.mark.parametrize("name", ["deformable_detr_r50", "dab_detr_r50"])
def test_queries_without_proposals_have_no_such_field(name: str) -> None:
    with pytest.raises(UserError, match="has no 'distinct'"):
        small(name).override(ON)
