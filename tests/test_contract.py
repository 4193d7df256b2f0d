"""The invariants of docs/architecture.md, over every recipe at a small size.

One recipe of each kind of backbone keeps its own, at its smallest; the others read the maps of a lighter one. Recipes
that come to the same then (DC5 and longer training change nothing of what is tested here) are tested once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from detrellis.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detrellis.nn.neck import MultiScaleNeck, SingleScaleNeck
from detrellis.nn.spatial import AnchorPosition
from detrellis.recipes.build import build
from detrellis.recipes.config import DetectorConfig
from detrellis.schemes.base import QueryBlock, Step
from detrellis.training import TrainableDetector
from detrellis.types import DecoderOutput, ImageBatch, Memory, Queries, Segment, Spatial, Targets

from .small import CLASSES, NAMES, distinct, images, light, small, targets

pytestmark = pytest.mark.filterwarnings("ignore::detrellis.errors.Advice")  # stacks of two that do the same work

# Stacks of schemes: every recipe carries its own and none, one recipe of each network all that it can.
STACKS: dict[str, tuple[str, ...]] = {
    "own": (),
    "none": ("none",),
    "align": ("align=2",),
    "hybrid": ("hybrid=2",),
    "stable": ("stable",),
    "group": ("group=3",),
    "co": ("co=atss+rcnn",),
    "align, hybrid, group": ("align=3", "hybrid=2", "group=2"),
    "align, group, co": ("align=2", "group=2", "co=atss+atss"),
}
NETWORKS = (
    "tiny",
    "detr_r50",
    "conditional_detr_r50",
    "dab_detr_r50",
    "dn_detr_r50",
    "deformable_detr_r50",
    "deformable_detr_r50_two_stage",
    "deformable_detr_r50_two_stage_plus",
    "dab_deformable_detr_r50",
    "dn_deformable_detr_r50",
    "sam_detr_r50",
    "sam_detr_plus_r50_smca_dn",
    "smca_detr_r50",
)
SOFTMAX = {"detr_r50"}  # carries no scheme that sets the classes' targets
OWN_BACKBONE = ("tiny", "detr_r50_dc5", "deformable_detr_swin_l")  # torchvision's, dilated, and a Swin
ONCE = distinct({name: light(small(name)) for name in NAMES if name not in OWN_BACKBONE})
TESTED = [name for name in NAMES if name in OWN_BACKBONE or name in ONCE]
every_recipe = pytest.mark.parametrize("name", TESTED)
every_stack = pytest.mark.parametrize(
    ("name", "stack"),
    [(name, stack) for name in TESTED for stack in ("own", "none")]
    + [
        (name, stack)
        for name in NETWORKS
        for stack in STACKS
        if stack not in ("own", "none") and (name not in SOFTMAX or stack in ("hybrid", "group"))
    ],
)


def make(name: str, stack: str = "own", seed: int = 0) -> TrainableDetector:
    recipe = small(name, STACKS[stack])
    return build(recipe if name in OWN_BACKBONE else light(recipe), CLASSES, seed=seed)


def flat(output: DecoderOutput) -> Tensor:
    return torch.cat([output.logits.flatten(), output.boxes.flatten()])


def train_step(model: TrainableDetector, batch: ImageBatch, truth: Targets) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model.reseed(0)
    torch.manual_seed(0)
    losses = model(batch, truth).losses
    torch.stack(list(losses.values())).sum().backward()
    return losses


# 1. Vanishes


@every_stack
def test_no_scheme_is_in_the_detector(name: str, stack: str) -> None:
    model, plain = make(name, stack), make(name, "none")
    assert list(model.detector.state_dict()) == list(plain.detector.state_dict())
    train_step(model, images(), targets((2, 3)))
    plain.detector.load_state_dict(model.detector.state_dict())
    model.eval()
    plain.eval()
    counts = []
    with torch.no_grad():
        for detector in (model.detector, plain.detector):
            detector.requires_grad_(False)
            with FlopCounterMode(display=False) as counter:
                detector(images())
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1]
        assert torch.equal(flat(model.detector(images())), flat(plain.detector(images())))


# 2. Same seed


@every_stack
def test_schemes_do_not_change_the_detector(name: str, stack: str) -> None:
    one, other, another_seed = make(name, stack), make(name, "none"), make(name, stack, seed=1)
    expected = other.detector.state_dict()
    for key, value in one.detector.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), another_seed.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(flat(one.detector.eval()(images())), flat(other.detector.eval()(images())))


@every_recipe
def test_building_leaves_the_global_generator_alone(name: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    make(name)
    assert torch.equal(torch.rand(1), expected)


# 3. Isolation


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


@every_recipe
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


# 4. Any batch

BATCHES: dict[str, tuple[Any, Targets]] = {
    "usual": (((64, 96), (64, 96)), targets((2, 3))),
    "an image without boxes": (((64, 96), (64, 80)), targets((0, 3))),
    "no boxes at all": (((64, 96), (64, 96)), targets((0, 0))),
    "more targets than queries": (((64, 96), (48, 96)), targets((15, 1))),
    "one-pixel boxes": (((64, 96), (64, 96)), targets((2, 2), side=1 / 96)),
    "boxes of no size": (((64, 96), (64, 96)), targets((2, 2), side=0.0)),
    "a batch of one": (((64, 64),), targets((2,))),
}


@every_stack
def test_any_batch_is_finite_and_trains_the_same_parameters(name: str, stack: str) -> None:
    model = make(name, stack)
    expected = {k for k, p in model.named_parameters() if p.requires_grad}
    for what, (sizes, truth) in BATCHES.items():
        losses = train_step(model, images(sizes), truth)
        bad = [k for k, v in losses.items() if not v.isfinite()]
        assert not bad, (what, bad)
        found = {k for k, p in model.named_parameters() if p.grad is not None}
        assert found == expected, (what, expected ^ found)
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), what
        # An all-zero gradient everywhere would satisfy the above.
        assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0, what


@every_stack
def test_every_parameter_matters(name: str, stack: str) -> None:
    """On a usual batch, after the heads have left their zero start, no parameter's gradient is zero throughout."""
    model = make(name, stack)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    train_step(model, images(((64, 96), (64, 80))), targets((3, 4)))
    idle = {k for k, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0}  # type: ignore[union-attr]
    filled = any(scheme.name == "co" for scheme in model.training_schemes)  # its queries have contents from the start
    assert idle == (set() if filled else reads_only_zeros(small(name).detector))


