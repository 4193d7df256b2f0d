"""The network parts as a recipe names them;
docs/detectors.md says what each is. Importing this imports no torch.

A part that comes in several kinds is a union that `kind` tells apart. Each kind holds the fields
that it reads and no others, so what cannot be combined cannot be written; what its readers ask of
every kind is a constant of the class.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from detrellis.fields import (
    Config,
    Count,
    Few,
    Points,
    Positive,
    Width,
    ZeroToBelowOne,
    ZeroToOne,
    within,
)
from detrellis.recipes.backbones import AnyBackboneConfig, BackboneConfig
from detrellis.recipes.encoders import DeformableEncoderConfig, EncoderConfig

Overlap = Annotated[float, within(0, 1, below=True)]  # an IoU
QueryCount = Annotated[int, within(1, 100_000)]
ProposalTargets = Literal["objectness", "classes"]
MASK_STRIDE = 4  # of the map that masks are read from


class DeformableAttentionConfig(Config):
    """A few sampled points on each level, around a query's point or box (Deformable DETR)."""

    smca: ClassVar[bool] = False
    kind: Literal["deformable"] = "deformable"
    points: Points = 4  # that each head samples on each level; or a list, of each (RT-DETRv2)
    # Of offsets around a box, in its sides
    offset_scale: Annotated[float, within(0, 10, above=True)] = 0.5
    # Discrete: the nearest cell, offsets stay (RT-DETRv2)
    sampling: Literal["bilinear", "discrete"] = "bilinear"
    # Read a projection of the memory, and project what was read; not in D-FINE
    projected: bool = True
    # An MLP of the current boxes' sines, or of the boxes (RT-DETR)
    position: Literal["sine", "box"] = "sine"
    # Largest entry of positions from boxes (D-FINE: 10); None: any
    position_limit: Positive | None = None
    # Positions derived from boxes, times an MLP of the content (DAB-DETR)
    position_scale: bool = False


class DenseAttentionConfig(Config):
    """All tokens of one level (DETR); of several levels each layer reads one, coarse to fine."""

    kind: Literal["dense"] = "dense"
    # A Gaussian prior around points of each query, on all levels together (SMCA-DETR)
    smca: bool = False


class ConditionalAttentionConfig(Config):
    """Contents with contents and positions with positions,
    on one level as the dense one (Conditional DETR).
    """

    smca: ClassVar[bool] = False
    kind: Literal["conditional"] = "conditional"
    # Each query reads the cells in its current box alone, on all levels (Cascade-DETR)
    within_boxes: bool = False


class SemanticAttentionConfig(Config):
    """Each query is sampled anew in its box, on one level as the dense one (SAM-DETR);
    all but `smca` are ablations.
    """

    kind: Literal["semantic"] = "semantic"
    smca: bool = False  # a Gaussian prior around the salient points
    resample: Literal["points", "avg", "max"] = "points"  # salient points, or the pooled region
    # Points of a query; fewer than heads are shared, more add heads; None: one a head
    keypoints: Few | None = None
    reweight: bool = True  # gates that the old query gives
    search: Literal["box", "image"] = "box"  # where the points may lie
    zero_init: bool = False  # points start in the centres of the boxes


class MaskedAttentionConfig(Config):
    """The tokens of one level that lie in a query's mask of the layer before,
    coarse to fine (Mask2Former).
    """

    smca: ClassVar[bool] = False
    kind: Literal["masked"] = "masked"
    project: bool = False  # project the memory also where it has the decoder's width


class MasksConfig(Config):
    """A map of stride 4 that masks are read from,
    and an embedding of each query (Mask2Former, Mask DINO).
    """

    width: Width = 256  # of map and embeddings
    # The mean probability of a mask is a factor of the score; False: best for box AP
    scores: bool = True


class LearnedQueriesConfig(Config):
    """Positions that are learned (DETR)."""

    boxes_from_masks: ClassVar[None] = None
    position: ClassVar[Literal["queries"]] = "queries"
    patterns: ClassVar[int] = 0
    kind: Literal["learned"] = "learned"
    count: QueryCount = 300
    content: Literal["zero", "learned"] = "learned"


