"""The dense auxiliary heads:
what golden vectors do not say about their assignment, losses and detections.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detrellis.boxes import pairwise_iou
from detrellis.losses import distribution_focal_loss
from detrellis.schemes.collaborative import assigners, dense
from detrellis.schemes.collaborative.anchors import grid_points, usable_cells
from detrellis.schemes.collaborative.assigners import BACKGROUND, IGNORED
from detrellis.schemes.collaborative.atss import ATSS
from detrellis.schemes.collaborative.dense import DenseOutput, by_anchor
from detrellis.schemes.collaborative.fcos import FCOS
from detrellis.schemes.collaborative.gfl import BINS, FARTHEST, GFL, distances
from detrellis.schemes.collaborative.paa import PAA, fit_mixture, likely_positives
from detrellis.schemes.collaborative.retinanet import RetinaNet
from detrellis.schemes.collaborative.scene import BranchAssignment, Scene, random_draw
from detrellis.schemes.ranks import rank

BRANCHES = [ATSS, RetinaNet, FCOS, GFL, PAA]
TERMS = {
    ATSS: {"class", "giou", "centerness"},
    RetinaNet: {"class", "giou"},
    FCOS: {"class", "giou", "centerness"},
    GFL: {"class", "giou", "dfl"},
    PAA: {"class", "giou", "iou"},
}
Dense = type[ATSS | RetinaNet | FCOS | GFL | PAA]
WIDTH, CLASSES = 32, 5
STRIDES = (8, 16, 32, 64, 128)
SIZES = ((96, 128), (70, 101))  # the second is padded
Boxes = Sequence[Sequence[Sequence[float]] | Tensor]  # of each image, (n, 4) xyxy
USUAL: tuple[list[list[float]], list[list[float]]] = (
    [[10.0, 10, 60, 50], [30, 20, 90, 90], [64, 8, 96, 40]],
    [[8.0, 8, 60, 60]],
)

every_branch = pytest.mark.parametrize("branch", BRANCHES, ids=lambda b: b.name)


def make_scene(
    boxes: Boxes,
    sizes: Sequence[tuple[int, int]] = SIZES,
    strides: tuple[int, ...] = STRIDES,
    width: int = WIDTH,
    padding: tuple[int, int] = (0, 0),
) -> Scene:
    """Random maps of images padded to the largest, and by as many pixels more;
    the classes follow each other.
    """
    generator = torch.Generator().manual_seed(0)
    height, length = (max(size[i] for size in sizes) + padding[i] for i in (0, 1))
    shapes = [(math.ceil(height / s), math.ceil(length / s)) for s in strides]
    maps = tuple(torch.randn(len(sizes), width, *shape, generator=generator) for shape in shapes)
    own = tuple(torch.as_tensor(b, dtype=torch.float32).view(-1, 4) for b in boxes)
    return Scene(
        maps,
        strides,
        torch.tensor(sizes).float(),
        tuple(torch.arange(len(b)) % CLASSES for b in own),
        own,
    )


def make(branch: Dense, scene: Scene) -> ATSS | RetinaNet | FCOS | GFL | PAA:
    torch.manual_seed(0)
    return branch(WIDTH, CLASSES, len(scene.maps))


def by_image(found: BranchAssignment) -> list[BranchAssignment]:
    return [BranchAssignment(*parts) for parts in zip(*found, strict=True)]


DRAW = random_draw(torch.Generator().manual_seed(0))


def outputs(branch: ATSS | RetinaNet | FCOS | GFL | PAA, scene: Scene) -> list[list[Tensor]]:
    """Random classes, boxes and quality,
    each `(B, n, H, W)` for every level, as a head's convolutions give them.
    """
    head, generator = branch.head, torch.Generator().manual_seed(1)
    channels = [
        head.classify.out_channels,
        head.regress.out_channels,
        head.anchors if head.quality else 0,
    ]
    offsets = [-3.0, 1.0, 0.0]
    return [
        [torch.randn(len(m), n, *m.shape[2:], generator=generator) / 2 + offset for m in scene.maps]
        for n, offset in zip(channels, offsets, strict=True)
    ]


def read(
    branch: ATSS | RetinaNet | FCOS | GFL | PAA, maps: Sequence[Sequence[Tensor]]
) -> DenseOutput:
    logits, regression, quality = (by_anchor(m, branch.head.anchors) for m in maps)
    regression = regression.relu() if branch.name == "fcos" else regression
    return DenseOutput(logits, regression, quality.squeeze(-1) if branch.quality else None)


def random_boxes(count: int, size: tuple[int, int], seed: int = 0, least: float = 0.0) -> Tensor:
    """Boxes inside an image, of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator).sort(1).values
    boxes = corners.flatten(1) * torch.tensor([size[1], size[0]] * 2)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + least)
    return boxes