def reads_only_zeros(detector: DetectorConfig) -> set[str]:
    """A projection of contents alone, in the first layer of a detector whose contents start at 0, cannot learn."""
    zero = detector.content == "zero" and detector.cross_attention in ("conditional", "semantic")
    return {"detector.decoder.layers.0.self_attention.content.weight"} if zero else set()


# 6. Padding


class KeptInside(nn.Module):
    """Semantic attention reads whole regions, and what RoIAlign finds there beyond the image's edge, padding or nothing
    at all, as its reference code does. Here they end at the centres of the outermost cells, so that the rest can be
    shown to be independent."""

    def __init__(self, position: nn.Module) -> None:
        super().__init__()
        self.position = position

    def forward(self, layer: int, x: Tensor, queries: Queries, boxes: Tensor, memory: Memory) -> Spatial:
        where: Spatial = self.position(layer, x, queries, boxes, memory)
        assert where.references is not None
        inside = cxcywh_to_xyxy(where.references).clamp(0.25, 0.75)  # the smallest map below has two cells of image
        return where._replace(references=xyxy_to_cxcywh(inside))


def keep_inside(model: TrainableDetector, name: str) -> None:
    decoder = model.detector.decoder
    if small(name).detector.cross_attention == "semantic":
        decoder.position = KeptInside(decoder.position)


