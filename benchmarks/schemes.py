"""What a training scheme costs: whole steps with and without it, side by side in one process, on one thread.

    python benchmarks/schemes.py [--rounds N] [--recipe tiny]

Forward pass, losses, backward pass, clipping and AdamW; all variants see the same pictures and boxes. `tiny` has two
images of 256x192 pixels; `dino-r50` two of 320x320, with random weights. 80 classes, ten boxes an image.
"""

from __future__ import annotations

import time

import torch
from common import Row, arguments, best, describe, finish
from torch import nn

from detrellis.engine.optim import build_optimizer
from detrellis.recipes import find_recipe
from detrellis.recipes.build import build
from detrellis.types import ImageBatch, Targets

CLASSES, BATCH, BOXES = 80, 2, 10
SIZES = {"tiny": (192, 256), "dino-r50": (320, 320)}
# Schemes beside the recipe's own, with the most that a step may cost against it without them.
SCHEMES = {
    "align=4": 1.05,
    "align=1": None,
    "stable": None,
    "hybrid": None,
    "group=3": None,
    "group=11": 1.6,
}


class Stepper:
    """One training step at a time, with its CPU seconds."""

    def __init__(self, recipe: str, scheme: str | None, size: tuple[int, int]) -> None:
        chosen = find_recipe(recipe).untrained()
        if scheme is not None:
            chosen = chosen.with_schemes(scheme)
        if chosen.schemes.hybrid is not None and recipe == "tiny":
            chosen = chosen.override("schemes.hybrid.queries=300")
        self.model = build(chosen, CLASSES).train()
        self.optimizer, self.clip = build_optimizer(self.model, chosen.optim), chosen.optim.clip
        generator = torch.Generator().manual_seed(0)
        boxes = torch.rand(BATCH * BOXES, 4, generator=generator) * 0.3 + 0.2
        labels = torch.randint(CLASSES, (BATCH * BOXES,), generator=generator)
        self.images = ImageBatch(torch.randn(BATCH, 3, *size, generator=generator))
        self.targets = Targets(labels, boxes, (BOXES,) * BATCH)
        self.seconds: list[float] = []

    def __call__(self, step: int) -> None:
        """One step."""
        self.model.reseed(step)
        start = time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(self.model(self.images, self.targets).losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.seconds.append(time.process_time() - start)


def compare(recipe: str, rounds: int) -> list[Row]:
    """Times all variants in turns and prints what they take."""
    chosen = [s for s in SCHEMES if recipe == "tiny" or not s.startswith("group=11")]  # DINO has 3 groups at most
    variants = {str(s): Stepper(recipe, s, SIZES[recipe]) for s in (None, *chosen)}
    for i in range(2 + rounds):
        for stepper in variants.values():
            stepper(i)
    fastest = {}
    for name, stepper in variants.items():
        timed = stepper.seconds[2:]
        fastest[name] = best(timed)
        ratio = fastest[name] / fastest["None"]
        print(f"{describe(f'{recipe} {name}', timed, 'step')}: {ratio:.3f}x")
    return [
        Row(f"{recipe} with {name} against without", fastest[name] / fastest["None"], budget, "x")
        for name, budget in SCHEMES.items()
        if budget is not None and name in fastest
    ]


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
