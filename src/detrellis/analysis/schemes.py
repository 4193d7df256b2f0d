"""A run with its training schemes, in eval mode. Its weights files hold the detector alone.

The schemes are in `last.state.pt`, with the detector's raw weights: the average covers the detector alone, and schemes
that are not averaged would not fit it. Of scheme `co` that gives the branches, which are gone at inference.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from detrellis.data.loader import Batch
from detrellis.engine.checkpoint import load_state, load_weights
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit
from detrellis.recipes.build import build
from detrellis.schemes.base import Step, TrainingScheme
from detrellis.schemes.collaborative.scene import BranchAssignment, Scene
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.training import TrainableDetector, image_sizes
from detrellis.types import DecoderOutput, Memory, Segment

Scheme = TypeVar("Scheme", bound=TrainingScheme)
DECODER = "decoder"  # what reports call the detector's own head, beside the names of the branches


def check_state(run: str | Path, what: str) -> None:
    """Raises `UserError` where a run has no `last.state.pt`, which alone holds `what`."""
    if not (Path(run) / "last.state.pt").is_file():
        raise UserError(
            f"{run}: no last.state.pt, which alone holds {what}", "Give the folder of a run as training left it."
        )


def load_with_scheme(opened: OpenedSplit, kind: type[Scheme]) -> tuple[TrainableDetector, Scheme]:
    """A run's detector with its schemes, as at the last checkpoint, ready to evaluate; and its scheme of this kind,
    which the recipe must have.

    Raises `UserError` where the state is not of this recipe.
    """
    model = build(opened.model.recipe.untrained(), len(opened.model.classes), stored=True)
    try:
        model.load_state_dict(load_state(Path(opened.run))["model"])
    except RuntimeError as error:
        raise UserError(
            f"{opened.run}: last.state.pt does not fit the run's recipe ({str(error).splitlines()[0]})",
            "It is from another version: train anew.",
        ) from None
    (scheme,) = (s for s in model.training_schemes if isinstance(s, kind))
    return model.to(opened.model.device).eval(), scheme


def begin(model: TrainableDetector, batch: Batch, memory: Memory | None = None) -> Step:
    """What schemes see of a batch before the decoder runs; `memory` is what the detector has encoded, if it has."""
    memory = model.detector.encode(batch.images) if memory is None else memory
    queries, proposals = model.detector.propose(memory)
    # Not averaged over the processes, as in training: it only weighs losses, and processes may have unequal numbers
    # of batches.
    boxes = batch.targets.boxes.new_tensor(float(len(batch.targets.labels)))
    sizes = image_sizes(batch.images)
    return Step(model.detector, memory, queries, proposals, batch.targets, model.supervision, boxes, sizes)


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
