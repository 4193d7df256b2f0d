"""The network parts as a recipe names them; docs/detectors.md says what each is. Importing this imports no torch.

A part that comes in several kinds is a union that `kind` tells apart. Each kind holds the fields that it reads and no
others, so what cannot be combined cannot be written; what its readers ask of every kind is a constant of the class.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from detrellis.fields import (
    Ascending,
    Config,
    Count,
    CountOrNone,
    Few,
    Key,
    Points,
    Positive,
    Some,
    ZeroToBelowOne,
    ZeroToOne,
    within,
)

Width = Annotated[int, within(4, 8192)]
Levels = Annotated[int, within(1, 8)]
Overlap = Annotated[float, within(0, 1, below=True)]  # an IoU
QueryCount = Annotated[int, within(1, 100_000)]
Strides = Annotated[tuple[Count, ...], Ascending, Some]
ProposalTargets = Literal["objectness", "classes"]
MASK_STRIDE = 4  # of the map that masks are read from
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")  # torchvision's
VD_RESNETS = ("resnet18vd", "resnet34vd", "resnet50vd", "resnet101vd")  # RT-DETR's; every other backbone is timm's


class BackboneConfig(Config):
    """`name`: a torchvision ResNet (`resnet18`, `34`, `50`, `101`), one of RT-DETR's (`resnet18vd`, ...), or any timm
    model with feature maps."""

    kind: Literal["hierarchical"] = "hierarchical"
    name: str = "resnet50"
    pretrained: bool = True
    weights: Key | None = None  # local file of pretrained weights; None: an installed package, or the hub
    # auto: frozen with pretrained weights, trained without; frozen freezes a ResNet's stem and first stage too,
    # frozen_norm the norms alone
    norm: Literal["auto", "frozen", "frozen_norm", "batch"] = "auto"
    dilation: bool = False  # DC5
    drop_path: ZeroToBelowOne = 0.0  # rate of dropped residual branches, for timm models that have it
    strides: Strides = (8, 16, 32)
    # stages, with the stem (or "stem" alone), that training leaves as they are, BatchNorm's statistics too; 0: what
    # `norm` freezes
    frozen: Annotated[int, within(0, 99)] | Literal["all", "stem"] = 0

    @property
    def normalisation(self) -> Literal["frozen", "frozen_norm", "batch"]:
        """`norm` with "auto" decided."""
        return self.norm if self.norm != "auto" else "frozen" if self.pretrained else "batch"

    def untrained(self) -> BackboneConfig:
        """The same network without pretrained weights."""
        return self.model_copy(update={"pretrained": False, "weights": None, "norm": self.normalisation})


class WindowViTConfig(Config):
    """A plain ViT, whose maps have one stride, with attention within windows in some blocks (LW-DETR, RF-DETR)."""

    dilation: ClassVar[bool] = False
    kind: Literal["window_vit"] = "window_vit"
    pretrained: bool = True
    weights: Key | None = None  # local file of pretrained weights; None: those of
    timm: Key | None = None  # timm's model of this name; None: no host has any
    style: Literal["cae", "dinov2"] = "cae"  # LW-DETR's; dinov2: with class tokens and a norm of each map (RF-DETR)
    width: Annotated[int, within(4, 8192)] = 192
    heads: Few = 12
    patch: Annotated[int, within(1, 256)] = 16
    grid: Annotated[int, within(1, 1024)] = 14  # patches along a side of the table of positions, which is resized
    windows: Annotated[int, within(1, 32)] = 4  # along each side of the image
    windowed: Annotated[tuple[CountOrNone, ...], Ascending] = (0, 2, 4)  # blocks within windows, counted from 0
    taps: Annotated[tuple[Few, ...], Ascending, Some] = (2, 4, 6)  # after how many blocks a map is read off
    drop_path: ZeroToBelowOne = 0.0
    frozen: Annotated[int, within(0, 99)] | Literal["all"] = 0  # blocks that are not trained, with the embedding

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the maps, in pixels: the patch."""
        return (self.patch,)

    def untrained(self) -> WindowViTConfig:
        """The same network without pretrained weights."""
        return self.model_copy(update={"pretrained": False, "weights": None})