class AnchorQueriesConfig(Config):
    """Boxes that are learned (DAB-DETR);
    their positions are derived from the current boxes at each layer.
    """

    boxes_from_masks: ClassVar[None] = None
    position: ClassVar[Literal["boxes"]] = "boxes"
    kind: Literal["anchors"] = "anchors"
    count: QueryCount = 300
    content: Literal["zero", "shared", "learned"] = "learned"  # shared: one for all
    # Contents that each anchor stands with (DAB-DETR); 0: off
    patterns: Annotated[int, within(0, 100)] = 0
    indicator: bool = False  # keep a content channel that tells denoising queries (DN-DETR)
    fixed_centres: bool = False  # centres are drawn uniformly and not trained
    frozen_boxes: bool = False  # neither centres nor sizes are trained (SAM-DETR, Table 5)


class ProposalQueriesConfig(Config):
    """Boxes that the encoder proposes,
    which positions and contents are derived from (two-stage Deformable DETR).
    """

    boxes_from_masks: ClassVar[None] = None
    position: ClassVar[Literal["queries"]] = "queries"
    patterns: ClassVar[int] = 0
    kind: Literal["proposals"] = "proposals"
    count: QueryCount = 300
    proposal_targets: ProposalTargets = "objectness"
    # Tokens that can propose nothing are ranked too, as in the reference codes
    empty_compete: bool = False
    # Proposals that overlap a better one by more than this come last (DDQ); None: off
    distinct: Overlap | None = None
    # Cells: of boxes around the tokens' cells (Salience-DETR)
    distinct_by: Literal["boxes", "cells"] = "boxes"


class MixedQueriesConfig(Config):
    """Boxes that the encoder proposes, with contents that are not derived from them (DINO)."""

    patterns: ClassVar[int] = 0
    kind: Literal["mixed"] = "mixed"
    count: QueryCount = 300
    # learned (DINO); of the tokens that propose the boxes: memory, projected (DDQ), or states of
    # the head (RT-DETR)
    content_from: Literal["learned", "memory", "states"] = "learned"
    # Of the proposals, or of the current boxes at each layer
    position: Literal["queries", "boxes"] = "queries"
    proposal_targets: ProposalTargets = "objectness"
    empty_compete: bool = False
    distinct: Overlap | None = None
    distinct_by: Literal["boxes", "cells"] = "boxes"
    deltas: bool = False  # each query learns how it moves its proposal's box (LW-DETR)
    # queries begin with the boxes around their proposals' masks (Mask DINO), up to the last cell or
    # with it; None: with the proposals' boxes
    boxes_from_masks: Literal["mask2box", "bitmask"] | None = None
    # The level of the smallest proposals; coarsest: Mask DINO's
    smallest_on: Literal["finest", "coarsest"] = "finest"


CrossAttentionConfig = (
    DeformableAttentionConfig
    | DenseAttentionConfig
    | ConditionalAttentionConfig
    | SemanticAttentionConfig
    | MaskedAttentionConfig
)
QueriesConfig = (
    LearnedQueriesConfig | AnchorQueriesConfig | ProposalQueriesConfig | MixedQueriesConfig
)


class DistributionsConfig(Config):
    """Bins of D-FINE's distributions:
    how far a side may lie from that of a fixed box, fine near 0, coarse far off.
    """

    bins: Annotated[int, within(4, 1000)] = 32  # an even number, and one more
    # distances count in 1 / scale of the fixed box's sides, and reach 2 * reach * scale to either
    # side
    scale: Annotated[float, within(0.1, 1000)] = 4.0
    reach: Annotated[float, within(0.01, 1000)] = 0.5


class DecoderConfig(Config):
    """The layers that turn queries into boxes, and the heads behind them."""

    layers: Few = 6
    heads: Few = 8
    cross_heads: Few | None = None  # of the attention to the memory; None: as many as heads
    hidden: Count = 1024
    refine: Literal["none", "detached", "look_forward_twice"] = "none"
    final_norm: bool = False
    shared_heads: bool = False  # one class head and one box head for all layers
    # Class and mask heads read the queries after final_norm twice (Mask DINO's own weights)
    double_norm: bool = False
    # The queries give an output before the first layer, too, which learns (Mask DINO)
    initial_output: bool = False
    relation: bool = False  # self-attention reads how boxes lie to each other (Relation-DETR)
    ranked: bool = False  # queries know how they rank by score (Rank-DETR)
    cross_first: bool = False  # cross-attention before self-attention (MS-DETR)
    gated: bool = False  # what cross-attention reads comes through a gate, not a residual (D-FINE)
    # That boxes are means of (D-FINE); None: layers move boxes
    distributions: DistributionsConfig | None = None
    # From layer to layer, queries that overlap a better one by more are dropped (DDQ)
    distinct: Overlap | None = None


