"""All groups of a run that was trained with scheme `group`, in eval mode. Its weights files hold the first one only;
the others are in `last.state.pt` (see `schemes`)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from detrellis.analysis.schemes import begin, check_state
from detrellis.data.loader import Batch
from detrellis.engine.checkpoint import load_weights
from detrellis.errors import UserError
from detrellis.schemes.base import QueryBlock
from detrellis.schemes.group import Group
from detrellis.training import TrainableDetector
from detrellis.types import DecoderOutput


class AllGroups(NamedTuple):
    """What `K` groups of `N` queries say about one batch; group k has the queries from k N on."""

    groups: int
    output: DecoderOutput  # (L, B, K N, ...)
    positions: Tensor | None  # (B, K, N, 2) centres in [0, 1]; None: DETR's queries have no place
    fixed: bool  # whether the positions are the same in every image: learned, not proposed

    @property
    def queries(self) -> int:
        """Queries of one group."""
        return self.output.boxes.shape[2] // self.groups

    def of(self, group: int) -> DecoderOutput:
        """One group's part, `(L, B, N, ...)`: what the detector says with that group's queries alone."""
        queries = slice(group * self.queries, (group + 1) * self.queries)
        return self.output.map(lambda t: t[:, :, queries])


def check_grouped(run: str | Path) -> None:
    """Raises `UserError` where a run has no further groups to look at."""
    _, card = load_weights(Path(run))
    if card.recipe.schemes.group is None or card.recipe.schemes.group.k == 1:
        raise UserError(f"{run}: trained with one group", "Train with several: detrellis train tiny --scheme group=3.")
    check_state(run, "the groups after the first")


@torch.no_grad()
def all_groups(model: TrainableDetector, group: Group, batch: Batch) -> AllGroups:
    """One pass of all groups over a batch, on the model's device: as in training, without the other schemes."""
    step = begin(model, batch)
    blocks = [QueryBlock("main", step.queries, model.supervision), *group.extend(step).blocks]
    outputs = model.detector.decode(step.memory, {b.segment: b.queries for b in blocks})
    fields = zip(*(outputs[b.name] for b in blocks), strict=True)
    output = DecoderOutput(*(None if f[0] is None else torch.cat(f, dim=2) for f in fields))  # type: ignore[arg-type]

    positions = None
    if step.queries.boxes is not None:
        centres = torch.cat([b.queries.boxes for b in blocks if b.queries.boxes is not None], dim=1)[..., :2]
        positions = centres.unflatten(1, (group.k, -1))
    return AllGroups(group.k, output, positions, fixed=step.proposals is None)
