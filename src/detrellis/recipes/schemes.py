"""The training schemes' dials. `dial` is what N in `--scheme NAME=N` sets."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from detrellis.fields import Config, Few, Positive, Share, Some, Weight, within

Queries = Annotated[int, within(1, 10_000)]  # of a block that exists in training only
Noise = Annotated[float, within(0, 10)]  # of boxes, in half their size


class DNConfig(Config):
    """Denoising (DN-DETR)."""

    dial: ClassVar[str] = "groups"
    groups: Few = 5
    total: Queries | None = None  # as many groups as keep this many queries in the fullest image, instead of `groups`
    label_noise: Share = 0.2
    box_noise: Noise = 0.4
    padded_background: bool = False  # slots that an image does not fill learn "no object"
    sees: Literal["main", "all"] = "main"  # with groups: whether it reads the first group only


class CDNConfig(Config):
    """Contrastive denoising (DINO)."""

    dial: ClassVar[str] = "number"
    number: Queries = 100
    label_noise: Share = 0.5
    box_noise: Noise = 1.0
    sees: Literal["main", "all"] = "main"


class HybridConfig(Config):
    """Hybrid matching (H-DETR)."""

    dial: ClassVar[str] = "k"
    k: Few = 6  # queries for each target in the extra block
    queries: Queries | None = None  # of the extra block; None: five for each of the detector's, at most 1500
    weight: Weight = 1.0  # lambda
    divisor: Literal["copies", "boxes"] = "copies"


# Heads on the encoder's memory; `rcnn` is Faster R-CNN, `mask` Mask R-CNN.
Branch = Literal["atss", "rcnn", "mask", "retinanet", "fcos", "paa", "gfl"]


class CoConfig(Config):
    """Auxiliary heads with one-to-many assignment, their positives as queries (Co-DETR)."""

    dial: ClassVar[str] = "branches"
    branches: Annotated[tuple[Branch, ...], Some] = ("atss", "rcnn")  # any number and order, also twice
    heads: Weight = 2.0  # lambda 2, of the heads' losses, times the decoder layers; 0: off
    queries: Weight = 1.0  # lambda 1, of the decoder's losses for the heads' positives; 0: off
    convolutions: Annotated[int, within(0, 16)] = 1  # stacked in each tower
    most: Queries = 300  # queries of a branch
    pad: Literal["background", "mask"] = "background"  # what an image with fewer positives is filled up with
    features: bool | None = None  # contents hold the memory at the positives; None: unless derived from boxes
    vector: bool = False  # tell the branches' queries by a vector each, instead of one number
    aligned: bool = False  # with align: its target and weights for the branches' queries too


class AlignConfig(Config):
    """Many-to-one matching and the Align Loss (Align-DETR)."""

    dial: ClassVar[str] = "k"
    k: Few = 4  # candidates for each target
    k_encoder: Few | None = None  # among the encoder's proposals; None: k
    k_last: Few = 1  # in the last decoder layer
    alpha: Share = 0.25  # confidence against IoU in the quality
    tau: Positive = 1.5  # how slowly lower ranks fade
    gamma: Annotated[float, within(1, 100)] = 2.0
    floor: Share = 0.01  # lowest quality that a target is computed from
    classification: Literal["align", "ia_bce", "base"] = "align"  # ia_bce: as released; base: loss.classification
    rank_boxes: bool = True
    iou_eps: Annotated[float, within(0, 1e-3)] = 0.0  # 1e-6: as in the released code


class StableConfig(Config):
    """Position-supervised loss and position-modulated matching (Stable-DINO)."""

    supervised: bool = True
    modulated: bool = True
    classes: Weight = 6.0  # weight of the supervised loss; denoising keeps 1
    beta: Weight = 0.5  # how much the position counts in the matching


class GroupConfig(Config):
    """Groups of queries (Group DETR)."""

    dial: ClassVar[str] = "k"
    # Groups, the detector's queries among them, so that 1 is the base alone. None: 11, or 3 in two-stage detectors.
    k: Few | None = None
    reduction: Literal["mean", "sum"] = "mean"  # of the groups' losses
    proposals: Literal["heads", "shared", "split"] = "heads"  # of two-stage detectors
    contents: Literal["fresh", "copied"] = "fresh"  # what the further groups' learned contents begin as
    distances: bool = False  # log how far apart the groups' queries are


class SchemesConfig(Config):
    """Training schemes; None: off."""

    dn: DNConfig | None = None
    cdn: CDNConfig | None = None
    hybrid: HybridConfig | None = None
    co: CoConfig | None = None  # before those that set what positives aim at: its labels stay
    align: AlignConfig | None = None
    stable: StableConfig | None = None
    group: GroupConfig | None = None
