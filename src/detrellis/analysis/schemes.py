"""A run with its training schemes, in eval mode. Its weights files hold the detector alone.

The schemes are in `last.state.pt`, with the detector's raw weights: the average covers the detector alone, and schemes
that are not averaged would not fit it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from detrellis.data.loader import Batch
from detrellis.engine.checkpoint import load_state
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit
from detrellis.recipes.build import build
from detrellis.schemes.base import Step, TrainingScheme
from detrellis.training import TrainableDetector, image_sizes
from detrellis.types import Memory

Scheme = TypeVar("Scheme", bound=TrainingScheme)


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
