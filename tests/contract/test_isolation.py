"""Invariant 3 of docs/architecture.md:
copies do not see each other. Of blocks, test_stacks.py shows it.
"""

from __future__ import annotations

import torch

from detrellis.types import Queries, Segment

from .models import begin, compare, every_detector, make


@every_detector
@torch.no_grad()
def test_copies_are_isolated(name: str) -> None:
    model = make(name)
    step = begin(model)
    memory, queries = step.memory, step.queries
    parts = [
        Queries(*(None if t is None else t.roll(k, 1) * 0.9 for t in queries)) for k in range(3)
    ]
    joined = Queries(*(None if t[0] is None else torch.cat(t, 1) for t in zip(*parts, strict=True)))  # type: ignore[arg-type]
    count = queries.content.shape[1]
    together = model.detector.decode(memory, {Segment("copies", 3 * count, 3): joined})["copies"]
    for k, part in enumerate(parts):
        alone = model.detector.decode(memory, {Segment("alone", count): part})["alone"]
        compare(together.map(lambda t, k=k: t[:, :, k * count : (k + 1) * count]), alone)
