"""Co-DETR (Zong et al., ICCV 2023): collaborative hybrid assignments.

One-to-one matching gives the encoder few positives to learn from. Auxiliary heads with one-to-many
assignment read the encoder's memory, and send their gradient into it; and their positives become
further queries of the decoder, which then sees many more positives, without matching. Heads and
queries are gone at inference.

| deviation from the released code | why |
| --- | --- |
| one decoder pass for all branches beside the main queries | equal to a pass for each: blocks do not see each other |
| slots that even background cannot fill learn nothing | there, images with few cells stop the run |
| an unused query reads itself | there its attention has nothing to read, and is not a number |
| a target that meets no anchor gets none | there it takes every anchor that meets no target (RetinaNet, PAA) |
| ignored anchors are not taken for background | they overlap a target |

| deviation of the released code, which is the default, from the paper | to have the paper's |
| --- | --- |
| Eq. 4 without its second term, the memory's features, where positions are derived from boxes | `features=true` |
| an image with fewer positives than others is filled up with background, not with padding | `pad="mask"` |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from detrellis.distributed import reduce_mean
from detrellis.matching import known_assignment
from detrellis.schemes.base import Extension, QueryBlock, Step, TrainingScheme
from detrellis.schemes.collaborative.branch import Branch
from detrellis.schemes.collaborative.branches import build_branches
from detrellis.schemes.collaborative.queries import Chosen, PositiveQueries, choose, marks
from detrellis.schemes.collaborative.scene import Scene, make_scene, random_draw
from detrellis.schemes.config import CoConfig
from detrellis.supervision import Supervision, leaving_out
from detrellis.types import Assignment


class Collaborative(TrainingScheme):
    """Branches on the memory, in any number and order, and their positives as queries.

    `strides` are those of the memory's levels, `layers` the decoder's. `positioned`: the detector's
    queries have positions of their own.
    """

    name = "co"
    requires = frozenset({"sigmoid_scores"})

    def __init__(
        self,
        config: CoConfig,
        width: int,
        classes: int,
        strides: Sequence[int],
        *,
        layers: int,
        positioned: bool,
    ) -> None:
        super().__init__()
        self.config, self.layers = config, layers
        names = config.branches
        self.adapter, branches = build_branches(
            names, width, classes, strides, convolutions=config.convolutions, regions=config.regions
        )
        self.branches = nn.ModuleList(branches)
        features = positioned if config.features is None else config.features
        self.embeds = nn.ModuleList(
            PositiveQueries(width, positioned=positioned, features=features)
            for _ in names
            if config.query_weight
        )
        self.marks = (
            marks(len(names), width if config.vector else 1)
            if positioned and config.query_weight
            else None
        )

    @property
    def named(self) -> dict[str, Branch]:
        """The branches by what logs call them; the second of a kind is numbered 2."""
        kinds = self.config.branches
        occurrences = [kinds[: i + 1].count(kind) for i, kind in enumerate(kinds)]
        names = [
            kind if nth == 1 else f"{kind}{nth}"
            for kind, nth in zip(kinds, occurrences, strict=True)
        ]
        return {
            name: branch
            for name, branch in zip(names, self.branches, strict=True)
            if isinstance(branch, Branch)
        }

    @property
    def extra_queries(self) -> int:
        """At most this many for each branch."""
        return self.config.max_queries * len(self.embeds)

    def supervision(self, base: Supervision) -> Supervision:
        """The base, which is remembered:
        the branches' queries learn by it, whatever later schemes make of it.
        """
        self.base = base
        return base

    def scene(self, step: Step) -> Scene:
        """The step as branches see it."""
        columns = (
            None if step.supervision.columns is None else step.supervision.columns(step.targets)
        )
        return make_scene(
            self.adapter(step.memory), self.adapter.strides, step.sizes, step.targets, columns
        )

    def extend(self, step: Step) -> Extension:
        """The branches' losses, and a block of queries for each."""
        config, scene, draw = self.config, self.scene(step), random_draw(self.generator)
        losses: dict[str, Tensor] = {}
        blocks = []
        for i, (name, branch) in enumerate(self.named.items()):
            terms, assigned = branch(scene, draw)
            if config.head_weight:
                losses |= {
                    f"co_{name}_head/{term}": config.head_weight * self.layers * v
                    for term, v in terms.items()
                }
            if config.query_weight:
                fill = config.pad == "background"
                chosen = choose(
                    assigned,
                    scene.sizes,
                    scene.offsets,
                    draw,
                    max_queries=config.max_queries,
                    fill=fill,
                )
                blocks.append(self.block(i, name, chosen, step))
        return Extension(blocks, losses)

    def block(self, index: int, name: str, chosen: Chosen, step: Step) -> QueryBlock:
        """The positives of the branch of that index and name as queries with known targets."""
        mark = None if self.marks is None else self.marks[index]
        coordinates = None if step.queries.boxes is None else step.queries.boxes.shape[-1]
        supervision = step.supervision if self.config.aligned else self.base
        assignment = known_assignment(
            chosen.image, chosen.slot, chosen.target, step.detector.decoder.outputs
        )
        supervision = supervision.known(assignment, chosen.counts)
        if chosen.unused is not None:
            supervision = replace(supervision, rule=leaving_out(supervision.rule, chosen.unused))
        return QueryBlock(
            f"co_{name}",
            self.embeds[index](chosen, mark, coordinates),
            supervision,
            weight=self.config.query_weight,
            normaliser=reduce_mean(chosen.boxes.new_full((), len(chosen.image))).clamp(min=1),
            unused=chosen.unused,
            repeats=True,
            masks=self.config.masks,
        )

    def metrics(
        self, step: Step, blocks: Sequence[QueryBlock], assignments: Mapping[str, Assignment]
    ) -> dict[str, Tensor]:
        """Positive queries for each target of the batch, by branch;
        NaN where there is no target.
        """
        names = [f"co_{name}" for name in self.named] if self.embeds else []
        outputs = step.detector.decoder.outputs
        counts = {
            name: step.mean_boxes.new_full((), len(assignments[name].layer) / outputs)
            for name in names
        }
        return {
            f"{name}/positives": count / len(step.targets.labels) for name, count in counts.items()
        }
