"""Backbones as a recipe names them;
docs/detectors.md says what each is. Importing this imports no torch.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from detrellis.fields import (
    Ascending,
    Config,
    CountOrNone,
    Few,
    Key,
    Some,
    Strides,
    ZeroToBelowOne,
    within,
)

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")  # torchvision's
PyramidStrides = Annotated[tuple[Literal[4, 8, 16, 32, 64], ...], Ascending, Some]
# RT-DETR's; every other backbone is timm's
VD_RESNETS = ("resnet18vd", "resnet34vd", "resnet50vd", "resnet101vd")


class BackboneConfig(Config):
    """`name`: a torchvision ResNet (`resnet18`, `34`, `50`, `101`),
    one of RT-DETR's (`resnet18vd`, ...), or any timm model with feature maps."""

    pyramid: ClassVar[bool] = False  # whether its one map becomes several in the neck
    kind: Literal["hierarchical"] = "hierarchical"
    name: str = "resnet50"
    pretrained: bool = True
    # Local file of pretrained weights; None: an installed package, or the hub
    weights: Key | None = None
    # auto: frozen with pretrained weights, trained without; frozen freezes a ResNet's stem and
    # first stage too, frozen_norm the norms alone
    norm: Literal["auto", "frozen", "frozen_norm", "batch"] = "auto"
    dilation: bool = False  # DC5
    # Rate of dropped residual branches, for timm models that have it
    drop_path: ZeroToBelowOne = 0.0
    strides: Strides = (8, 16, 32)
    # stages, with the stem (or "stem" alone), that training leaves as they are, BatchNorm's
    # statistics too; 0: what `norm` freezes
    frozen: Annotated[int, within(0, 99)] | Literal["all", "stem"] = 0

    @property
    def normalisation(self) -> Literal["frozen", "frozen_norm", "batch"]:
        """`norm` with "auto" decided."""
        return self.norm if self.norm != "auto" else "frozen" if self.pretrained else "batch"

    def untrained(self) -> BackboneConfig:
        """The same network without pretrained weights."""
        return self.model_copy(
            update={"pretrained": False, "weights": None, "norm": self.normalisation}
        )


class WindowViTConfig(Config):
    """A plain ViT, whose maps have one stride,
    with attention within windows in some blocks (LW-DETR, RF-DETR).
    """

    dilation: ClassVar[bool] = False
    pyramid: ClassVar[bool] = False
    kind: Literal["window_vit"] = "window_vit"
    pretrained: bool = True
    weights: Key | None = None  # local file of pretrained weights; None: those of
    timm: Key | None = None  # timm's model of this name; None: no host has any
    # LW-DETR's; dinov2: with class tokens and a norm of each map (RF-DETR)
    style: Literal["cae", "dinov2"] = "cae"
    width: Annotated[int, within(4, 8192)] = 192
    heads: Few = 12
    patch: Annotated[int, within(1, 256)] = 16
    # Patches along a side of the table of positions, which is resized
    grid: Annotated[int, within(1, 1024)] = 14
    windows: Annotated[int, within(1, 32)] = 4  # along each side of the image
    # Blocks within windows, counted from 0
    windowed: Annotated[tuple[CountOrNone, ...], Ascending] = (0, 2, 4)
    # After how many blocks a map is read off
    taps: Annotated[tuple[Few, ...], Ascending, Some] = (2, 4, 6)
    drop_path: ZeroToBelowOne = 0.0
    # Blocks that are not trained, with the embedding
    frozen: Annotated[int, within(0, 99)] | Literal["all"] = 0

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the maps, in pixels: the patch."""
        return (self.patch,)

    def untrained(self) -> WindowViTConfig:
        """The same network without pretrained weights."""
        return self.model_copy(update={"pretrained": False, "weights": None})


class EvaViTConfig(Config):
    """EVA-02's ViT (its large size by default): attention within windows in most blocks, rotary
    positions, gated feed-forward blocks. Its one map of stride 16 becomes several by the simple
    feature pyramid, in the neck."""

    dilation: ClassVar[bool] = False
    pyramid: ClassVar[bool] = True
    kind: Literal["eva02"] = "eva02"
    pretrained: bool = True
    # Local file of pretrained weights, EVA-02's or timm's; None: those of
    weights: Key | None = None
    # Timm's model of this name; None: no host has any
    timm: Key | None = "eva02_large_patch14_224.mim_m38m"
    width: Annotated[int, within(4, 8192)] = 1024
    depth: Few = 24
    heads: Few = 16
    window: Annotated[int, within(1, 1024)] = 16  # cells along a side
    # Counted from 0
    global_blocks: Annotated[tuple[CountOrNone, ...], Ascending] = (2, 5, 8, 11, 14, 17, 20, 23)
    # Cells along a side of the table of positions, which is resized
    grid: Annotated[int, within(1, 1024)] = 32
    # Cells that rotary positions span; None: those of each image
    extent: Annotated[int, within(1, 1024)] | None = None
    strides: PyramidStrides = (4, 8, 16, 32, 64)
    # Rate of dropped residual branches in the last block; less in those before
    drop_path: ZeroToBelowOne = 0.0
    # Compute blocks again in the backward pass, instead of keeping what they computed
    checkpointing: bool = False
    # Blocks that are not trained, with the embedding
    frozen: Annotated[int, within(0, 100)] | Literal["all"] = 0

    def untrained(self) -> EvaViTConfig:
        """The same network without pretrained weights."""
        return self.model_copy(update={"pretrained": False, "weights": None})


class TimmViTConfig(Config):
    """A plain ViT of timm's (ViT, DeiT, DINOv2, DINOv3, EVA-02) with patches of 16 pixels;
    published ones of another size are resampled. Its one map becomes several by the simple feature
    pyramid, in the neck."""

    dilation: ClassVar[bool] = False
    pyramid: ClassVar[bool] = True
    kind: Literal["timm_vit"] = "timm_vit"
    name: Key = "vit_small_patch14_dinov2.lvd142m"
    pretrained: bool = True
    weights: Key | None = None  # local file of pretrained weights; None: the hub
    strides: PyramidStrides = (8, 16, 32)
    drop_path: ZeroToBelowOne = 0.0
    # Compute blocks again in the backward pass, instead of keeping what they computed
    checkpointing: bool = False
    # Blocks that are not trained, with the embedding
    frozen: Annotated[int, within(0, 100)] | Literal["all"] = 0

    def untrained(self) -> TimmViTConfig:
        """The same network without pretrained weights."""
        return self.model_copy(update={"pretrained": False, "weights": None})


AnyBackboneConfig = BackboneConfig | WindowViTConfig | EvaViTConfig | TimmViTConfig
