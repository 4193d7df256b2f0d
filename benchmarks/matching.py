"""Matching with its cost, from the outputs of all layers to assignments, on one thread.

    python benchmarks/matching.py

Seven layers (six and the encoder's proposals), 900 queries, 80 classes, 50 targets an image; half
of the problems have random boxes, half have queries near the targets, as after some training.
"""

from __future__ import annotations

import statistics

import torch
from common import Row, arguments, best, describe, finish, interleaved

from detrellis.matching import Hungarian, Match, assign
from detrellis.types import DecoderOutput, Targets

LAYERS, QUERIES, CLASSES, TARGETS = 7, 900, 80, 50


def problem(batch: int, *, trained: bool) -> Match:
    """One step's matching; `trained`:
    each query lies near a target and knows its class a little.
    """
    generator = torch.Generator().manual_seed(batch)
    labels = torch.randint(CLASSES, (batch * TARGETS,), generator=generator)
    boxes = torch.rand(batch * TARGETS, 4, generator=generator) * 0.4 + 0.1
    shape = (LAYERS, batch, QUERIES)
    logits = torch.randn(*shape, CLASSES, generator=generator) - 3
    predicted = torch.rand(*shape, 4, generator=generator) * 0.5 + 0.05
    if trained:
        near = torch.randint(TARGETS, shape, generator=generator)
        near = near + TARGETS * torch.arange(batch)[:, None]
        predicted = (boxes[near] + 0.03 * torch.randn(*shape, 4, generator=generator)).clamp(
            0.01, 0.99
        )
        logits.scatter_add_(-1, labels[near].unsqueeze(-1), torch.full((*shape, 1), 3.0))
    return Match(
        DecoderOutput(logits, predicted, predicted),
        Targets(labels, boxes, (TARGETS,) * batch),
        Hungarian(),
    )


def main() -> None:
    """See the top of the file."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    variants = {}
    for kind in ("random", "trained"):
        for batch in (2, 16):
            match = problem(batch, trained=kind == "trained")
            variants[f"{kind}, batch {batch}"] = lambda match=match: assign([match])
    seconds = interleaved(variants, args.rounds)
    for name, values in seconds.items():
        print(describe(name, values, "step"))
    worst = max(best(seconds[f"{kind}, batch 2"]) for kind in ("random", "trained"))
    growth = [
        statistics.median(seconds[f"{kind}, batch 16"])
        / statistics.median(seconds[f"{kind}, batch 2"])
        for kind in ("random", "trained")
    ]
    size = f"{LAYERS} layers x batch 2 x {QUERIES} x {TARGETS}"
    rows = [
        Row(f"cost and solver, {size}", worst * 1e3, 30, "ms"),
        Row("the same, batch 16 against batch 2", max(growth), 8.8, "x"),
    ]
    finish(rows, args.json)


if __name__ == "__main__":
    main()
