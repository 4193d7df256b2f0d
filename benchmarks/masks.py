"""Mask2Former with a ResNet-50:
a training step beside `transformers`', the memory of groups, and inference.

    python benchmarks/masks.py

One thread, float32, random weights, 80 classes. Training: two images of 512x512 pixels with seven
objects each, 100 queries, nine decoder layers, 12,544 points; ours has the weights of theirs, and
the first loss must be equal where both compare masks at the same points. Memory: how far the
process grows in a training step, each number of groups in a process of its own. Inference: one
image of 640x640, against Deformable DETR with as many levels, layers and queries, without drawing
the masks of what is returned, which is timed by itself.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from common import Row, arguments, best, describe, finish, interleaved
from peers import BACKBONES, ours, transformers
from step import Stepper, our_loss
from torch import Tensor, nn

from detrellis.boxes import cxcywh_to_xyxy
from detrellis.detector import Detector
from detrellis.mask_points import Sampling
from detrellis.recipes import find_recipe
from detrellis.recipes.build import build
from detrellis.recipes.network import build_detector
from detrellis.training import TrainableDetector
from detrellis.types import ImageBatch, Targets

BATCH, SIDE, OBJECTS, CLASSES = 2, 512, 7, 80
PHOTO = 640
GROUPS = 11


class FixedPoints:
    """The same points wherever as many are drawn, for us and for transformers."""

    def __init__(self) -> None:
        self.drawn: dict[int, Tensor] = {}

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """Points `(*shape, 2)`."""
        images, count = shape
        if count not in self.drawn:
            generator = torch.Generator().manual_seed(count)
            self.drawn[count] = torch.empty(1, count, 2).uniform_(generator=generator)
        return self.drawn[count].repeat(images, 1, 1)


def batch() -> tuple[Tensor, Targets]:
    """Noise, and random boxes as masks."""
    torch.manual_seed(0)
    pixels = torch.randn(BATCH, 3, SIDE, SIDE)
    centres = torch.rand(BATCH * OBJECTS, 2) * 0.5 + 0.25
    sizes = torch.rand(BATCH * OBJECTS, 2) * 0.3 + 0.1
    boxes = torch.cat([centres, sizes], dim=1)
    left, top, right, bottom = cxcywh_to_xyxy(boxes).mul(SIDE).unsqueeze(-1).unbind(1)
    place = torch.arange(SIDE) + 0.5
    bitmaps = ((place > top) & (place < bottom)).unsqueeze(2) & (
        (place > left) & (place < right)
    ).unsqueeze(1)
    return pixels, Targets(
        torch.randint(CLASSES, (len(boxes),)), boxes, (OBJECTS,) * BATCH, bitmaps=bitmaps
    )


def theirs() -> Any:
    """As shipped; BatchNorm keeps its statistics, as their released models do."""
    stages = [f"stage{i}" for i in range(1, 5)]
    resnet = transformers.ResNetConfig(
        embedding_size=64, **BACKBONES["resnet50"], out_features=stages
    )
    config = transformers.Mask2FormerConfig(backbone_config=resnet, num_labels=CLASSES)
    torch.manual_seed(0)
    model = transformers.Mask2FormerForUniversalSegmentation(config).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model


def training(rounds: int) -> list[Row]:
    """Both steps side by side."""
    pixels, targets = batch()
    assert targets.bitmaps is not None
    peer = theirs()
    detector, recipe = ours(peer)
    model = build(
        recipe.override(
            ["detector.backbone.norm=frozen_norm", "detector.backbone.pretrained=false"]
        ),
        CLASSES,
    )
    model.detector.load_state_dict(detector.state_dict())
    model.train()
    masks = list(targets.bitmaps.float().split(targets.sizes))
    labels = list(targets.labels.split(targets.sizes))
    steppers = {
        "transformers": Stepper(
            peer, lambda: peer(pixels, mask_labels=masks, class_labels=labels).loss
        ),
        "detrellis": Stepper(model, our_loss(model, pixels, targets)),
    }
    points, assured = FixedPoints(), model.sampling
    assert assured is not None
    model.sampling = Sampling(lambda _, shape, like: points(shape), assured.points)
    with mock.patch("torch.rand", lambda *shape, **_: points(shape[:-1])):
        first = {name: float(stepper.loss().detach()) for name, stepper in steppers.items()}
    print(
        f"first loss: {first['transformers']:.6f} transformers, {first['detrellis']:.6f} detrellis"
    )
    torch.testing.assert_close(first["detrellis"], first["transformers"], rtol=1e-4, atol=0)
    model.sampling = assured
    saved = {name: stepper.saved(pixels) for name, stepper in steppers.items()}
    for _ in range(rounds):
        for stepper in steppers.values():
            stepper(timed=True)
    for name, stepper in steppers.items():
        print(f"{describe(name, stepper.seconds['step'], 'step')}, {saved[name]:.0f} MiB saved")
    fastest = {name: best(stepper.seconds["step"]) for name, stepper in steppers.items()}
    speed, memory = (values["transformers"] / values["detrellis"] for values in (fastest, saved))
    return [
        Row("images/s against transformers", speed, 1.5, "x", at_least=True),
        Row("saved activations against transformers", 1 / memory, 0.7, "x"),
    ]


def growth(groups: int) -> float:
    """MiB by which a process grows in a training step with so many groups,
    from before the model is built.
    """
    torch.set_num_threads(1)
    pixels, targets = batch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scheme = ("none",) if groups == 1 else (f"group={groups}",)
    recipe = (
        find_recipe("mask2former-r50")
        .with_schemes(scheme)
        .override("detector.backbone.pretrained=false")
    )
    model: TrainableDetector = build(recipe, CLASSES).train()
    Stepper(model, our_loss(model, pixels, targets))(timed=False)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def memory() -> list[Row]:
    """Groups against none."""
    grown = {}
    for groups in (1, GROUPS):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            grown[groups] = process.apply(growth, (groups,))
        print(f"{groups:2} groups: {grown[groups]:.0f} MiB")
    return [
        Row(f"memory of a step, {GROUPS} groups against one", grown[GROUPS] / grown[1], 1.6, "x")
    ]


@torch.no_grad()
def inference(rounds: int) -> list[Row]:
    """Masks against boxes."""
    parts = ["detector.backbone.pretrained=false", "detector.backbone.norm=frozen_norm"]
    same = [
        "detector.encoder.levels=3",
        "detector.decoder.layers=9",
        "detector.decoder.hidden=2048",
    ]
    boxes = [*parts, *same, "detector.queries.count=100"]
    detectors: dict[str, Detector] = {}
    for name, settings in (("mask2former-r50", parts), ("deformable-detr-r50", boxes)):
        torch.manual_seed(0)
        detectors[name] = build_detector(
            find_recipe(name).override(settings).detector, CLASSES
        ).eval()
    image, size = ImageBatch(torch.randn(1, 3, PHOTO, PHOTO)), torch.tensor([[PHOTO, PHOTO]])
    masked, boxed = detectors.values()
    output = masked(image)
    seconds = interleaved(
        {
            "masks, network": lambda: masked(image),
            "masks, drawn": lambda: masked.postprocess(output, size),
            "boxes": lambda: boxed.postprocess(boxed(image), size),
        },
        rounds,
        warmup=1,
    )
    for name, values in seconds.items():
        print(describe(name, values))
    return [
        Row(
            "network with masks against boxes",
            best(seconds["masks, network"]) / best(seconds["boxes"]),
            1.2,
            "x",
        )
    ]


def main() -> None:
    """See the top of the file."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # First: the highest memory of a new process is no less than this one's, which started it
    grown = memory()
    finish([*training(args.rounds), *grown, *inference(args.rounds)], args.json)


if __name__ == "__main__":
    main()