class DeformableEncoderConfig(Config):
    """Deformable attention over several levels, of which the neck makes the coarser ones (Deformable DETR)."""

    kind: Literal["deformable"] = "deformable"
    layers: Few = 6
    heads: Few = 8
    hidden: Count = 1024  # of the feed-forward blocks
    levels: Levels = 4
    points: Few = 4  # that each head samples on each level
    fusion: bool = False  # a memory of the tokens at all depths (Stable-DINO); False: of the last layer's
    width: Width | None = None  # of the memory, which a masked decoder projects to its own; None: detector.width


class DenseEncoderConfig(Config):
    """Dense attention over one map (DETR)."""

    levels: ClassVar[int] = 1
    width: ClassVar[None] = None
    kind: Literal["dense"] = "dense"
    layers: Few = 6
    heads: Few = 8
    hidden: Count = 1024
    neck_norm: bool = False  # GroupNorm after the projection of the map
    position_scale: bool = False  # positions times an MLP of the content (DAB-DETR)


class IntraScaleEncoderConfig(Config):
    """Dense attention within each of several levels, and in the middle layer over all together (SMCA-DETR)."""

    width: ClassVar[None] = None
    kind: Literal["intra_scale"] = "intra_scale"
    layers: Few = 6
    heads: Few = 8
    hidden: Count = 1024
    levels: Levels = 4
    position_scale: bool = False


class HybridEncoderConfig(Config):
    """Attention within the coarsest map, then fusion across levels by convolutions (RT-DETR)."""

    width: ClassVar[None] = None
    kind: Literal["hybrid"] = "hybrid"
    layers: Few = 1  # of attention
    heads: Few = 8
    hidden: Count = 1024
    levels: Levels = 3
    inner: Width | None = None  # channels of its maps; None: detector.width
    fuse_by: Literal["csp", "elan"] = "csp"  # two levels; elan: D-FINE's, with two CSP layers in a row
    blocks: Few = 3  # RepVGG's, in each CSP layer
    expansion: Annotated[float, within(0.01, 10)] = 1.0  # their width, in widths of the maps; of elan, in halves


class ProjectorEncoderConfig(Config):
    """No layers: a plain backbone's maps, resampled to the levels and mixed by a C2f block each (LW-DETR)."""

    width: ClassVar[None] = None
    layers: ClassVar[int] = 0
    heads: ClassVar[int] = 1
    kind: Literal["projector"] = "projector"
    strides: Strides = (16,)  # of the levels, finest first: half, once or twice that of the maps
    blocks: Few = 3  # bottlenecks of a C2f block
    norm: Literal["batch", "layer"] = "batch"
    eps: Annotated[float, within(0, 0.1, above=True)] = 1e-6  # of norm=layer

    @property
    def levels(self) -> int:
        """How many there are."""
        return len(self.strides)


class DeformableAttentionConfig(Config):
    """A few sampled points on each level, around a query's point or box (Deformable DETR)."""

    smca: ClassVar[bool] = False
    kind: Literal["deformable"] = "deformable"
    points: Points = 4  # that each head samples on each level; or a list, of each (RT-DETRv2)
    offset_scale: Annotated[float, within(0, 10, above=True)] = 0.5  # of offsets around a box, in its sides
    sampling: Literal["bilinear", "discrete"] = "bilinear"  # discrete: the nearest cell, offsets stay (RT-DETRv2)
    projected: bool = True  # read a projection of the memory, and project what was read; not in D-FINE
    position: Literal["sine", "box"] = "sine"  # an MLP of the current boxes' sines, or of the boxes (RT-DETR)
    position_limit: Positive | None = None  # largest entry of positions from boxes (D-FINE: 10); None: any
    position_scale: bool = False  # positions derived from boxes, times an MLP of the content (DAB-DETR)


class DenseAttentionConfig(Config):
    """All tokens of one level (DETR); of several levels each layer reads one, coarse to fine."""

    kind: Literal["dense"] = "dense"
    smca: bool = False  # a Gaussian prior around points of each query, on all levels together (SMCA-DETR)


