"""The heads of a run that was trained with scheme `co`: the decoder's, and the branches that are gone at inference."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from detrellis.analysis.schemes import check_state
from detrellis.engine.checkpoint import load_weights
from detrellis.errors import UserError
from detrellis.schemes.base import Step
from detrellis.schemes.collaborative.scene import BranchAssignment, Scene
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.types import DecoderOutput, Segment

DECODER = "decoder"  # what reports call the detector's own head, beside the names of the branches


def check_collaborative(run: str | Path) -> None:
    """Raises `UserError` where a run has no branches to look at."""
    _, card = load_weights(Path(run))
    if card.recipe.schemes.co is None:
        raise UserError(
            f"{run}: trained without scheme co, so the decoder is its only head",
            "Train with a branch: detrellis train tiny --scheme co=atss.",
        )
    check_state(run, "the branches")


def check_alone() -> None:
    """Raises `UserError` under torchrun: what branches assign comes with losses, which are averaged over processes,
    and these may have unequal numbers of batches."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError("this measurement runs in one process", "Start it without torchrun.")


def decode_main(step: Step) -> DecoderOutput:
    """The decoder's output for the main queries, by layer."""
    main = Segment("main", step.queries.content.shape[1])
    return step.detector.decode(step.memory, {main: step.queries})[main.name]


def branch_assignments(co: Collaborative, step: Step) -> tuple[Scene, dict[str, list[BranchAssignment]]]:
    """The scene, and by branch what it assigns in each image: where training draws some at random, the first ones."""
    scene = co.scene(step)
    if scene.masks is None:  # no branch assigns by them: empty ones do
        scene = scene._replace(masks=tuple(boxes.new_zeros(len(boxes), 1, 1) for boxes in scene.boxes))
    return scene, {name: branch(scene, _first)[1] for name, branch in co.named.items()}


def _first(indices: Tensor, k: int) -> Tensor:
    return indices[:k]