class DetectorConfig(Config):
    """The network parts, and how detections are read off them."""

    backbone: Annotated[AnyBackboneConfig, Field(discriminator="kind")] = BackboneConfig()
    width: Width = 256
    encoder: Annotated[EncoderConfig, Field(discriminator="kind")] = DeformableEncoderConfig()
    queries: Annotated[QueriesConfig, Field(discriminator="kind")] = LearnedQueriesConfig()
    cross_attention: Annotated[CrossAttentionConfig, Field(discriminator="kind")] = (
        DeformableAttentionConfig()
    )
    decoder: DecoderConfig = DecoderConfig()
    masks: MasksConfig | None = None  # None: boxes alone
    activation: Literal["relu", "prelu", "gelu", "silu"] = "relu"  # of the feed-forward blocks
    dropout: ZeroToBelowOne = 0.1
    # Softmax: classes exclude each other, one means "no object"
    scores: Literal["sigmoid", "softmax"] = "sigmoid"
    # A head that learns the IoU, and how scores use it
    iou_branch: Literal["none", "product", "root"] = "none"
    # what box heads move: logits, or relative, centres by sizes and sizes by an exponential
    # (LW-DETR, RF-DETR)
    box_encoding: Literal["logits", "relative"] = "logits"
    eps: Annotated[float, within(0, 0.5, above=True, below=True)] = 1e-5  # of the inverse sigmoid
    position_temperature: Annotated[float, within(1, 1e6)] = 10000.0
    position_offset: Annotated[float, within(-1, 1)] = -0.5
    # Without masks, batches are padded to multiples of it, so that no map ends with a part of a cell
    size_divisor: Annotated[int, within(1, 256)] = 1
    top_k: Count = 100  # detections of an image, at most
    # detections whose IoU with a better one of their class is higher lose score; None: off
    soft_nms: ZeroToOne | None = None

    @property
    def pads_to(self) -> int:
        """What the sides of a batch are padded to multiples of; masks are of images as they are."""
        return self.size_divisor if self.masks is None else 1

    @property
    def two_stage(self) -> bool:
        """Whether the encoder proposes the queries' boxes."""
        return isinstance(self.queries, ProposalQueriesConfig | MixedQueriesConfig)

    @property
    def objectness(self) -> bool:
        """Whether the proposals' class head tells objects from background,
        instead of the classes.
        """
        queries = self.queries
        if isinstance(queries, ProposalQueriesConfig | MixedQueriesConfig):
            return queries.proposal_targets == "objectness"
        return False

    @property
    def modulated(self) -> bool:
        """Whether it is SMCA-DETR's decoder, whose queries carry the prior."""
        return self.cross_attention.kind == "dense" and self.cross_attention.smca

    @property
    def boxes(self) -> bool:
        """Whether the queries predict boxes; else masks alone."""
        return self.cross_attention.kind != "masked"

    @property
    def memory_width(self) -> int:
        """Channels of the encoder's tokens."""
        return self.encoder.width or self.width

    @property
    def map_strides(self) -> tuple[int, ...]:
        """Strides of the backbone's maps:
        those that the neck reads, and the finer one that masks are read from.
        """
        strides = self.backbone.strides
        return strides if self.masks is None else (MASK_STRIDE, *strides)

    @property
    def level_strides(self) -> tuple[int, ...]:
        """Pixels that a cell of each level covers."""
        if self.encoder.kind == "projector":
            return self.encoder.strides
        *finer, last = self.backbone.strides
        last //= 2 if self.backbone.dilation else 1
        return (*finer, *(last * 2**i for i in range(self.encoder.levels - len(finer))))

    @property
    def capabilities(self) -> frozenset[str]:
        """What schemes may ask of a detector."""
        scores, boxes = self.scores == "sigmoid", self.queries.position == "boxes"
        holds = {"sigmoid_scores": scores, "box_queries": boxes, "proposals": self.two_stage}
        holds |= {"boxes_alone": self.masks is None, "cross_first": self.decoder.cross_first}
        decoder = self.decoder
        more = (
            decoder.distributions
            or decoder.distinct is not None
            or decoder.relation
            or decoder.ranked
        )
        holds["plain_layers"] = self.masks is None and not more
        return frozenset(name for name, held in holds.items() if held)
