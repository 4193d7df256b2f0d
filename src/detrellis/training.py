"""The training step: a detector, its training schemes, and the losses of both."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from detrellis.detector import Detector
from detrellis.distributed import reduce_mean
from detrellis.mask_points import Points, Sampling, Seeded
from detrellis.salience import TokenTargets, salience_loss
from detrellis.schemes.base import QueryBlock, Step, TrainingScheme
from detrellis.supervision import Supervision, Task, counted, match, supervise, uniting
from detrellis.types import DecoderOutput, ImageBatch, Targets, on_device

ProposalTargets = Literal["objectness", "classes"]


class StepOutput(NamedTuple):
    """Weighted losses by name, to be summed, and metrics without gradient."""

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


class TrainableDetector(nn.Module):
    """What is trained. Only `detector` is ever evaluated, saved as weights or exported.

    `proposal_targets`: `"objectness"` teaches every token of a two-stage detector whether it is an
    object (Deformable DETR), `"classes"` teaches the selected proposals their classes (DINO).
    `token_targets`: what an encoder that chooses tokens learns of them. `points`: where masks are
    compared; None: none are learned.
    """

    def __init__(
        self,
        detector: Detector,
        schemes: Sequence[TrainingScheme] = (),
        supervision: Supervision | None = None,
        *,
        proposal_targets: ProposalTargets = "classes",
        token_targets: TokenTargets = "salience",
        points: Points | None = None,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.schemes = nn.ModuleList(schemes)
        self._supervision = supervision or Supervision()
        self.proposal_targets, self.token_targets = proposal_targets, token_targets
        self.sampling = None if points is None else Sampling(Seeded(), points)
        self._done = 0.0  # the part of the run behind

    def forward(self, images: ImageBatch, targets: Targets) -> StepOutput:
        """One pass of every query block, and all losses."""
        step = self.begin(images, targets)
        blocks = [self.main(step)]
        losses = self._of_tokens(step)
        for scheme in self.active_schemes:
            extension = scheme.extend(step)
            blocks += extension.blocks
            losses |= extension.losses
        outputs = self.detector.decode(step.memory, {b.segment: b.queries for b in blocks})

        tasks = [task for b in blocks for task in uniting(self._tasks(b, outputs[b.name], step))]
        tasks += [task for scheme in self.active_schemes for task in scheme.after(step, outputs)]
        assignments = match(tasks)
        block_losses, metrics = supervise(counted(tasks, assignments, reduce_mean), assignments)
        by_name = {task.name: a for task, a in zip(tasks, assignments, strict=True)}
        for scheme in self.active_schemes:
            metrics |= scheme.metrics(step, blocks, by_name)
        return StepOutput(block_losses | losses | _idle(self.schemes), metrics)

    def begin(self, images: ImageBatch, targets: Targets) -> Step:
        """The step before the decoder runs."""
        memory = self.detector.encode(images)
        queries, proposals = self.detector.propose(memory)
        count, sizes = mean_boxes(targets), image_sizes(images)
        return Step(
            self.detector, memory, queries, proposals, targets, self.supervision, count, sizes
        )

    def main(self, step: Step) -> QueryBlock:
        """The detector's own queries."""
        proposals = (
            None
            if step.proposals is None
            else self.detector.queries.training_output(step.proposals)
        )
        weight = math.prod(s.main_weight for s in self.active_schemes)
        return QueryBlock(
            "main", step.queries, step.supervision, weight=weight, proposals=proposals
        )

    def count_classes(self, images: Tensor) -> None:
        """Tell every scheme how many training images have each class, `(C,)`."""
        for scheme in self.training_schemes:
            scheme.count_classes(images)

    @property
    def supervision(self) -> Supervision:
        """The main block's, as the schemes make it at this step."""
        supervision = self._supervision
        for scheme in self.active_schemes:
            supervision = scheme.supervision(supervision)
        return supervision

    def progress(self, done: float) -> None:
        """Which part of the run is done, from 0 to below 1: every scheme is told, and those whose
        time has passed are left out of the steps from now on."""
        self._done = done
        for scheme in self.training_schemes:
            scheme.progress(done)

    def reseed(self, seed: int) -> None:
        """Start every scheme's draws anew, and those of the points that masks are compared at."""
        if self.sampling is not None:
            self.sampling = self.sampling._replace(draw=Seeded(seed))
        for scheme in self.training_schemes:
            # Each from a number of its own: two schemes must not draw the same.
            scheme.reseed(zlib.crc32(f"{seed}/{scheme.name}".encode()))

    @property
    def training_schemes(self) -> list[TrainingScheme]:
        """The schemes, in the recipe's order."""
        return [s for s in self.schemes if isinstance(s, TrainingScheme)]

    @property
    def active_schemes(self) -> list[TrainingScheme]:
        """Those of them that are not yet switched off."""
        return [s for s in self.training_schemes if self._done < s.until]

    def _of_tokens(self, step: Step) -> dict[str, Tensor]:
        """The loss of an encoder that chooses tokens."""
        if step.memory.salience is None:
            return {}
        loss = salience_loss(step.memory, step.targets, step.sizes, reduce_mean, self.token_targets)
        return {"encoder/salience": step.supervision.weights["salience"] * loss}

    def _tasks(self, block: QueryBlock, output: DecoderOutput, step: Step) -> list[Task]:
        """What a block's outputs learn, and what stands before them: each matched copy by copy."""
        normaliser = (
            (block.copies * step.mean_boxes).clamp(min=1)
            if block.normaliser is None
            else block.normaliser
        )
        common = (normaliser, block.copies, block.weight)
        prefix, targets = "" if block.name == "main" else f"{block.name}_", step.targets
        sampling = self.sampling if block.masks else None
        tasks = [block.supervision.task(block.name, output, targets, *common, sampling)]
        if output.initial is not None:
            supervision = block.supervision.initial(len(output.boxes))
            tasks.append(supervision.task(f"{prefix}initial", output.initial, targets, *common))
        if block.proposals is not None:
            if self.proposal_targets == "objectness":
                targets = targets._replace(labels=torch.zeros_like(targets.labels))
            proposals = block.proposals._replace(masks=step.memory.masks)
            sampling = None if proposals.mask_embeds is None else sampling
            rule = block.supervision.proposals()
            tasks.append(rule.task(f"{prefix}proposals", proposals, targets, *common, sampling))
        return tasks


def mean_boxes(targets: Targets) -> Tensor:
    """Boxes of this step, averaged over all processes: `()`."""
    return reduce_mean(targets.boxes.new_full((), len(targets.labels)))


def image_sizes(images: ImageBatch) -> Tensor:
    """Height and width of each image without padding, `(B, 2)` in pixels."""
    if images.padding is None:
        size = on_device(images.pixels.shape[-2:], images.pixels.device)
        return size.expand(len(images.pixels), 2)
    inside = ~images.padding
    return torch.stack([inside[:, :, 0].sum(1), inside[:, 0].sum(1)], dim=1)


def _idle(schemes: nn.ModuleList) -> dict[str, Tensor]:
    """A zero loss on every parameter of the schemes: one that found nothing to do in this batch (no
    boxes) must still give its parameters a gradient, or the processes that did have boxes wait for
    it for ever."""
    parameters = list(schemes.parameters())
    return {"schemes/idle": _Idle.apply(*parameters)} if parameters else {}


class _Idle(torch.autograd.Function):
    """A loss of 0 whose gradient is 0 for each parameter, without reading any."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        zero = torch.zeros_like(gradient)
        return tuple(zero.to(p.dtype).expand_as(p) for p in ctx.saved_tensors)
