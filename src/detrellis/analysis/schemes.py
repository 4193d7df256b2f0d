"""A run with its training schemes, in eval mode. Its weights files hold the detector alone.

The schemes are in `last.state.pt`, with the detector's raw weights: the average covers the detector
alone, and schemes that are not averaged would not fit it. So are the branches of scheme `co`, and
the groups after the first one of scheme `group`, which are gone at inference.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from detrellis.data.batch import Batch
from detrellis.engine.checkpoint import load_state, load_weights
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit
from detrellis.recipes.build import build
from detrellis.schemes.base import QueryBlock, Step, TrainingScheme
from detrellis.schemes.collaborative.scene import BranchAssignment, Ints, Scene
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.schemes.group import Group
from detrellis.training import TrainableDetector, image_sizes
from detrellis.types import DecoderOutput, Memory, Segment

Scheme = TypeVar("Scheme", bound=TrainingScheme)
DECODER = "decoder"  # what reports call the detector's own head, beside the names of the branches


def check_state(run: str | Path, what: str) -> None:
    """Raises `UserError` where a run has no `last.state.pt`, which alone holds `what`."""
    if not (Path(run) / "last.state.pt").is_file():
        raise UserError(
            f"{run}: no last.state.pt, which alone holds {what}",
            "Give the folder of a run as training left it.",
        )


def load_with_scheme(opened: OpenedSplit, kind: type[Scheme]) -> tuple[TrainableDetector, Scheme]:
    """A run's detector with its schemes, as at the last checkpoint, ready to evaluate; and its
    scheme of this kind, which the recipe must have.

    Raises `UserError` where the state is not of this recipe.
    """
    model = build(opened.model.recipe.untrained(), len(opened.model.classes), stored=True)
    try:
        model.load_state_dict(load_state(Path(opened.run))["model"])
    except RuntimeError as error:
        raise UserError(
            f"{opened.run}: last.state.pt does not fit the run's recipe "
            f"({str(error).splitlines()[0]})",
            "It is from another version: train anew.",
        ) from None
    (scheme,) = (s for s in model.training_schemes if isinstance(s, kind))
    return model.to(opened.model.device).eval(), scheme


def begin(model: TrainableDetector, batch: Batch, memory: Memory | None = None) -> Step:
    """What schemes see of a batch before the decoder runs;
    `memory` is what the detector has encoded, if it has.
    """
    memory = model.detector.encode(batch.images) if memory is None else memory
    queries, proposals = model.detector.propose(memory)
    # Not averaged over the processes, as in training: it only weighs losses, and processes may have
    # unequal numbers of batches.
    boxes = batch.targets.boxes.new_tensor(float(len(batch.targets.labels)))
    sizes = image_sizes(batch.images)
    return Step(
        model.detector, memory, queries, proposals, batch.targets, model.supervision, boxes, sizes
    )


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
    """Raises `UserError` under torchrun: what branches assign comes with losses, which are averaged
    over processes, and these may have unequal numbers of batches."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError("this measurement runs in one process", "Start it without torchrun.")


def decode_main(step: Step) -> DecoderOutput:
    """The decoder's output for the main queries, by layer."""
    main = Segment("main", step.queries.content.shape[1])
    return step.detector.decode(step.memory, {main: step.queries})[main.name]


def branch_assignments(co: Collaborative, step: Step) -> tuple[Scene, dict[str, BranchAssignment]]:
    """The scene, and by branch what it assigns in each image:
    where training draws some at random, the first ones.
    """
    scene = co.scene(step)
    if scene.masks is None:  # no branch assigns by them: empty ones do
        scene = scene._replace(
            masks=tuple(boxes.new_zeros(len(boxes), 1, 1) for boxes in scene.boxes)
        )
    return scene, {name: branch(scene, _first)[1] for name, branch in co.named.items()}


def _first(indices: Ints, k: int) -> Ints:
    return indices[:k]


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
        """One group's part, `(L, B, N, ...)`:
        what the detector says with that group's queries alone.
        """
        queries = slice(group * self.queries, (group + 1) * self.queries)
        return self.output.map(lambda t: t[:, :, queries])


def check_grouped(run: str | Path) -> None:
    """Raises `UserError` where a run has no further groups to look at."""
    _, card = load_weights(Path(run))
    if card.recipe.schemes.group is None or card.recipe.schemes.group.k == 1:
        raise UserError(
            f"{run}: trained with one group",
            "Train with several: detrellis train tiny --scheme group=3.",
        )
    check_state(run, "the groups after the first")


@torch.no_grad()
def all_groups(model: TrainableDetector, group: Group, batch: Batch) -> AllGroups:
    """One pass of all groups over a batch, on the model's device:
    as in training, without the other schemes.
    """
    step = begin(model, batch)
    blocks = [QueryBlock("main", step.queries, model.supervision), *group.extend(step).blocks]
    outputs = model.detector.decode(step.memory, {b.segment: b.queries for b in blocks})
    # Of the queries, up to their masks
    fields = zip(*(outputs[b.name][:5] for b in blocks), strict=True)
    output = DecoderOutput(*(None if f[0] is None else torch.cat(f, dim=2) for f in fields))  # type: ignore[arg-type]
    output = output._replace(masks=outputs["main"].masks)

    positions = None
    if step.queries.boxes is not None:
        centres = torch.cat(
            [b.queries.boxes for b in blocks if b.queries.boxes is not None], dim=1
        )[..., :2]
        positions = centres.unflatten(1, (group.k, -1))
    return AllGroups(group.k, output, positions, fixed=step.proposals is None)