class ConditionalAttentionConfig(Config):
    """Contents with contents and positions with positions, on one level as the dense one (Conditional DETR)."""

    smca: ClassVar[bool] = False
    kind: Literal["conditional"] = "conditional"
    within_boxes: bool = False  # each query reads the cells in its current box alone (Cascade-DETR)


class SemanticAttentionConfig(Config):
    """Each query is sampled anew in its box, on one level as the dense one (SAM-DETR); all but `smca` are ablations."""

    kind: Literal["semantic"] = "semantic"
    smca: bool = False  # a Gaussian prior around the salient points
    resample: Literal["points", "avg", "max"] = "points"  # salient points, or the pooled region
    keypoints: Few | None = None  # points of a query; fewer than heads are shared, more add heads; None: one a head
    reweight: bool = True  # gates that the old query gives
    search: Literal["box", "image"] = "box"  # where the points may lie
    zero_init: bool = False  # points start in the centres of the boxes


class MaskedAttentionConfig(Config):
    """The tokens of one level that lie in a query's mask of the layer before, coarse to fine (Mask2Former)."""

    smca: ClassVar[bool] = False
    kind: Literal["masked"] = "masked"
    project: bool = False  # project the memory also where it has the decoder's width


class MasksConfig(Config):
    """A map of stride 4 that masks are read from, and an embedding of each query (Mask2Former, Mask DINO)."""

    width: Width = 256  # of map and embeddings
    scores: bool = True  # the mean probability of a mask is a factor of the score; False: best for box AP


class LearnedQueriesConfig(Config):
    """Positions that are learned (DETR)."""

    boxes_from_masks: ClassVar[None] = None
    position: ClassVar[Literal["queries"]] = "queries"
    patterns: ClassVar[int] = 0
    kind: Literal["learned"] = "learned"
    count: QueryCount = 300
    content: Literal["zero", "learned"] = "learned"


class AnchorQueriesConfig(Config):
    """Boxes that are learned (DAB-DETR); their positions are derived from the current boxes at each layer."""

    boxes_from_masks: ClassVar[None] = None
    position: ClassVar[Literal["boxes"]] = "boxes"
    kind: Literal["anchors"] = "anchors"
    count: QueryCount = 300
    content: Literal["zero", "shared", "learned"] = "learned"  # shared: one for all
    patterns: Annotated[int, within(0, 100)] = 0  # contents that each anchor stands with (DAB-DETR); 0: off
    indicator: bool = False  # keep a content channel that tells denoising queries (DN-DETR)
    fixed_centres: bool = False  # centres are drawn uniformly and not trained
    frozen_boxes: bool = False  # neither centres nor sizes are trained (SAM-DETR, Table 5)


class ProposalQueriesConfig(Config):
    """Boxes that the encoder proposes, which positions and contents are derived from (two-stage Deformable DETR)."""

    boxes_from_masks: ClassVar[None] = None
    position: ClassVar[Literal["queries"]] = "queries"
    patterns: ClassVar[int] = 0
    kind: Literal["proposals"] = "proposals"
    count: QueryCount = 300
    proposal_targets: ProposalTargets = "objectness"
    empty_compete: bool = False  # tokens that can propose nothing are ranked too, as in the reference codes
    distinct: Overlap | None = None  # proposals that overlap a better one by more than this come last (DDQ); None: off


class MixedQueriesConfig(Config):
    """Boxes that the encoder proposes, with contents that are not derived from them (DINO)."""

    patterns: ClassVar[int] = 0
    kind: Literal["mixed"] = "mixed"
    count: QueryCount = 300
    # learned (DINO); of the tokens that propose the boxes: memory, projected (DDQ), or states of the head (RT-DETR)
    content_from: Literal["learned", "memory", "states"] = "learned"
    position: Literal["queries", "boxes"] = "queries"  # of the proposals, or of the current boxes at each layer
    proposal_targets: ProposalTargets = "objectness"
    empty_compete: bool = False
    distinct: Overlap | None = None
    deltas: bool = False  # each query learns how it moves its proposal's box (LW-DETR)
    # queries begin with the boxes around their proposals' masks (Mask DINO), up to the last cell or with it; None: with
    # the proposals' boxes
    boxes_from_masks: Literal["mask2box", "bitmask"] | None = None
    smallest_on: Literal["finest", "coarsest"] = "finest"  # the level of the smallest proposals; coarsest: Mask DINO's