@every_recipe
@torch.no_grad()
def test_what_stands_in_padding_is_never_read(name: str) -> None:
    model = make(name).eval()
    keep_inside(model, name)
    batch = images(((64, 96), (48, 64)))
    memory = model.detector.neck(model.detector.backbone(batch.pixels), batch.padding)
    assert memory.padding is not None
    dirty = memory._replace(tokens=memory.tokens + 100 * memory.padding.unsqueeze(-1))
    outputs = [predict(model, m) for m in (memory, dirty)]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=0)


class WithoutRatios(nn.Module):
    """DINO's query position reads boxes relative to the padded image, as its reference code does: the one place where
    the amount of padding enters the transformer. Taken out here, so that the rest can be shown to be independent."""

    def __init__(self, position: nn.Module) -> None:
        super().__init__()
        self.position = position

    def forward(self, layer: int, x: Tensor, queries: Queries, boxes: Tensor, memory: Memory) -> Spatial:
        out: Spatial = self.position(layer, x, queries, boxes, memory._replace(valid_ratios=None))
        return out


@every_recipe
@torch.no_grad()
def test_padding_further_changes_no_prediction(name: str) -> None:
    """From the projected maps on: convolutions and GroupNorm before them see padding, as in the reference codes."""
    model = make(name).double().eval()
    decoder = model.detector.decoder
    if isinstance(decoder.position, AnchorPosition):
        decoder.position = WithoutRatios(decoder.position)
    keep_inside(model, name)
    neck = model.detector.neck
    assert isinstance(neck, MultiScaleNeck | SingleScaleNeck)
    batch = images(((128, 128), (128, 64)))
    levels = neck.project(model.detector.backbone(batch.pixels.double()))
    assert batch.padding is not None
    plain = neck.flatten(levels, batch.padding)
    grown = [nn.functional.pad(m, (0, m.shape[3], 0, m.shape[2]), value=7.0) for m in levels]
    further = neck.flatten(grown, nn.functional.pad(batch.padding, (0, 128, 0, 128), value=True))
    torch.testing.assert_close(predict(model, plain), predict(model, further), atol=1e-5, rtol=0)


def predict(model: TrainableDetector, memory: Memory) -> Tensor:
    detector = model.detector
    memory = detector.encoder(memory)
    queries, _ = detector.propose(memory)
    return flat(detector.decode(memory, {Segment("main", queries.content.shape[1]): queries})["main"])


@every_recipe
@torch.no_grad()
def test_inference_is_the_last_layer_of_training(name: str) -> None:
    model = make(name).double().eval()
    batch = ImageBatch(images().pixels.double())
    last = model.detector(batch)
    assert last.logits.shape[0] == 1
    every = predict(model, model.detector.neck(model.detector.backbone(batch.pixels), None))
    classes = last.logits.shape[-1]
    logits = every[: every.numel() * classes // (classes + 4)].view(2, -1)
    torch.testing.assert_close(last.logits.flatten(), logits[1], atol=1e-9, rtol=0)


@every_recipe
@torch.no_grad()
def test_detections_are_in_pixels_of_the_original(name: str) -> None:
    model = make(name).eval()
    sizes = torch.tensor([[640, 960], [320, 480]])
    found = model.detector.detect(images(), sizes)
    larger, smaller = (
        d.boxes for d in model.detector.detect(ImageBatch(images().pixels[:1].repeat(2, 1, 1, 1)), sizes)
    )
    torch.testing.assert_close(larger, smaller * 2, atol=1e-2, rtol=1e-4)
    for d in found:
        # One class a query, or several; soft-NMS looks at as many pairs as there are queries.
        few = model.detector.softmax or model.detector.soft_nms is not None
        assert d.scores.shape == (12 if few else 20,)
        assert (d.scores.diff() <= 0).all()
        assert d.labels.max() < CLASSES
