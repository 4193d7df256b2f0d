"""Where the decoder's queries come from:
learned positions, learned boxes, or the encoder's proposals.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrellis.boxes import relative_boxes
from detrellis.nn.masks import MaskBox, boxes_around_masks
from detrellis.nn.mlp import MLP, xavier_linear
from detrellis.nn.position import sine_embed
from detrellis.nn.proposals import ProposalHead, select
from detrellis.types import DecoderOutput, Memory, Proposals, Queries


def normal(*shape: int) -> nn.Parameter:
    """A parameter from the standard normal distribution."""
    return nn.Parameter(torch.empty(shape).normal_())


# What is learned for each query of one more kind: position, content, centres, sizes.
Table = nn.ParameterDict | dict[str, Tensor]
ProposalContent = Literal["boxes", "learned", "memory", "states"]


class QuerySource(nn.Module, ABC):
    """Where the decoder's queries come from, and where training schemes get more of the same kind.

    A scheme keeps the parameters that `fresh` makes for further queries, and `extra` turns them
    into queries, sharing with the detector whatever is not learned for each query. A detector never
    holds a scheme's parameters.
    """

    count: int  # rows that are learned, or proposals that are selected; patterns multiply the rows
    head: ProposalHead | None  # of two-stage detectors

    def __init__(self, count: int, head: ProposalHead | None = None) -> None:
        super().__init__()
        self.count, self.head = count, head

    @abstractmethod
    def forward(self, memory: Memory) -> tuple[Queries, Proposals | None]:
        """The main queries, and the proposals that they came from in a two-stage detector."""

    @abstractmethod
    def fresh(self, count: int) -> nn.ParameterDict:
        """Parameters of `count` more queries: a row each of what is learned for each query."""

    @abstractmethod
    def extra(self, table: Table, memory: Memory, proposals: Proposals | None) -> Queries:
        """The queries of a table that `fresh` made;
        of the selected `proposals` in a two-stage detector.
        """

    def further(self, proposals: Proposals, count: int, copies: int = 1) -> Proposals:
        """The next-best `copies * N` proposals, for `extra`;
        N is `count`, or less where tokens are few.
        """
        assert self.head is not None, "only two-stage detectors have proposals"
        return self.head.further(proposals, count, copies)

    def training_output(self, proposals: Proposals) -> DecoderOutput:
        """What the loss sees of the main proposals."""
        assert self.head is not None, "only two-stage detectors have proposals"
        return self.head.training_output(proposals)


class LearnedQueries(QuerySource):
    """Queries learned as positions.

    `reference` reads a point off the position: a linear layer in one-stage Deformable DETR, an MLP
    in Conditional DETR; DETR has none, and its queries no place. The content is learned too in
    Deformable DETR, else it starts at 0.
    """

    def __init__(
        self, width: int, count: int, *, learned_content: bool, reference: nn.Module | None
    ) -> None:
        super().__init__(count)
        self.position = normal(count, width)
        self.content = normal(count, width) if learned_content else None
        self.reference = reference

    def forward(self, memory: Memory) -> tuple[Queries, None]:
        """The same queries for every image, and no proposals."""
        return self._queries(self.position, self.content, memory), None

    def fresh(self, count: int) -> nn.ParameterDict:
        """Parameters of `count` more queries."""
        width = self.position.shape[1]
        table = {"position": normal(count, width)}
        return nn.ParameterDict(
            table if self.content is None else table | {"content": normal(count, width)}
        )

    def extra(self, table: Table, memory: Memory, proposals: Proposals | None) -> Queries:
        """The queries of `fresh` parameters."""
        return self._queries(table["position"], table.get("content"), memory)

    def _queries(self, position: Tensor, content: Tensor | None, memory: Memory) -> Queries:
        batch = (memory.tokens.shape[0], -1, -1)
        content = torch.zeros_like(position) if content is None else content
        points = (
            None if self.reference is None else self.reference(position).sigmoid().expand(batch)
        )
        return Queries(content.expand(batch), position.expand(batch), points)


def linear_reference(width: int) -> nn.Linear:
    """Deformable DETR's reference point of a query."""
    layer = xavier_linear(width, 2)
    nn.init.zeros_(layer.bias)
    return layer


def point_reference(width: int) -> MLP:
    """Conditional DETR's reference point of a query."""
    return MLP(width, width, 2, 2, xavier=True)