AnyBackboneConfig = BackboneConfig | WindowViTConfig
EncoderConfig = (
    DeformableEncoderConfig
    | DenseEncoderConfig
    | IntraScaleEncoderConfig
    | HybridEncoderConfig
    | ProjectorEncoderConfig
)
CrossAttentionConfig = (
    DeformableAttentionConfig
    | DenseAttentionConfig
    | ConditionalAttentionConfig
    | SemanticAttentionConfig
    | MaskedAttentionConfig
)
QueriesConfig = LearnedQueriesConfig | AnchorQueriesConfig | ProposalQueriesConfig | MixedQueriesConfig


class DistributionsConfig(Config):
    """Bins of D-FINE's distributions: how far a side may lie from that of a fixed box, fine near 0, coarse far off."""

    bins: Annotated[int, within(4, 1000)] = 32  # an even number, and one more
    # distances count in 1 / scale of the fixed box's sides, and reach 2 * reach * scale to either side
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
    double_norm: bool = False  # class and mask heads read the queries after final_norm twice (Mask DINO's own weights)
    initial_output: bool = False  # the queries give an output before the first layer, too, which learns (Mask DINO)
    relation: bool = False  # self-attention reads how boxes lie to each other (Relation-DETR)
    ranked: bool = False  # queries know how they rank by score (Rank-DETR)
    cross_first: bool = False  # cross-attention before self-attention (MS-DETR)
    gated: bool = False  # what cross-attention reads comes through a gate, not a residual (D-FINE)
    distributions: DistributionsConfig | None = None  # that boxes are means of (D-FINE); None: layers move boxes
    distinct: Overlap | None = None  # from layer to layer, queries that overlap a better one by more are dropped (DDQ)


class DetectorConfig(Config):
    """The network parts, and how detections are read off them."""

    backbone: Annotated[AnyBackboneConfig, Field(discriminator="kind")] = BackboneConfig()
    width: Width = 256
    encoder: Annotated[EncoderConfig, Field(discriminator="kind")] = DeformableEncoderConfig()
    queries: Annotated[QueriesConfig, Field(discriminator="kind")] = LearnedQueriesConfig()
    cross_attention: Annotated[CrossAttentionConfig, Field(discriminator="kind")] = DeformableAttentionConfig()
    decoder: DecoderConfig = DecoderConfig()
    masks: MasksConfig | None = None  # None: boxes alone
    activation: Literal["relu", "prelu", "gelu", "silu"] = "relu"  # of the feed-forward blocks
    dropout: ZeroToBelowOne = 0.1
    scores: Literal["sigmoid", "softmax"] = "sigmoid"  # softmax: classes exclude each other, one means "no object"
    iou_branch: Literal["none", "product", "root"] = "none"  # a head that learns the IoU, and how scores use it
    # what box heads move: logits, or relative, centres by sizes and sizes by an exponential (LW-DETR, RF-DETR)
    box_encoding: Literal["logits", "relative"] = "logits"
    eps: Annotated[float, within(0, 0.5, above=True, below=True)] = 1e-5  # of the inverse sigmoid
    position_temperature: Annotated[float, within(1, 1e6)] = 10000.0
    position_offset: Annotated[float, within(-1, 1)] = -0.5
    top_k: Count = 100  # detections of an image, at most
    # detections whose IoU with a better one of their class is higher lose score; None: off
    soft_nms: ZeroToOne | None = None

    @property
    def two_stage(self) -> bool:
        """Whether the encoder proposes the queries' boxes."""
        return isinstance(self.queries, ProposalQueriesConfig | MixedQueriesConfig)

    @property
    def objectness(self) -> bool:
        """Whether the proposals' class head tells objects from background, instead of the classes."""
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
        """Strides of the backbone's maps: those that the neck reads, and the finer one that masks are read from."""
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
        return frozenset(name for name, held in holds.items() if held)