# Targets of all kinds

UNUSUAL: dict[str, Boxes] = {
    "usual": USUAL,
    "none in one image": ([], USUAL[1]),
    "none": ([], []),
    "one pixel": ([[40.0, 40, 41, 41], [63.2, 71.9, 64.2, 72.9]], [[8.0, 8, 9, 9]]),
    "at the border": (
        [[0.0, 0, 20, 96], [100, 80, 128, 96]],
        [[61.0, 50, 101, 70], [0, 0, 101, 70]],
    ),
    "across the border": ([[-30.0, -20, 10, 15]], [[90.0, 60, 160, 120]]),
    "outside": ([[200.0, 200, 260, 260]], [[-80.0, -80, -20, -20]]),
    "crowded": (random_boxes(60, (96, 128)), random_boxes(60, (70, 101), seed=1)),
    "duplicates": (USUAL[0] * 3, [USUAL[1][0]] * 9),
    "no size": ([[40.0, 40, 40, 40], [20, 20, 20, 60]], [[16.0, 16, 48, 16], *USUAL[1]]),
    "larger than any anchor": ([[-900.0, -900, 900, 900]], [[0.0, 0, 4000, 3]]),
}


@every_branch
@pytest.mark.parametrize("case", UNUSUAL)
@pytest.mark.parametrize("strides", [STRIDES, (4, 8, 16, 32), (16, 32, 64, 128)], ids=str)
def test_losses_and_gradients_are_finite(
    branch: Dense, case: str, strides: tuple[int, ...]
) -> None:
    scene = make_scene(UNUSUAL[case], strides=strides)
    for m in scene.maps:
        m.requires_grad_()
    head = make(branch, scene)
    losses, found = head(scene, DRAW)
    assert losses.keys() == TERMS[branch]
    assert all(v.isfinite() and v >= 0 for v in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    read_from = [(n, p.grad) for n, p in head.named_parameters()] + [
        (str(i), m.grad) for i, m in enumerate(scene.maps)
    ]
    assert not [
        name for name, gradient in read_from if gradient is None or not gradient.isfinite().all()
    ]
    for own, boxes in zip(by_image(found), scene.boxes, strict=True):
        assert own.owner.min() >= IGNORED
        assert own.owner.max() < len(boxes)
        assert own.boxes.shape == (len(own.logits), 4)
        assert len(own.boxes) == len(own.features) * head.head.anchors


@every_branch
@pytest.mark.parametrize("pairs", [1, 2**24], ids=["one by one", "together"])
def test_an_images_owners_are_those_it_has_alone(
    branch: Dense, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside images with more targets and with none, some of them smaller, padding is none of it."""
    monkeypatch.setattr(dense, "PAIRS", pairs)
    boxes, sizes = (*USUAL, [], [[1.0, 1, 9, 9]]), (*SIZES, (96, 60), (10, 11))
    scene = make_scene(boxes, sizes, padding=(40, 40))
    head = make(branch, scene)
    _, found = head(scene, DRAW)
    assert (found.owner >= 0).any()
    for i in range(len(boxes)):
        alone = scene._replace(
            maps=tuple(m[i : i + 1] for m in scene.maps),
            sizes=scene.sizes[i : i + 1],
            labels=scene.labels[i : i + 1],
            boxes=scene.boxes[i : i + 1],
        )
        assert torch.equal(head(alone, DRAW)[1].owner[0], found.owner[i])


@every_branch
def test_without_targets_only_the_classes_learn(branch: Dense) -> None:
    scene = make_scene(([], []))
    losses, found = make(branch, scene)(scene, DRAW)
    assert losses["class"] > 0
    assert all(value == 0 for name, value in losses.items() if name != "class")
    assert (found.owner < 0).all()


@every_branch
def test_a_target_of_no_size_owns_nothing_and_takes_nothing(branch: Dense) -> None:
    scene = make_scene(USUAL)
    more = scene._replace(
        boxes=(torch.cat([scene.boxes[0], torch.tensor([[40.0, 40, 40, 40]])]), scene.boxes[1]),
        labels=(torch.cat([scene.labels[0], torch.tensor([0])]), scene.labels[1]),
    )
    head = make(branch, scene)
    maps = outputs(head, scene)
    losses, _, owners = head.supervise(read(head, maps), scene)
    with_it, _, same = head.supervise(read(head, maps), more)
    assert torch.equal(owners, same)
    assert losses == with_it


@every_branch
def test_every_parameter_learns(branch: Dense) -> None:
    # Each level has targets of its size: its own factor learns too.
    strides = (2, 4, 8, 16, 32)
    boxes = [[[4.0, 4, 4 + n * s, 4 + n * s] for s in strides] for n in (5, 10)]
    scene = make_scene(boxes, ((330, 330), (330, 330)), strides)
    head = make(branch, scene)
    losses, _ = head(scene, DRAW)
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, name
    assert head.head.scale.grad is not None
    assert (head.head.scale.grad != 0).all()


@every_branch
def test_half_precision(branch: Dense) -> None:
    scene = make_scene(USUAL)
    head = make(branch, scene)
    exact, _ = head(scene, DRAW)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = head(scene, DRAW)
        found = head.predict(scene)
    torch.stack(list(losses.values())).sum().backward()
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.1, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert all(own.scores.isfinite().all() and own.boxes.isfinite().all() for own in found)


# Padding


@every_branch
def test_padding_learns_nothing(branch: Dense) -> None:
    scene = make_scene(([], [[60.0, 40, 120, 90]]), ((64, 160), (45, 70)))
    head = make(branch, scene)
    output = read(head, outputs(head, scene))
    output.logits.requires_grad_()
    losses, _, owners = head.supervise(output, scene)
    losses["class"].backward()
    usable = usable_cells(scene.shapes, scene.strides, scene.sizes).repeat_interleave(
        head.head.anchors, dim=1
    )
    assert not usable.all()
    assert (owners[~usable] == IGNORED).all()
    assert output.logits.grad is not None
    moved = output.logits.grad.abs().sum(-1) > 0
    assert not moved[~usable].any()
    assert torch.equal(moved[usable], owners[usable] != IGNORED)


@every_branch
@given(
    right=st.integers(0, 200),
    below=st.integers(0, 200),
    count=st.integers(0, 12),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_more_padding_changes_no_loss(
    branch: Dense, right: int, below: int, count: int, seed: int
) -> None:
    boxes = tuple(random_boxes(n, size, seed) for n, size in zip((count, 3), SIZES, strict=True))
    small, large = make_scene(boxes), make_scene(boxes, padding=(below, right))
    head = make(branch, small)
    wide = outputs(head, large)
    cut = [
        [m[..., :h, :w] for m, (h, w) in zip(levels, small.shapes, strict=True)] for levels in wide
    ]
    few, _, owners = head.supervise(read(head, cut), small)
    many, _, more = head.supervise(read(head, wide), large)
    assert (owners >= 0).sum() == (more >= 0).sum()
    for name, value in few.items():
        torch.testing.assert_close(many[name], value, rtol=1e-5, atol=1e-6)


# Detections


@every_branch
def test_predictions_are_ranked_and_inside_their_image(branch: Dense) -> None:
    scene = make_scene(USUAL)
    head = make(branch, scene)
    found = head.predict(scene)
    assert len(found) == 2
    for own, (height, width) in zip(found, SIZES, strict=True):
        assert 0 < len(own.scores) <= 100
        assert (own.scores.diff() <= 0).all()
        assert ((own.labels >= 0) & (own.labels < CLASSES)).all()
        assert (own.boxes >= 0).all()
        assert (own.boxes <= torch.tensor([width, height, width, height])).all()
        assert not own.scores.requires_grad


@every_branch
def test_what_the_losses_ask_for_is_what_is_predicted(
    branch: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make_scene(([[10.0, 10, 60, 50], [70, 40, 120, 90]], [[8.0, 8, 60, 60]]))
    head = make(branch, scene)
    maps = outputs(head, scene)
    free = [m.requires_grad_() for levels in maps for m in levels if m.numel()]
    optimizer = torch.optim.Adam(free, lr=0.1)
    for _ in range(120):
        optimizer.zero_grad()
        torch.stack(list(head.supervise(read(head, maps), scene)[0].values())).sum().backward()
        optimizer.step()
    monkeypatch.setattr(head.head, "forward", lambda _: read(head, maps))
    for own, boxes, labels in zip(head.predict(scene), scene.boxes, scene.labels, strict=True):
        overlap, best = pairwise_iou(boxes, own.boxes[: len(boxes)]).max(1)
        assert (overlap > 0.8).all()
        assert torch.equal(own.labels[best], labels)


@every_branch
def test_padding_predicts_nothing(branch: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make_scene(([], []), ((64, 160), (16, 16)), (8, 16))
    head = make(branch, scene)
    output = read(head, outputs(head, scene))
    usable = usable_cells(scene.shapes, scene.strides, scene.sizes).repeat_interleave(
        head.head.anchors, dim=1
    )
    sure = torch.where(usable.unsqueeze(-1), output.logits, 10.0)
    monkeypatch.setattr(head.head, "forward", lambda _: output._replace(logits=sure))
    for own, few, logits in zip(head.predict(scene), usable, output.logits, strict=True):
        assert own.scores.min() > 0
        assert own.scores.max() <= logits[few].sigmoid().max().sqrt()
        assert len(own.scores) <= few.sum() * CLASSES


# Each head's own


def test_retinanet_ignores_what_overlaps_somewhat() -> None:
    scene = make_scene(USUAL, SIZES[:1] * 2)
    _, found = make(RetinaNet, scene)(scene, DRAW)
    for own, boxes in zip(by_image(found), scene.boxes, strict=True):
        overlap = pairwise_iou(own.boxes, boxes)
        best, owner = overlap.max(1)
        claimed = (overlap == overlap.amax(0)).any(1)
        assert (own.owner[claimed] >= 0).all()
        assert torch.equal(own.owner[(best >= 0.5) & ~claimed], owner[(best >= 0.5) & ~claimed])
        assert (own.owner[(best >= 0.4) & (best < 0.5) & ~claimed] == IGNORED).all()
        assert (own.owner[(best < 0.4) & ~claimed] == BACKGROUND).all()
        assert {IGNORED, BACKGROUND} < set(own.owner.tolist())


def test_fcos_stands_for_eight_strides() -> None:
    scene = make_scene(USUAL)
    _, found = make(FCOS, scene)(scene, DRAW)
    side = found.boxes[0, :, 2:] - found.boxes[0, :, :2]
    counts = [h * w for h, w in scene.shapes]
    assert [s.unique().tolist() for s in side.split(counts)] == [
        [64.0],
        [128.0],
        [256.0],
        [512.0],
        [1024.0],
    ]
    assert found.boxes[0, 0].tolist() == [-28, -28, 36, 36]


def slow_fcos(point: Tensor, boxes: Tensor, stride: int, low: float, high: float) -> int:
    """The rule for one point, as a loop."""
    owner, least = BACKGROUND, float("inf")
    for i, (left, top, right, bottom) in enumerate(boxes.tolist()):
        x, y = point.tolist()
        cx, cy, reach = (left + right) / 2, (top + bottom) / 2, 1.5 * stride
        inside = max(left, cx - reach) < x < min(right, cx + reach) and max(
            top, cy - reach
        ) < y < min(bottom, cy + reach)
        fits = low <= max(x - left, right - x, y - top, bottom - y) <= high
        area = (right - left) * (bottom - top)
        if inside and fits and area < least:
            owner, least = i, area
    return owner


@given(count=st.integers(1, 12), seed=st.integers(0, 999), finest=st.sampled_from([4, 8, 16]))
@settings(max_examples=40, deadline=None)
def test_fcos_assigns_by_place_and_size(count: int, seed: int, finest: int) -> None:
    strides = (finest, 2 * finest, 4 * finest)
    # Whole numbers: sides, limits and areas are met exactly.
    boxes = random_boxes(count, (160, 160), seed).round()
    shapes = [(160 // s, 160 // s) for s in strides]
    points = grid_points(shapes, strides, boxes, offset=0.5)
    counts = [h * w for h, w in shapes]
    limits = [-1, 8 * strides[0], 8 * strides[1], math.inf]
    expected = [
        slow_fcos(point, boxes, strides[i], limits[i], limits[i + 1])
        for i, own in enumerate(points.split(counts))
        for point in own
    ]
    assert assigners.fcos(points, counts, boxes, strides=strides).tolist() == expected


def test_gfl_reads_and_learns_distances() -> None:
    wanted = torch.tensor([[0.0, 1.25, 7.5, FARTHEST]])
    low = wanted.long()
    share = wanted - low
    shares = torch.zeros(1, 4, BINS).scatter(2, low.unsqueeze(-1), (1 - share).unsqueeze(-1))
    shares = shares.scatter(2, low.unsqueeze(-1) + 1, share.unsqueeze(-1))
    logits = (shares + 1e-12).log().requires_grad_()
    torch.testing.assert_close(distances(logits.flatten(1)), wanted)
    distribution_focal_loss(logits.view(-1, BINS), wanted.flatten()).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-5)


def test_distribution_focal_loss_of_a_whole_distance_is_cross_entropy() -> None:
    logits, whole = torch.randn(16, BINS), torch.arange(16)
    expected = torch.nn.functional.cross_entropy(logits, whole, reduction="none")
    torch.testing.assert_close(distribution_focal_loss(logits, whole.float()), expected)
    assert distribution_focal_loss(logits[:0], whole[:0].float()).shape == (0,)


# PAA's mixture


def slow_mixture(values: list[float]) -> list[bool]:
    """Which of one target's ascending losses are positive, one number at a time."""
    share, mean, variance = [0.5, 0.5], [values[0], values[-1]], [1.0, 1.0]

    def densities(x: float) -> list[float]:
        parts = zip(share, mean, variance, strict=True)
        return [
            s / math.sqrt(2 * math.pi * v) * math.exp(-((x - m) ** 2) / (2 * v))
            for s, m, v in parts
        ]

    last = -math.inf
    for _ in range(100):
        every = [densities(x) for x in values]
        likelihood = sum(math.log(sum(d)) for d in every) / len(values)
        for k in (0, 1):
            part = [d[k] / sum(d) for d in every]
            share[k] = sum(part) / len(values)
            mean[k] = sum(p * x for p, x in zip(part, values, strict=True)) / sum(part)
            spread = sum(p * (x - mean[k]) ** 2 for p, x in zip(part, values, strict=True))
            variance[k] = spread / sum(part) + 1e-6
        if abs(likelihood - last) < 1e-3:
            break
        last = likelihood
    every = [densities(x) for x in values]
    lower = [d[0] >= d[1] for d in every]
    top = max(math.log(sum(d)) for d, own in zip(every, lower, strict=True) if own)
    densest = min(i for i, d in enumerate(every) if lower[i] and math.log(sum(d)) > top - 1e-6)
    return [own and i <= densest for i, own in enumerate(lower)]


@given(counts=st.lists(st.integers(2, 20), min_size=1, max_size=6), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_the_mixture_of_each_target_is_its_own(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [
        (torch.rand(n, generator=generator, dtype=torch.float64) * 3).sort().values for n in counts
    ]
    table = torch.full((len(rows), 24), float("nan"), dtype=torch.float64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    likely = likely_positives(table)
    for own, row in zip(likely.tolist(), rows, strict=True):
        assert own[: len(row)] == slow_mixture(row.tolist())
        assert not any(own[len(row) :])


def test_two_clusters_are_told_apart() -> None:
    losses = torch.tensor([[1.0, 1.1, 1.2, 1.2, 5.0, 5.1, 5.2]], dtype=torch.float64)
    mixture = fit_mixture(losses, torch.ones_like(losses, dtype=torch.bool))
    torch.testing.assert_close(
        mixture.mean, torch.tensor([[1.125, 5.1]], dtype=torch.float64), rtol=0, atol=1e-3
    )
    torch.testing.assert_close(
        mixture.weight, torch.tensor([[4 / 7, 3 / 7]], dtype=torch.float64), rtol=0, atol=1e-3
    )
    assert likely_positives(losses)[0].tolist()[4:] == [False] * 3
    assert likely_positives(losses)[0, 0]


def test_the_lower_component_need_not_hold_the_least_loss() -> None:
    losses = torch.tensor([[0.1, 0.8, 1.0, 1.0, 1.0, 1.1, 1.1, 1.1, 1.1, 2.2]], dtype=torch.float64)
    assert likely_positives(losses).int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]]
    assert slow_mixture(losses[0].tolist()) == likely_positives(losses)[0].tolist()


def test_mixtures_of_few_or_equal_losses() -> None:
    nan, inf = float("nan"), float("inf")
    losses = torch.tensor(
        [[nan] * 4, [1.0, nan, nan, nan], [2.0] * 4, [1.0, inf, nan, nan], [1.0, 9.0, nan, nan]]
    )
    assert likely_positives(losses).int().tolist() == [
        [0] * 4,
        [0] * 4,
        [1, 0, 0, 0],
        [0] * 4,
        [1, 0, 0, 0],
    ]
    assert likely_positives(losses[:0]).shape == (0, 4)


@given(groups=st.lists(st.integers(0, 4), max_size=30), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_places_within_groups(groups: list[int], seed: int) -> None:
    group = torch.tensor(groups, dtype=torch.long)
    values = torch.rand(len(groups), generator=torch.Generator().manual_seed(seed))
    expected = [
        sum(g == groups[i] and v < values[i] for g, v in zip(groups, values, strict=True))
        for i in range(len(groups))
    ]
    assert rank(-values, group).tolist() == expected


def test_paa_keeps_the_best_of_each_level_at_most() -> None:
    scene = make_scene(USUAL, ((256, 256), (256, 256)))
    head = make(PAA, scene)
    _, _, owners = head.supervise(read(head, outputs(head, scene)), scene)
    for level in owners.split([h * w for h, w in scene.shapes], dim=1):
        for own, boxes in zip(level, scene.boxes, strict=True):
            assert (torch.bincount(own[own >= 0], minlength=len(boxes)) <= 9).all()
    assert (owners >= 0).sum() > 0
    assert not (owners == IGNORED).any()