class AnchorQueries(QuerySource):
    """Boxes learned as logits (DAB-DETR); the decoder derives positions from them.

    `contents` is how many contents are learned: 0, they start at zero (DAB-DETR); 1 for all
    queries, DN-DETR's "unknown label"; or one a query (DAB-Deformable-DETR). With `patterns` each
    anchor stands once for each of that many learned contents, pattern by pattern. `indicator`: the
    last channel of a content is kept at 0, and tells denoising queries, where it is 1, from these
    (DN-DETR). `fixed_centres` draws the centres uniformly and never trains them; `frozen` trains
    neither centres nor sizes, schemes' further anchors included (SAM-DETR, Table 5).
    """

    def __init__(
        self,
        width: int,
        count: int,
        *,
        contents: int = 0,
        patterns: int = 0,
        indicator: bool = False,
        fixed_centres: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__(count)
        self.width = width
        self.patterns = patterns
        self.fixed_centres = fixed_centres
        self.frozen = frozen
        self.centres, self.sizes = self._anchors(count)
        rows = patterns or contents
        assert rows in (0, 1, patterns, count), (
            "one content for all queries, for each, or for each pattern"
        )
        self.each = rows == count and not patterns  # each anchor has a content of its own
        self.content = nn.Parameter(torch.randn(rows, width - indicator)) if rows else None

    def forward(self, memory: Memory) -> tuple[Queries, None]:
        """The same queries for every image, and no proposals."""
        return self._queries(self.centres, self.sizes, self.content, memory), None

    def fresh(self, count: int) -> nn.ParameterDict:
        """Parameters of `count` more anchors;
        contents that all anchors share are the detector's.
        """
        centres, sizes = self._anchors(count)
        table = {"centres": centres, "sizes": sizes}
        if self.each and self.content is not None:
            table["content"] = normal(count, self.content.shape[1])
        return nn.ParameterDict(table)

    def extra(self, table: Table, memory: Memory, proposals: Proposals | None) -> Queries:
        """The queries of `fresh` parameters, with patterns that many times more."""
        return self._queries(
            table["centres"], table["sizes"], table.get("content", self.content), memory
        )

    def _anchors(self, count: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Two tensors: weight decay would move fixed centres that are part of a trained one."""
        centres = (
            torch.rand(count, 2).logit(eps=1e-3) if self.fixed_centres else torch.randn(count, 2)
        )
        return (
            nn.Parameter(centres, requires_grad=not (self.fixed_centres or self.frozen)),
            nn.Parameter(torch.randn(count, 2), requires_grad=not self.frozen),
        )

    def _queries(
        self, centres: Tensor, sizes: Tensor, content: Tensor | None, memory: Memory
    ) -> Queries:
        boxes = torch.cat([centres, sizes], dim=-1).sigmoid()
        copies = max(self.patterns, 1)
        content = boxes.new_zeros(1, self.width) if content is None else content
        content = F.pad(content, (0, self.width - content.shape[-1]))
        if self.patterns:
            content = content.repeat_interleave(len(boxes), dim=0)
        content = content.expand(copies * len(boxes), -1)
        batch = (memory.tokens.shape[0], -1, -1)
        return Queries(content.expand(batch), boxes=boxes.repeat(copies, 1).expand(batch))


class ProposalQueries(QuerySource):
    """Boxes from the best proposals, detached; position, content or both derived from those boxes.

    Two-stage Deformable DETR derives both (`content="boxes"`). Mixed query selection learns the
    content instead; with `"memory"` it is the token that proposed the box, detached and projected
    (DDQ), with `"states"` the state of the proposal, detached (RT-DETR). With `derive_position`
    off, the decoder derives the position from the boxes at each layer (DINO). With `deltas` each
    query learns how it moves its proposal's box, relative to its size (LW-DETR). With
    `boxes_from_masks` the boxes are those around the proposals' masks (Mask DINO).
    """

    head: ProposalHead

    def __init__(
        self,
        head: ProposalHead,
        width: int,
        *,
        content: ProposalContent = "learned",
        derive_position: bool = False,
        deltas: bool = False,
        boxes_from_masks: MaskBox | None = None,
    ) -> None:
        super().__init__(head.proposals, head)
        self.boxes_from_masks = boxes_from_masks
        self.content = normal(head.proposals, width) if content == "learned" else None
        self.deltas = nn.Parameter(torch.zeros(head.proposals, 4)) if deltas else None
        self.project = nn.Linear(width, width) if content == "memory" else None
        assert content != "boxes" or derive_position, "a content must come from somewhere"
        both = (2 * width, 2 * width)
        self.derive = (
            nn.Sequential(xavier_linear(*both), nn.LayerNorm(2 * width))
            if derive_position
            else None
        )
        self.width, self.content_kind = width, content

    def forward(self, memory: Memory) -> tuple[Queries, Proposals]:
        """The queries and the proposals they came from."""
        proposals = self.head(memory)
        learned = {"content": self.content, "deltas": self.deltas}
        table: Table = {name: rows for name, rows in learned.items() if rows is not None}
        return self._queries(memory, proposals, table), proposals

    def fresh(self, count: int) -> nn.ParameterDict:
        """Contents and deltas of `count` more queries, where they are learned."""
        table = {} if self.content is None else {"content": normal(count, self.width)}
        if self.deltas is not None:
            table["deltas"] = nn.Parameter(torch.zeros(count, 4))
        return nn.ParameterDict(table)

    def extra(self, table: Table, memory: Memory, proposals: Proposals | None) -> Queries:
        """The queries of other proposals."""
        assert proposals is not None
        return self._queries(memory, proposals, table)

    def _queries(self, memory: Memory, proposals: Proposals, table: Table) -> Queries:
        boxes = proposals.boxes.detach()
        if self.boxes_from_masks is not None:
            assert proposals.mask_embeds is not None
            assert memory.masks is not None
            boxes = boxes_around_masks(proposals.mask_embeds, memory.masks, self.boxes_from_masks)
        batch, count = boxes.shape[:2]
        content = table["content"][:count].expand(batch, -1, -1) if "content" in table else None
        if "deltas" in table:
            boxes = relative_boxes(table["deltas"][:count], boxes)
        if self.content_kind == "states":
            content = proposals.selected.detach()
        elif self.project is not None:
            content = self.project(select(memory.tokens.detach(), proposals.best))
        if self.derive is None:
            assert content is not None
            return Queries(content, None, boxes)
        # x, y, w, h in that order: the one place in the family where the sine embedding does not
        # swap.
        position, derived = self.derive(sine_embed(boxes, self.width // 2, order="xywh")).chunk(
            2, dim=-1
        )
        return Queries(derived if content is None else content, position, boxes)
