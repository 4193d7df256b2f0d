"""What the invariants of docs/architecture.md are tested on:
every recipe at a small size, and stacks of schemes.

One recipe of each kind of backbone keeps its own, at its smallest; the others read the maps of a
lighter one. Recipes that come to the same then (DC5 and longer training change nothing of what is
tested here) are tested once: for what the detector does alone, those with the same detector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from detrellis.detector import Detector
from detrellis.recipes.build import build
from detrellis.recipes.config import Recipe
from detrellis.schemes.base import Step
from detrellis.training import TrainableDetector
from detrellis.types import DecoderOutput, ImageBatch, MaskFeatures, Memory, Segment, Targets

from ..small import (
    CLASSES,
    NAMES,
    NETWORKS,
    distinct,
    images,
    small,
    targets,
    with_bitmaps,
    with_own_backbone,
)

# Stacks of schemes: every recipe carries its own and none, one recipe of each network all that it
# can.
STACKS: dict[str, tuple[str, ...]] = {
    "own": (),
    "none": ("none",),
    "align": ("align=2",),
    "hybrid": ("hybrid=2",),
    "stable, federated": ("stable", "federated=2"),
    "group": ("group=3",),
    "co, rank, dac": ("co=atss+rcnn", "rank", "dac"),
    "align, hybrid, group": ("align=3", "hybrid=2", "group=2"),
    "align, group, co": ("align=2", "group=2", "co=atss+atss"),
}
# With masks on top of boxes: the whole network and schemes of one recipe, and one more network each
# alone.
MASKS = "masks"
MASKED: dict[str, dict[str, tuple[str, ...]]] = {
    "tiny": {
        MASKS: (),
        f"{MASKS}, align, group, co": ("align=2", "group=2", "co=atss"),
        f"{MASKS}, hybrid, stable": ("hybrid=2", "stable"),
    },
    "deformable_detr_r50": {MASKS: ()},
    "dn_deformable_detr_r50": {MASKS: ()},
}
SOFTMAX = {"detr_r50", "mask2former_r50"}  # carries no scheme that sets the classes' targets
# A ViT with a projector and relative boxes: the stacks that together have every seam.
PLAIN = {("lwdetr_tiny", stack) for stack in ("co, rank, dac", "align, hybrid, group")}
# Torchvision's, dilated, and a Swin
OWN_BACKBONE = ("tiny", "detr_r50_dc5", "deformable_detr_swin_l")


def recipe_of(name: str, stack: str) -> Recipe:
    """The small recipe; with its own backbone only where it is one of the three that have to show
    it.
    """
    if stack.startswith(MASKS):
        return small(name, MASKED[name][stack]).override(
            ["detector.masks={width: 32}", "loss.points=64"]
        )
    own = name in OWN_BACKBONE and stack in ("own", "none")
    recipe = (with_own_backbone if own else small)(name, STACKS[stack])
    return recipe if recipe.detector.masks is None else recipe.override("loss.points=64")


def can_carry(name: str, stack: str) -> bool:
    if stack in ("own", "none") or (name, stack) in PLAIN:
        return True
    return name in NETWORKS and (name not in SOFTMAX or stack in ("hybrid", "group"))


CASES = {
    (name, stack): recipe_of(name, stack)
    for name in NAMES
    for stack in STACKS
    if can_carry(name, stack)
}
CASES |= {
    (name, stack): recipe_of(name, stack) for name, stacks in MASKED.items() for stack in stacks
}
OWN = {name: recipe for (name, stack), recipe in CASES.items() if stack == "own"}
every_recipe = pytest.mark.parametrize("name", distinct(OWN))
every_detector = pytest.mark.parametrize("name", distinct(OWN, ["detector"]))


def make(name: str, stack: str = "own", seed: int = 0) -> TrainableDetector:
    return build(recipe_of(name, stack), CLASSES, seed=seed)


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """As `load_state_dict` does,
    which takes several times as long for a model of many small tensors.
    """
    own = model.state_dict()
    assert own.keys() == state.keys()
    for key, value in own.items():
        value.copy_(state[key])


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """What is done to a model within is undone: weights, statistics, type, gradients, mode.
    A copy of a model takes several times as long."""
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    yield
    model.float().train().zero_grad()
    fill(model, kept)
    for p in trained:
        p.requires_grad_()


def flat(output: DecoderOutput) -> Tensor:
    parts = (output.logits, output.boxes, output.mask_embeds)
    return torch.cat([part.flatten() for part in parts if part is not None])


def compare(actual: DecoderOutput, expected: DecoderOutput) -> None:
    torch.testing.assert_close(flat(actual), flat(expected), atol=1e-9, rtol=0)


def begin(model: TrainableDetector) -> Step:
    """In evaluation mode and double precision, a step before the decoder runs."""
    model.double().eval()
    truth = targets((2, 3))
    return model.begin(
        ImageBatch(images().pixels.double()), truth._replace(boxes=truth.boxes.double())
    )


def train_step(model: TrainableDetector, batch: ImageBatch, truth: Targets) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model.reseed(0)
    torch.manual_seed(0)
    losses = model(batch, truth if model.sampling is None else with_bitmaps(truth, batch)).losses
    torch.stack(list(losses.values())).sum().backward()
    return losses


def maps_for_neck(detector: Detector, pixels: Tensor) -> list[Tensor]:
    """The backbone's maps without the one that masks alone are read from."""
    maps: list[Tensor] = detector.backbone(pixels)
    return maps if detector.masks is None else maps[1:]


def with_mask_features(detector: Detector, memory: Memory, batch: ImageBatch) -> Memory:
    """The memory with noise in place of mask features, where the detector has any."""
    if detector.masks is None:
        return memory
    height, width = batch.pixels.shape[-2:]
    generator, channels = torch.Generator().manual_seed(0), detector.masks.project.out_channels
    noise = torch.randn(len(batch.pixels), channels, height // 4, width // 4, generator=generator)
    return memory._replace(
        masks=MaskFeatures(noise.to(memory.tokens), (height, width), batch.padding)
    )


def decoded(detector: Detector, memory: Memory) -> DecoderOutput:
    """Every layer's output, of an encoded memory."""
    queries, _ = detector.propose(memory)
    return detector.decode(memory, {Segment("main", queries.content.shape[1]): queries})["main"]


def predict(model: TrainableDetector, memory: Memory) -> Tensor:
    """Of a memory that is not encoded yet."""
    return flat(
        decoded(model.detector, model.detector.encoder(memory, model.detector.queries.head))
    )
