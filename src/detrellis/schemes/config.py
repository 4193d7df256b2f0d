"""The training schemes' dials. `dial` is what N in `--scheme NAME=N` sets; `until`, which all have,
the part of the run after which the scheme is switched off: `--scheme NAME@UNTIL`.

They stand beside the schemes and not in their files, because recipes read them without waiting for
torch.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from detrellis.fields import Config, Count, Few, Positive, Some, Weight, ZeroToOne, within

Queries = Annotated[int, within(1, 10_000)]  # of a block that exists in training only
Until = Annotated[float, within(0, 1, above=True)]  # a part of the run
Noise = Annotated[float, within(0, 10)]  # of boxes, in half their size
# Which of Group DETR's groups denoising queries read besides themselves: the first, as without
# groups, or all.
Sees = Literal["main", "all"]


class DNConfig(Config):
    """Denoising (DN-DETR)."""

    dial: ClassVar[str] = "groups"
    groups: Few = 5
    # As many groups as keep this many queries in the fullest image, instead of `groups`
    total: Queries | None = None
    label_noise: ZeroToOne = 0.2  # part of the labels that are drawn anew
    box_noise: Noise = 0.4
    # The last channel of contents tells these queries; False: all is the label's (Mask DINO)
    indicator: bool = True
    # Slots that an image does not fill learn "no object"; else they learn nothing
    padded_background: bool = False
    sees: Sees = "main"
    until: Until = 1.0


class CDNConfig(Config):
    """Contrastive denoising (DINO)."""

    dial: ClassVar[str] = "number"
    number: Queries = 100  # positives, and as many negatives; fewer than 50 are a number of groups
    label_noise: ZeroToOne = 0.5  # half of it is the part of the labels that are drawn anew
    box_noise: Noise = 1.0
    sees: Sees = "main"
    until: Until = 1.0


class HybridConfig(Config):
    """Hybrid matching (H-DETR)."""

    dial: ClassVar[str] = "k"
    k: Few = 6  # queries for each target in the extra block
    # Of the extra block; None: five for each of the detector's, at most 1500
    queries: Queries | None = None
    weight: Weight = 1.0  # lambda
    # what sums of losses are divided by: all copies of the boxes, as if each were a target, or the
    # boxes
    divisor: Literal["copies", "boxes"] = "copies"
    until: Until = 1.0


class DenseConfig(Config):
    """Dense queries beside distinct ones (DDQ-DETR)."""

    dial: ClassVar[str] = "k"
    k: Few = 4  # queries for each target in the dense block
    queries: Queries | None = None  # of the block; None: half as many again as the detector has
    weight: Weight = 1.0
    until: Until = 1.0


# Heads on the encoder's memory; `rcnn` is Faster R-CNN, `mask` Mask R-CNN.
BranchName = Literal["atss", "rcnn", "mask", "retinanet", "fcos", "paa", "gfl"]
RegionHead = Literal["linear", "convolutional"]


class CoConfig(Config):
    """Auxiliary heads with one-to-many assignment, their positives as queries (Co-DETR)."""

    dial: ClassVar[str] = "branches"
    # Any number and order, also twice
    branches: Annotated[tuple[BranchName, ...], Some] = ("atss", "rcnn")
    # Lambda 2, of the heads' losses, which count once for each decoder layer; 0: off
    head_weight: Weight = 2.0
    query_weight: Weight = 1.0  # lambda 1, of the decoder's losses for the heads' positives; 0: off
    convolutions: Annotated[int, within(0, 16)] = 1  # stacked in each tower
    # of rcnn and mask: two layers and a box a class, or four convolutions, a layer and one box (on
    # ViT-L)
    regions: RegionHead = "linear"
    max_queries: Queries = 300  # of a branch, in each image
    # what an image with fewer positives than others is filled up with; mask: queries that are not
    # read
    pad: Literal["background", "mask"] = "background"
    # Contents hold the memory at the positives; None: unless derived from boxes
    features: bool | None = None
    vector: bool = False  # tell the branches' positions by a vector each, instead of one number
    aligned: bool = False  # the queries learn what align and others make the main block's learn
    masks: bool = False  # the queries learn masks too, where the detector gives any
    until: Until = 1.0


class FederatedConfig(Config):
    """Class losses over a sample of the classes (federated loss, for LVIS)."""

    dial: ClassVar[str] = "classes"
    # That count in a step, those of its boxes included; all of these even where they are more
    classes: Count = 50
    # Of the number of images with a class, its weight in the draw
    power: Annotated[float, within(0, 10)] = 0.5
    until: Until = 1.0


class AlignConfig(Config):
    """Many-to-one matching and the Align Loss (Align-DETR)."""

    dial: ClassVar[str] = "k"
    k: Few = 4  # candidates for each target
    k_encoder: Few | None = None  # among the encoder's proposals; None: k
    k_last: Few = 1  # in the last decoder layer
    alpha: ZeroToOne = 0.25  # confidence against IoU in the quality
    tau: Positive = 1.5  # how slowly lower ranks fade
    gamma: Annotated[float, within(1, 100)] = 2.0
    floor: ZeroToOne = 0.01  # lowest quality that a target is computed from
    # ia_bce: as released; base: loss.classification
    classification: Literal["align", "ia_bce", "base"] = "align"
    rank_boxes: bool = True  # lower ranks weigh less in the box losses too
    iou_eps: Annotated[float, within(0, 1e-3)] = 0.0  # 1e-6: as in the released code
    until: Until = 1.0


class StableConfig(Config):
    """Position-supervised loss and position-modulated matching (Stable-DINO)."""

    supervised: bool = True  # the position-supervised loss
    modulated: bool = True  # the position-modulated matching
    classes: Weight = 6.0  # weight of the supervised loss; denoising keeps 1
    beta: Weight = 0.5  # how much the position counts in the matching
    until: Until = 1.0


class RankConfig(Config):
    """GIoU-aware loss and high-order matching (Rank-DETR)."""

    after: ZeroToOne = 0.75  # part of the run from which the high-order cost is the matching's
    power: Annotated[float, within(0, 100)] = 4.0  # of the IoU in it
    until: Until = 1.0


class DynamicConfig(Config):
    """Which queries are positives of a target, as many as fit it (MS-DETR, DAC-DETR)."""

    # Score from which a query is one; each target's best query always is
    threshold: ZeroToOne = 0.4
    overlap: ZeroToOne = 0.7  # part of the IoU in a score; the rest is the probability of the class
    positive_fraction: ZeroToOne = 0.25  # of the queries, at most; a random part of more


class DACConfig(Config):
    """An auxiliary decoder without self-attention (DAC-DETR)."""

    dial: ClassVar[str] = "k"
    k: Few = 6  # queries for each target, at most
    pairs: DynamicConfig = DynamicConfig()
    weight: Weight = 1.0  # of its losses
    divisor: Annotated[float, within(0.1, 100)] = 3.0  # boxes that each target counts as
    until: Until = 1.0


class MSConfig(Config):
    """Mixed supervision of what queries read before self-attention (MS-DETR)."""

    dial: ClassVar[str] = "k"
    k: Few = 6  # queries for each target, at most
    pairs: DynamicConfig = DynamicConfig()
    weight: Weight = 1.0  # of its losses
    classes: Weight = 2.0  # of the class loss among them, times that of the one-to-one pairs
    until: Until = 1.0


class SQRConfig(Config):
    """Later layers learn from what earlier ones handed on, too (SQR)."""

    weight: Weight = 1.0  # of its losses
    until: Until = 1.0


class GroupConfig(Config):
    """Groups of queries (Group DETR)."""

    dial: ClassVar[str] = "k"
    # Groups, the detector's queries among them, so that 1 is the base alone. None: 11, or 3 in
    # two-stage detectors.
    k: Few | None = None
    reduction: Literal["mean", "sum"] = "mean"  # of the groups' losses
    # of two-stage detectors; heads: a proposal head for each group; shared: every group gets the
    # detector's own proposals; split: the groups take turns with those ranked after them
    proposals: Literal["heads", "shared", "split"] = "heads"
    # where each query learns a content: the further groups' are drawn independently (the paper), or
    # are the first's
    contents: Literal["fresh", "copied"] = "fresh"
    distances: bool = False  # log how far apart the groups' queries are (PD and MD, Eq. 6 and 7)
    until: Until = 1.0


SchemeConfig = (
    FederatedConfig
    | DNConfig
    | CDNConfig
    | HybridConfig
    | DenseConfig
    | CoConfig
    | AlignConfig
    | StableConfig
    | RankConfig
    | DACConfig
    | MSConfig
    | SQRConfig
    | GroupConfig
)


class SchemesConfig(Config):
    """The training schemes of a recipe, in the order in which they are built; None: off."""

    federated: FederatedConfig | None = None  # first: all that learns classes follows it
    dn: DNConfig | None = None
    cdn: CDNConfig | None = None
    hybrid: HybridConfig | None = None
    dense: DenseConfig | None = None
    co: CoConfig | None = None  # before those that set what positives learn: its labels stay
    align: AlignConfig | None = None
    stable: StableConfig | None = None
    rank: RankConfig | None = None
    dac: DACConfig | None = None
    ms: MSConfig | None = None
    sqr: SQRConfig | None = None
    group: GroupConfig | None = None

    def target_setters(self, *, to_the_end: bool = False) -> dict[str, str]:
        """The schemes that say themselves what the class logit of a positive should learn,
        and what makes each of them leave it. `to_the_end`: without those that are switched off
        before, after which the recipe's loss says it."""
        setters = {}
        if self.align is not None and self.align.classification != "base":
            setters["align"] = "take -o schemes.align.classification=base"
        if self.stable is not None and self.stable.supervised:
            setters["stable"] = "take -o schemes.stable.supervised=false"
        if self.rank is not None:
            setters["rank"] = "leave scheme rank out"
        if to_the_end:
            return {n: remedy for n, remedy in setters.items() if getattr(self, n).until == 1}
        return setters
