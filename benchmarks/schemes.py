"""What a training scheme costs:
whole steps with and without it, side by side in one process, on one thread.

    python benchmarks/schemes.py [--rounds N] [--recipe tiny]

Forward pass, losses, backward pass, clipping and AdamW; all variants see the same pictures and
boxes. `tiny` has two images of 256x192 pixels; `dino-r50` and Deformable DETR++ two of 320x320,
with random weights. 80 classes, ten boxes an image. Memory is what a step holds when its backward
pass begins: weights, gradients, AdamW's two averages, and all that the forward pass saved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from common import Row, arguments, best, clock, describe, finish, saved_bytes, storages_of
from torch import nn

from detrellis.engine.optim import build_optimizer
from detrellis.recipes import find_recipe
from detrellis.recipes.build import build
from detrellis.types import ImageBatch, Targets

CLASSES, BATCH, BOXES = 80, 2, 10
PLUS = "deformable-detr-r50-two-stage-plus"
SIZES = {"tiny": (192, 256), "dino-r50": (320, 320), PLUS: (320, 320)}
MEMORY_SIZES = SIZES | {PLUS: (640, 800)}  # in smaller images the weights outweigh what steps keep
SHARED = "schemes.group.proposals=shared"


class Variant(NamedTuple):
    """Schemes beside the recipe's own,
    and the most that a step may cost against it without them: time, memory.
    """

    scheme: str
    override: tuple[str, ...] = ()
    budget: float | None = None
    recipes: tuple[str, ...] = ("tiny", "dino-r50")
    memory: float | None = None


VARIANTS = {
    "align=4": Variant("align=4", budget=1.05),
    "align=1": Variant("align=1"),
    "stable": Variant("stable"),
    "hybrid": Variant("hybrid"),
    "group=3": Variant("group=3"),
    # The arithmetic of eleven proposal heads alone is 1.6x
    "group=11": Variant("group=11", recipes=("tiny",)),
    "group=11, shared proposals": Variant("group=11", (SHARED,), 1.6, ("tiny",)),
    "co=atss": Variant("co=atss", budget=1.25, recipes=("tiny", PLUS), memory=1.10),
    "co=rcnn+atss": Variant("co=rcnn+atss", budget=1.6, recipes=("tiny", PLUS), memory=1.15),
}


class Stepper:
    """One training step at a time, with its CPU seconds;
    on a GPU in bf16, with those of the clock.
    """

    def __init__(
        self, recipe: str, variant: Variant | None, size: tuple[int, int], device: str = "cpu"
    ) -> None:
        chosen = find_recipe(recipe).untrained()
        if variant is not None:
            chosen = chosen.with_schemes(variant.scheme).override(variant.override)
        self.device, self.now = device, clock(device)
        self.model = build(chosen, CLASSES).to(device).train()
        self.optimizer, self.clip = build_optimizer(self.model, chosen.optim), chosen.optim.clip
        generator = torch.Generator().manual_seed(0)
        boxes = torch.rand(BATCH * BOXES, 4, generator=generator) * 0.3 + 0.2
        labels = torch.randint(CLASSES, (BATCH * BOXES,), generator=generator)
        self.images = ImageBatch(torch.randn(BATCH, 3, *size, generator=generator).to(device))
        self.targets = Targets(labels.to(device), boxes.to(device), (BOXES,) * BATCH)
        self.seconds: list[float] = []

    def __call__(self, step: int) -> None:
        """One step."""
        self.model.reseed(step)
        start = self.now()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            losses = self.model(self.images, self.targets).losses
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.seconds.append(self.now() - start)

    def memory(self) -> int:
        """Bytes that a step holds when its backward pass begins."""
        self.model.reseed(0)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        own = storages_of(
            *self.model.parameters(), *self.model.buffers(), self.images.pixels, self.targets.boxes
        )
        saved = saved_bytes(
            lambda: list(self.model(self.images, self.targets).losses.values()), own
        )
        return saved + 4 * sum(p.numel() * p.element_size() for p in parameters)


def compare(recipe: str, rounds: int) -> list[Row]:
    """Times all variants in turns and prints what they take."""
    chosen = {name: v for name, v in VARIANTS.items() if recipe in v.recipes}
    variants = {
        name: Stepper(recipe, v, SIZES[recipe]) for name, v in [("without", None), *chosen.items()]
    }
    for i in range(2 + rounds):
        for stepper in variants.values():
            stepper(i)
    fastest = {}
    for name, stepper in variants.items():
        timed = stepper.seconds[2:]
        fastest[name] = best(timed)
        ratio = fastest[name] / fastest["without"]
        print(f"{describe(f'{recipe} {name}', timed, 'step')}: {ratio:.3f}x")
    rows = []
    for name, variant in chosen.items():
        what = f"{recipe} with {name} against without"
        if variant.budget is not None:
            rows.append(Row(what, fastest[name] / fastest["without"], variant.budget, "x"))
        if variant.memory is not None:
            held = [Stepper(recipe, v, MEMORY_SIZES[recipe]).memory() for v in (variant, None)]
            rows.append(Row(f"{what}, memory", held[0] / held[1], variant.memory, "x"))
    return rows


def main() -> None:
    """See the top of the file."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--recipe", choices=SIZES, action="append")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for recipe in args.recipe or SIZES for row in compare(recipe, args.rounds)]
    finish(rows, args.json)


if __name__ == "__main__":
    main()
