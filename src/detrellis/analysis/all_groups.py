"""All groups of a run that was trained with scheme `group`, in eval mode. Its weights files hold the first one only.

The others are in `last.state.pt`, with the detector's raw weights: the average covers the detector alone, and queries
of groups that are not averaged would not fit it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from detrellis.api import Opened
from detrellis.data.loader import Batch
from detrellis.engine.checkpoint import load_state, load_weights
from detrellis.errors import UserError
from detrellis.recipes.build import build
from detrellis.schemes.base import QueryBlock, Step
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
        own = slice(group * self.queries, (group + 1) * self.queries)
        return self.output.map(lambda t: t[:, :, own])


def check_grouped(run: str | Path) -> None:
    """Raises `UserError` where a run has no further groups to look at."""
    _, card = load_weights(Path(run))
    if card.recipe.schemes.group is None or card.recipe.schemes.group.k == 1:
        raise UserError(f"{run}: trained with one group", "Train with several: detrellis train tiny --scheme group=3.")
    if not (Path(run) / "last.state.pt").is_file():
        raise UserError(
            f"{run}: no last.state.pt, which alone holds the groups after the first",
            "Give the folder of a run as training left it.",
        )


def load_groups(opened: Opened) -> tuple[TrainableDetector, Group]:
    """A run's detector with its schemes, as at the last checkpoint, ready to evaluate; and its groups."""
    check_grouped(opened.run)
    model = build(opened.model.recipe.untrained(), len(opened.model.classes))
    try:
        model.load_state_dict(load_state(Path(opened.run))["model"])
    except RuntimeError as error:
        raise UserError(
            f"{opened.run}: last.state.pt does not fit the run's recipe ({str(error).splitlines()[0]})",
            "It is from another version: train anew.",
        ) from None
    (group,) = (s for s in model.training_schemes if isinstance(s, Group))
    return model.to(opened.model.device).eval(), group


@torch.no_grad()
def all_groups(model: TrainableDetector, group: Group, batch: Batch) -> AllGroups:
    """One pass of all groups over a batch, on the model's device: as in training, without the other schemes."""
    detector, targets = model.detector, batch.targets
    memory = detector.encode(batch.images)
    queries, proposals = detector.propose(memory)
    # Not averaged over the processes, as in training: it only weighs losses, and shares of a split may be unequal.
    boxes = targets.boxes.new_tensor(float(len(targets.labels)))
    step = Step(detector, memory, queries, proposals, targets, model.supervision, boxes)
    parts = [QueryBlock("main", queries, model.supervision), *group.blocks(step)]
    outputs = detector.decode(memory, {b.segment: b.queries for b in parts})
    pairs = zip(*(outputs[b.name] for b in parts), strict=True)
    output = DecoderOutput(*(None if p[0] is None else torch.cat(p, dim=2) for p in pairs))  # type: ignore[arg-type]
    positions = None
    if queries.boxes is not None:
        centres = torch.cat([b.queries.boxes for b in parts if b.queries.boxes is not None], dim=1)[..., :2]
        positions = centres.unflatten(1, (group.k, -1))
    return AllGroups(group.k, output, positions, fixed=proposals is None)
