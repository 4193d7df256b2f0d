"""A training step side by side:
Deformable DETR (two-stage, box refinement) of `transformers` as shipped, and ours.

    python benchmarks/step.py [--bfloat16]

A ResNet-18, three encoder and three decoder layers, 300 queries, 80 classes; two images of 320x320
pixels with seven boxes each; float32, one thread, AdamW with gradient clipping. Both start from the
same weights, and the first loss must be equal. Theirs decides what is computed:

* classes weigh 1 in loss and matching, boxes 5, GIoU 2; the layers before the last count as much as
  the last;
* the encoder's proposals have no loss, so ours is left out (what it costs is printed, without a
  budget);
* the whole backbone is frozen. They mean to train its last three stages, but their own ResNet calls
  its parameters otherwise than the pattern that looks for them. Ours is frozen alike.

One difference stays: they tie the heads of all layers, so their optimizer steps 1 % fewer
parameters.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from common import (
    Row,
    arguments,
    autocast,
    best,
    describe,
    finish,
    least_seconds,
    saved_bytes,
    storages_of,
)
from peers import SMALL, ours, theirs
from torch import Tensor, nn

from detrellis.engine.optim import build_optimizer
from detrellis.matching import Hungarian, MatchingCost
from detrellis.nn.recompute import recompute_layers
from detrellis.recipes.config import OptimConfig
from detrellis.supervision import Supervision
from detrellis.training import TrainableDetector
from detrellis.types import ImageBatch, Memory, Queries, Targets

BATCH, SIDE, BOXES, CLASSES = 2, 320, 7, 80
OPTIM = OptimConfig(lr=1e-4, clip=0.1, scaled={})
PARTS = ("forward", "backward", "update", "step")


class WithoutProposals(nn.Module):
    """Queries that do not show the proposals they come from: these get no loss."""

    def __init__(self, queries: nn.Module) -> None:
        super().__init__()
        self.queries, self.head = queries, queries.head

    def forward(self, memory: Memory) -> tuple[Queries, None]:
        """As the wrapped module's, without the proposals."""
        return self.queries(memory)[0], None


def batch() -> tuple[Tensor, Targets]:
    """Noise with random boxes."""
    torch.manual_seed(0)
    pixels = torch.randn(BATCH, 3, SIDE, SIDE)
    centres = torch.rand(BATCH * BOXES, 2) * 0.5 + 0.25
    sizes = torch.rand(BATCH * BOXES, 2) * 0.3 + 0.1
    labels = torch.randint(CLASSES, (BATCH * BOXES,))
    return pixels, Targets(labels, torch.cat([centres, sizes], dim=1), (BOXES,) * BATCH)


def their_loss(model: Any, pixels: Tensor, targets: Targets) -> Callable[[], Tensor]:
    """Forward and loss, called as their documentation does."""
    split = zip(
        targets.labels.split(targets.sizes), targets.boxes.split(targets.sizes), strict=True
    )
    labels = [{"class_labels": labels, "boxes": boxes} for labels, boxes in split]
    mask = torch.ones(BATCH, SIDE, SIDE, dtype=torch.long)
    return lambda: model(pixel_values=pixels, pixel_mask=mask, labels=labels).loss


def our_loss(model: TrainableDetector, pixels: Tensor, targets: Targets) -> Callable[[], Tensor]:
    """Forward and loss, as the training loop does."""
    return lambda: torch.stack(list(model(ImageBatch(pixels), targets).losses.values())).sum()


class Stepper:
    """One training step at a time, with the CPU seconds of its parts."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], bfloat16: bool) -> None:
        self.model, self.loss, self.bfloat16 = model, loss, bfloat16
        self.optimizer = build_optimizer(model, OPTIM)
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def __call__(self, *, timed: bool) -> None:
        """One step."""
        marks = [time.process_time()]
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.bfloat16):
            loss = self.loss()
        marks.append(time.process_time())
        loss.backward()
        marks.append(time.process_time())
        nn.utils.clip_grad_norm_(self.model.parameters(), OPTIM.clip)
        self.optimizer.step()
        marks.append(time.process_time())
        if timed:
            seconds = [b - a for a, b in itertools.pairwise(marks)]
            for part, value in zip(PARTS, [*seconds, sum(seconds)], strict=True):
                self.seconds[part].append(value)

    def saved(self, pixels: Tensor) -> float:
        """MiB that the forward pass keeps for the backward pass."""
        existing = storages_of(pixels, *self.model.parameters(), *self.model.buffers())
        with autocast(self.bfloat16):
            return saved_bytes(self.loss, existing) / 2**20


def trainable(detector: Any, *, proposals: bool) -> TrainableDetector:
    """Our network with their loss."""
    detector.backbone.requires_grad_(False)
    if not proposals:
        detector.queries = WithoutProposals(detector.queries)
    supervision = Supervision(
        Hungarian(MatchingCost(classes=1.0)), weights={"class": 1.0, "box": 5.0, "giou": 2.0}
    )
    return TrainableDetector(
        detector, supervision=supervision, proposal_targets="objectness"
    ).train()


def compare(rounds: int, bfloat16: bool) -> list[Row]:
    """Times all of them side by side and prints what they take."""
    pixels, targets = batch()
    peer = theirs("resnet18", SMALL).train()
    same, full, again = (trainable(ours(peer)[0], proposals=p) for p in (False, True, False))
    recompute_layers(again.detector.encoder, again.detector.decoder)
    steppers = {
        "transformers": Stepper(peer, their_loss(peer, pixels, targets), bfloat16),
        "detrellis": Stepper(same, our_loss(same, pixels, targets), bfloat16),
        "with proposals": Stepper(full, our_loss(full, pixels, targets), bfloat16),
        "checkpointing": Stepper(again, our_loss(again, pixels, targets), bfloat16),
    }
    first = {name: float(s.loss().detach()) for name, s in steppers.items()}
    print(
        f"first loss: {first['transformers']:.6f} transformers, {first['detrellis']:.6f} detrellis"
    )
    torch.testing.assert_close(first["detrellis"], first["transformers"], rtol=1e-4, atol=0)
    saved = {name: s.saved(pixels) for name, s in steppers.items()}
    for i in range(2 + rounds):
        for stepper in steppers.values():
            stepper(timed=i >= 2)
    for name, stepper in steppers.items():
        parts = ", ".join(f"{part} {best(stepper.seconds[part]) * 1e3:.0f}" for part in PARTS[:3])
        step = stepper.seconds["step"]
        rate = f"{BATCH / best(step):.2f} images/s, {saved[name]:.0f} MiB saved"
        print(f"{describe(name, step, 'step')}: {parts}; {rate}")
    if not bfloat16:
        print(least_seconds(lambda: steppers["detrellis"](timed=False)))
    fastest = {name: best(s.seconds["step"]) for name, s in steppers.items()}
    speed = fastest["transformers"] / fastest["detrellis"]
    memory = saved["detrellis"] / saved["transformers"]
    kept = saved["checkpointing"] / saved["detrellis"]
    longer = fastest["checkpointing"] / fastest["detrellis"]
    return [
        Row("images/s against transformers", speed, 2.0, "x", at_least=True),
        Row("saved activations against transformers", memory, 0.6, "x"),
        Row("saved activations with optim.checkpointing against without", kept, 0.5, "x"),
        Row("time of the same", longer, 1.3, "x"),
    ]


def main() -> None:
    """See the top of the file."""
    parser = arguments(__doc__, bfloat16=True)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    finish(compare(args.rounds, args.bfloat16), args.json)


if __name__ == "__main__":
    main()
