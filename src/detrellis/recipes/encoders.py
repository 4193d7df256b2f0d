"""Encoders as a recipe names them;
docs/detectors.md says what each is. Importing this imports no torch.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from detrellis.fields import Config, Count, Few, Some, Strides, Width, within

Part = Annotated[float, within(0, 1, above=True)]
Levels = Annotated[int, within(1, 8)]


class DeformableEncoderConfig(Config):
    """Deformable attention over several levels,
    of which the neck makes the coarser ones (Deformable DETR).
    """

    kind: Literal["deformable"] = "deformable"
    layers: Few = 6
    heads: Few = 8
    hidden: Count = 1024  # of the feed-forward blocks
    levels: Levels = 4
    points: Few = 4  # that each head samples on each level
    # A memory of the tokens at all depths (Stable-DINO); False: of the last layer's
    fusion: bool = False
    # Of the memory, which a masked decoder projects to its own; None: detector.width
    width: Width | None = None


class SalienceEncoderConfig(Config):
    """The deformable one for the tokens that matter alone (Salience-DETR, Focus-DETR)."""

    width: ClassVar[None] = None
    kind: Literal["salience"] = "salience"
    layers: Few = 6
    heads: Few = 8
    hidden: Count = 1024
    levels: Annotated[int, within(2, 8)] = 4
    points: Few = 4
    # the part of each level's tokens that is refined, finest first, the last of further levels too;
    # or one number, the part of all tokens (Focus-DETR)
    level_ratios: Part | Annotated[tuple[Part, ...], Some] = (0.25, 0.5, 1.0, 1.0)
    # Of those, in each layer
    layer_ratios: Annotated[tuple[Part, ...], Some] = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2)
    # How near to an object's centre; objects: inside one (Focus)
    targets: Literal["salience", "objects"] = "salience"
    # What the last layer does not refine gets a learned embedding; False: Focus-DETR
    background: bool = True


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
    """Dense attention within each of several levels,
    and in the middle layer over all together (SMCA-DETR).
    """

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
    # Two levels; elan: D-FINE's, with two CSP layers in a row
    fuse_by: Literal["csp", "elan"] = "csp"
    blocks: Few = 3  # RepVGG's, in each CSP layer
    # Their width, in widths of the maps; of elan, in halves
    expansion: Annotated[float, within(0.01, 10)] = 1.0


class ProjectorEncoderConfig(Config):
    """No layers: a plain backbone's maps,
    resampled to the levels and mixed by a C2f block each (LW-DETR).
    """

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


EncoderConfig = (
    DeformableEncoderConfig
    | SalienceEncoderConfig
    | DenseEncoderConfig
    | IntraScaleEncoderConfig
    | HybridEncoderConfig
    | ProjectorEncoderConfig
)
