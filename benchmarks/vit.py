"""Co-DINO on EVA-02's ViT-L:
the memory of a training step on a CPU, and what checkpointing saves of it.

    python benchmarks/vit.py

`co-dino-vit-l` with its schemes, random weights, 80 classes; two images of 256x256 pixels with
seven boxes each; float32, one thread, AdamW. The peak is of a process of its own, from building the
model to the end of the first step.
"""

from __future__ import annotations

import multiprocessing
import resource

import torch
from common import Row, arguments, finish, saved_bytes, storages_of

from detrellis.engine.optim import build_optimizer
from detrellis.nn.recompute import Recomputable
from detrellis.recipes import find_recipe
from detrellis.recipes.build import build
from detrellis.training import TrainableDetector
from detrellis.types import ImageBatch, Targets

BATCH, SIDE, BOXES, CLASSES = 2, 256, 7, 80
RECIPE = "co-dino-vit-l"
GIB = 2**30


def batch() -> tuple[ImageBatch, Targets]:
    """Noise with random boxes."""
    torch.manual_seed(0)
    pixels = torch.randn(BATCH, 3, SIDE, SIDE)
    centres = torch.rand(BATCH * BOXES, 2) * 0.5 + 0.25
    sizes = torch.rand(BATCH * BOXES, 2) * 0.3 + 0.1
    labels = torch.randint(CLASSES, (BATCH * BOXES,))
    return ImageBatch(pixels), Targets(labels, torch.cat([centres, sizes], dim=1), (BOXES,) * BATCH)


def model_of() -> TrainableDetector:
    """The recipe as it is, with random weights."""
    return build(find_recipe(RECIPE).untrained(), CLASSES).train()


def peak(_: int) -> float:
    """GiB that a process takes at most, in a training step with checkpointing."""
    torch.set_num_threads(1)
    model, (images, targets) = model_of(), batch()
    optimizer = build_optimizer(model, find_recipe(RECIPE).optim)
    torch.stack(list(model(images, targets).losses.values())).sum().backward()
    optimizer.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def saved() -> dict[tuple[str, bool], float]:
    """MiB that the forward pass keeps,
    of the backbone alone and of the step, by whether it is checkpointed.
    """
    model, (images, targets) = model_of(), batch()
    existing = storages_of(images.pixels, *model.parameters(), *model.buffers())
    passes = {
        "backbone": lambda: model.detector.backbone(images.pixels),
        "step": lambda: model(images, targets),
    }
    # As the recipe has them
    layers = [m for m in model.modules() if isinstance(m, Recomputable) and m.recomputed]
    kept = {}
    for checkpointing in (True, False):
        model.detector.backbone.checkpointing = checkpointing
        for layer in layers:
            layer.recomputed = checkpointing
        for name, forward in passes.items():
            kept[name, checkpointing] = saved_bytes(forward, existing) / 2**20
    return kept


def main() -> None:
    """See the top of the file."""
    args = arguments(__doc__).parse_args()
    with multiprocessing.get_context("spawn").Pool(1) as process:
        highest = process.apply(peak, (0,))
    torch.set_num_threads(1)
    kept = saved()
    for name in ("backbone", "step"):
        print(
            f"{name:8} keeps {kept[name, True]:6.0f} MiB with checkpointing, "
            f"{kept[name, False]:6.0f} MiB without"
        )
    ratio = {name: kept[name, True] / kept[name, False] for name in ("backbone", "step")}
    rows = [
        Row("peak memory of a step with checkpointing", highest, 12.0, "GiB"),
        Row(
            "activations kept of the backbone, with checkpointing against without",
            ratio["backbone"],
            1 / 3,
            "x",
        ),
        Row("the same of the step", ratio["step"], 1.0, "x"),
    ]
    finish(rows, args.json)


if __name__ == "__main__":
    main()
