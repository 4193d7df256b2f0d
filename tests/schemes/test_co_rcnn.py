"""Faster and Mask R-CNN as auxiliary heads:
what they propose, sample, read and learn, and any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from detrellis.boxes import pairwise_iou
from detrellis.losses import bce_loss
from detrellis.nn.kernels import roi_cpu
from detrellis.nn.kernels.roi import by_torchvision
from detrellis.schemes.collaborative import roi
from detrellis.schemes.collaborative.anchors import nine_anchors
from detrellis.schemes.collaborative.assigners import BACKGROUND, IGNORED
from detrellis.schemes.collaborative.mask import MaskHead, MaskRCNN, crop_masks
from detrellis.schemes.collaborative.rcnn import CELLS, RCNN, BoxHead, sample_regions
from detrellis.schemes.collaborative.rpn import Proposals, proposals, sample
from detrellis.schemes.collaborative.scene import BranchAssignment, Ints, Scene, random_draw

Boxes = Sequence[Sequence[Sequence[float]]]  # of each image, xyxy
CLASSES, WIDTH, SAMPLES = 3, 16, 24
STRIDES = (8, 16, 32, 64)
SIZE = (96, 128)  # of the largest image
USUAL: Boxes = [
    [(10, 12, 50, 60), (60, 20, 110, 90), (30, 5, 60, 33)],
    [(5, 5, 120, 90), (70, 40, 95, 60)],
]
BATCHES: dict[str, Boxes] = {
    "usual": USUAL,
    "one without targets": [USUAL[0], []],
    "no targets": [[], []],
    "tiny": [[(20, 20, 20.7, 20.9), (40, 40, 41, 43)], USUAL[1]],
    "no size": [[(20, 20, 20, 20), (40, 40, 60, 40)], []],
    "border": [[(-20, -10, 30, 30), (100, 70, 150, 120), (200, 200, 260, 240)], USUAL[1]],
    "crowd": [[(10 + i, 10 + i % 5, 50 + i, 50 + i % 7) for i in range(40)], USUAL[1]],
    "duplicates": [[(10, 10, 50, 50)] * 3, [(10, 10, 50, 50), (11, 10, 51, 50)]],
    "one image": [USUAL[0]],
}
TERMS = ["rpn_class", "rpn_box", "class", "giou"]


def scene(
    images: Boxes = USUAL,
    sizes: Sequence[tuple[int, int]] | None = None,
    *,
    padded: tuple[int, int] = SIZE,
    seed: int = 0,
    masks: bool = True,
) -> Scene:
    """Noise that does not depend on how far images are padded."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(len(images), WIDTH, 24, 32, generator=generator) for _ in STRIDES]
    maps = tuple(
        n[..., : -(-padded[0] // s), : -(-padded[1] // s)].clone().requires_grad_()
        for n, s in zip(noise, STRIDES, strict=True)
    )
    labels = tuple(torch.randint(CLASSES, (len(b),), generator=generator) for b in images)
    boxes = tuple(torch.tensor(b, dtype=torch.float32).view(-1, 4) for b in images)
    patterns = (
        tuple(torch.rand(len(b), 8, 8, generator=generator) > 0.5 for b in images)
        if masks
        else None
    )
    return Scene(
        maps, STRIDES, torch.tensor(sizes or [SIZE] * len(images)).float(), labels, boxes, patterns
    )


def branch(kind: type[RCNN] | type[MaskRCNN] = RCNN, seed: int = 0) -> RCNN | MaskRCNN:
    torch.manual_seed(seed)
    return kind(WIDTH, CLASSES, STRIDES, appended=1, samples=SAMPLES, hidden=32)


def train(
    model: RCNN | MaskRCNN, given: Scene, seed: int = 0
) -> tuple[dict[str, Tensor], list[BranchAssignment]]:
    losses, found = model(given, random_draw(torch.Generator().manual_seed(seed)))
    images = by_image(found)
    (
        torch.stack(list(losses.values())).sum()
        + sum(f.features.sum() + f.logits.sum() for f in images)
    ).backward()
    return losses, images


def by_image(found: BranchAssignment) -> list[BranchAssignment]:
    """The regions of each image, without those that only fill it up."""
    images = [BranchAssignment(*parts) for parts in zip(*found, strict=True)]
    return [BranchAssignment(*(t[f.owner != IGNORED] for t in f)) for f in images]


def first(indices: Ints, k: int) -> Ints:
    return indices[:k]


def astray(model: RCNN | MaskRCNN) -> None:
    """Make it propose only places that no image has."""
    rpn = model.rpn if isinstance(model, RCNN) else model.boxes.rpn
    assert rpn.regress.bias is not None
    with torch.no_grad():
        rpn.regress.bias.view(-1, 4)[:, 0] = 100


@pytest.mark.parametrize("kind", [RCNN, MaskRCNN])
@pytest.mark.parametrize("batch", BATCHES)
def test_any_batch(batch: str, kind: type[RCNN] | type[MaskRCNN]) -> None:
    model, given = branch(kind), scene(BATCHES[batch])
    losses, found = train(model, given)
    assert list(losses) == TERMS + (["mask"] if kind is MaskRCNN else [])
    assert all(v.isfinite() for v in losses.values()), losses
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(m.grad is not None and m.grad.isfinite().all() for m in given.maps)
    if batch in ("no targets", "no size"):
        assert all(losses[name] == 0 for name in set(losses) - {"rpn_class", "class"})
        assert all((f.owner == BACKGROUND).all() for f in found)
    for f, boxes in zip(found, given.boxes, strict=True):
        assert len(f.boxes) == len(f.owner) == len(f.features) == len(f.logits) <= SAMPLES
        assert (f.owner < len(boxes)).all()
        assert not f.boxes.requires_grad
        assert f.logits.shape[1] == CLASSES + 1


@pytest.mark.parametrize("regions", [5, 0])
def test_the_convolutional_head_moves_one_box_for_all_classes(regions: int) -> None:
    head = BoxHead(32, CLASSES, 24, convolutional=True)
    states = head(torch.randn(regions, CELLS, CELLS, 32))
    deltas = head.deltas(states)
    assert (head.logits(states).shape, deltas.shape) == (
        (regions, CLASSES + 1),
        (regions, CLASSES, 4),
    )
    assert torch.equal(deltas, deltas[:, :1].expand_as(deltas))
    coders = [
        RCNN(32, CLASSES, STRIDES, appended=1, samples=8, hidden=24, convolutional=c).coder
        for c in (True, False)
    ]
    assert coders == [(0.05, 0.1), (0.1, 0.2)]


@pytest.mark.parametrize("kind", [RCNN, MaskRCNN])
def test_no_proposals(kind: type[RCNN] | type[MaskRCNN]) -> None:
    model = branch(kind)
    astray(model)
    for batch, regions in (("usual", [3, 2]), ("no targets", [0, 0])):
        model.zero_grad()
        losses, found = train(model, scene(BATCHES[batch]))
        assert [len(f.boxes) for f in found] == regions
        assert all(v.isfinite() for v in losses.values()), losses
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert [len(p.scores) for p in model.predict(scene())] == [0, 0]


def test_an_image_smaller_than_a_cell() -> None:
    given = scene([[(0, 0, 3, 4)], USUAL[1]], [(5, 4), SIZE])
    losses, found = train(branch(), given)
    assert all(v.isfinite() for v in losses.values()), losses
    assert (found[0].boxes <= torch.tensor([4, 5, 4, 5])).all()


@pytest.mark.parametrize("kind", [RCNN, MaskRCNN])
def test_a_usual_batch_moves_every_parameter(kind: type[RCNN] | type[MaskRCNN]) -> None:
    model, given = branch(kind), scene()
    losses, _ = train(model, given)
    assert all(v > 0 for v in losses.values()), losses
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_regions() -> None:
    """Targets are positives of themselves;
    positives come first, are a quarter at most, and touch their owner.
    """
    for batch in ("usual", "crowd", "duplicates"):
        given = scene(BATCHES[batch])
        _, found = train(branch(), given)
        for f, boxes in zip(found, given.boxes, strict=True):
            positive = int((f.owner >= 0).sum())
            assert 0 < positive <= SAMPLES // 4
            assert (f.owner[:positive] >= 0).all()
            overlap = pairwise_iou(f.boxes, boxes)
            assert (overlap[range(positive), f.owner[:positive]] >= 0.5).all()
            assert (overlap[positive:].amax(1) < 0.5).all()
    boxes = scene().boxes[0]
    far = torch.tensor([[100.0, 60.0, 120.0, 90.0]]).repeat(50, 1)
    proposed = torch.cat([boxes + 1, far])[None]
    regions = sample_regions(
        Proposals(proposed, torch.ones(proposed.shape[:2], dtype=torch.bool)),
        scene([USUAL[0]]),
        SAMPLES,
        first,
    )
    assert torch.equal(regions.boxes[0], torch.cat([boxes, boxes + 1, far])[:SAMPLES])
    assert regions.owner[0].tolist() == [0, 1, 2] * 2 + [BACKGROUND] * (SAMPLES - 6)
    assert regions.there == SAMPLES


def test_sampling_fills_up_with_background() -> None:
    owner = np.array([0, BACKGROUND, 1, -2, BACKGROUND, 0, BACKGROUND])
    for count, most, expected in (
        (4, 2, [0, 2, 1, 4]),
        (6, 3, [0, 2, 5, 1, 4, 6]),
        (2, 1, [0, 1]),
    ):
        assert sample(owner, first, count, most).tolist() == expected


def test_how_many_anchors_learn() -> None:
    asked: list[tuple[int, int]] = []

    def draw(indices: Ints, k: int) -> Ints:
        asked.append((min(len(indices), k), k))
        return indices[:k]

    branch()(scene(), draw)
    for (positive, most), (_, rest) in zip(asked[:4:2], asked[1:4:2], strict=True):
        assert most == 128
        assert rest == 256 - positive
        assert positive > 0


def test_same_draws_same_result() -> None:
    given = scene(BATCHES["crowd"])
    (one, found), (two, again), (other, _) = (train(branch(), given, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert all(
        torch.equal(a, b)
        for f, g in zip(found, again, strict=True)
        for a, b in zip(f, g, strict=True)
    )
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_features_are_means_of_the_regions() -> None:
    model, given = branch(), scene()
    assert isinstance(model, RCNN)
    _, found = train(model, given)
    image = torch.arange(len(found)).repeat_interleave(torch.tensor([len(f.boxes) for f in found]))
    regions = torch.cat([f.boxes for f in found])
    features = roi.region_features(given.maps[:3], STRIDES[:3], regions, image, CELLS)
    torch.testing.assert_close(torch.cat([f.features for f in found]), features.mean((1, 2)))


@pytest.mark.parametrize("appended", [2, 3])
def test_appended_maps_are_not_read_by_regions(appended: int) -> None:
    model = RCNN(WIDTH, CLASSES, STRIDES, appended=appended, samples=SAMPLES, hidden=32)
    given = scene()._replace(strides=(2, 4, 8, 16))  # a target of 99 pixels is large then
    model(given, first)[1].features.sum().backward()
    read = [m.grad is not None and bool(m.grad.any()) for m in given.maps]
    assert read == [True, appended == 2, False, False]


@pytest.mark.parametrize("kind", [RCNN, MaskRCNN])
def test_autocast(kind: type[RCNN] | type[MaskRCNN]) -> None:
    plain, _ = train(branch(kind), scene())
    with torch.autocast("cpu", torch.bfloat16):
        losses, found = train(branch(kind), scene())
    assert all(v.dtype == torch.float32 for v in losses.values())
    assert all(f.logits.dtype == f.features.dtype == torch.float32 for f in found)
    for name in ("rpn_class", "class"):
        torch.testing.assert_close(losses[name], plain[name], rtol=0.05, atol=0)
    assert all(v.isfinite() for v in losses.values())


def test_proposals_stay_in_their_image() -> None:
    """How far an image is padded does not matter."""
    model, sizes = branch(), [(40, 64), (96, 100)]
    assert isinstance(model, RCNN)
    found = []
    for padded in (SIZE, (160, 192)):
        given = scene(sizes=sizes, padded=padded)
        # Noise beyond the border is no padding: the convolution must not see it.
        for level, stride in zip(given.maps, STRIDES, strict=True):
            for own, (h, w) in zip(level.detach(), sizes, strict=True):
                own[:, -(-h // stride) :] = 0
                own[:, :, -(-w // stride) :] = 0
        boxes, valid = proposals(
            model.rpn(given.maps), nine_anchors(given), given, before=500, limit=40
        )
        found.append([b[v] for b, v in zip(boxes, valid, strict=True)])
    for here, there, (height, width) in zip(*found, sizes, strict=True):
        torch.testing.assert_close(here, there)
        assert len(here) == 40
        assert (here[:, 2:] > here[:, :2]).all()
        assert ((here >= 0) & (here <= torch.tensor([width, height, width, height]))).all()


def test_levels() -> None:
    sides = torch.tensor([0.0, 1.0, 223.0, 224.0, 447.0, 448.0, 4000.0])
    boxes = torch.cat([torch.zeros(7, 2), sides[:, None].expand(-1, 2)], dim=1)
    assert roi.region_levels(boxes, (8, 16, 32)).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert roi.region_levels(boxes / 2, (4, 8, 16)).tolist() == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("cells", [7, 14])
def test_the_fast_path_equals_torchvision(cells: int) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(2, 3, h, w, generator=generator, dtype=torch.float64)
        for h, w in ((12, 16), (6, 8), (3, 4))
    ]
    low = torch.rand(60, 2, generator=generator, dtype=torch.float64) * 160 - 40
    size = torch.rand(60, 2, generator=generator, dtype=torch.float64) ** 2 * 150
    size[:4] = torch.tensor([[0, 0], [0, 20], [1, 1], [300, 300]])
    boxes = torch.cat([low, low + size], dim=1)
    image, level = (torch.randint(n, (60,), generator=generator) for n in (2, 3))
    results = []
    for path in (by_torchvision, roi_cpu.align):
        leaves = [m.clone().requires_grad_() for m in maps]
        features = path(leaves, (8, 16, 32), boxes, image, level, cells)
        weights = torch.randn(
            features.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        (features * weights).sum().backward()
        assert features.shape == (60, cells, cells, 3)
        results.append([features, *(m.grad for m in leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shift", [(0, 0), (7, -5), (-12, 9)])
def test_mask_targets(shift: tuple[int, int]) -> None:
    """An ellipse in its box, as regions beside it see it."""
    box = torch.tensor([[20.0, 30.0, 68.0, 66.0]])
    x, y = (torch.arange(112) + 0.5) / 56 - 1, (torch.arange(112)[:, None] + 0.5) / 56 - 1
    mask = (x**2 + y**2 <= 1)[None]
    region = box + torch.tensor([*shift, *shift]) * torch.tensor([1, 1, 1.2, 0.9])
    target = crop_masks(mask, box, region, cells=28)[0]
    steps = (torch.arange(28) + 0.5) / 28
    x, y = (region[0, i] + steps * (region[0, i + 2] - region[0, i]) for i in (0, 1))
    direct = ((x - 44) / 24) ** 2 + ((y[:, None] - 48) / 18) ** 2 <= 1
    assert 300 < direct.sum() < 28 * 28
    assert (target != direct).sum() <= 6
    assert not crop_masks(torch.zeros_like(mask), box, region, cells=28).any()
    assert not crop_masks(mask, box, region + 100, cells=28).any()


def test_masks_are_needed() -> None:
    with pytest.raises(AssertionError, match="needs targets with masks"):
        branch(MaskRCNN)(scene(masks=False), first)


def test_the_mask_of_the_label_learns() -> None:
    torch.manual_seed(0)
    head, labels = MaskHead(WIDTH, CLASSES), torch.tensor([0, 2, 0])
    features, wanted = torch.randn(3, 14, 14, WIDTH), torch.zeros(3, 28, 28)
    features[:, 3:9, 2:8] += 3
    wanted[:, 6:18, 4:16] = 1
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(40):
        loss = bce_loss(head(features, labels), wanted).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert head.classify.weight.grad is not None
        assert not head.classify.weight.grad[1].any()
    assert ((head(features, labels) > 0) == wanted).float().mean() > 0.95
    every = head.classify(head.upsample(head.tower(features.permute(0, 3, 1, 2))).relu())
    torch.testing.assert_close(head(features, labels), every[range(3), labels])


def test_predictions_of_a_trained_branch() -> None:
    """Taught the same two images over and over, it finds their objects again."""
    model, given = branch(), scene([[(8, 8, 56, 56), (64, 24, 120, 88)], [(24, 16, 88, 80)]])
    given = given._replace(maps=tuple(m.detach() for m in given.maps))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    draw = random_draw(torch.Generator().manual_seed(0))
    history = []
    for _ in range(100):
        losses, _ = model(given, draw)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        history.append({k: v.item() for k, v in losses.items()})
    # Not "giou": good proposals are positives, and there are more and more of them.
    assert all(history[-1][k] < history[0][k] / 2 for k in ("rpn_class", "rpn_box", "class")), (
        history[0],
        history[-1],
    )
    for found, labels, boxes in zip(model.predict(given), given.labels, given.boxes, strict=True):
        assert 0 < len(found.scores) <= 100
        assert (found.scores.diff() <= 0).all()
        assert ((found.scores > 0) & (found.scores <= 1)).all()
        assert ((found.boxes >= 0) & (found.boxes <= torch.tensor([128, 96, 128, 96]))).all()
        right = (pairwise_iou(boxes, found.boxes) > 0.7) & (labels[:, None] == found.labels)
        assert (right * found.scores).amax(1).min() > 0.5
        same = (found.labels[:, None] == found.labels).triu(1)
        assert pairwise_iou(found.boxes, found.boxes)[same].max() <= 0.5
