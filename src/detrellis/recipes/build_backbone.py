"""From a backbone's config to its module, and to the pretrained weights that it starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detrellis.errors import UserError
from detrellis.nn.backbone import Norm, ResNet, TimmBackbone
from detrellis.nn.eva import EvaViT
from detrellis.nn.pretrained import IMAGENET, Source, find_source, timm_statistics
from detrellis.nn.resnet_vd import ResNetVD, timm_name
from detrellis.nn.window_vit import WindowViT
from detrellis.recipes.backbones import (
    RESNETS,
    VD_RESNETS,
    AnyBackboneConfig,
    EvaViTConfig,
    TimmViTConfig,
    WindowViTConfig,
)
from detrellis.recipes.config import Recipe
from detrellis.types import Channels

if TYPE_CHECKING:
    from detrellis.nn.timm_vit import TimmViT


def pretrained_source(config: AnyBackboneConfig) -> Source | None:
    """Where the backbone's pretrained weights come from;
    None where it starts from scratch. `UserError` where there are none to be had."""
    if not config.pretrained:
        return None
    name = _published(config)
    return find_source(name, config.weights, resnet=name in RESNETS)


def _published(config: AnyBackboneConfig) -> str | None:
    """The name that pretrained weights of a backbone are published under,
    by torchvision or timm; None: nowhere.
    """
    if isinstance(config, WindowViTConfig | EvaViTConfig):
        return config.timm
    return timm_name(config.name) if config.name in VD_RESNETS else config.name


def starting_from(
    recipe: Recipe, trained: tuple[Channels, Channels] | None = None
) -> tuple[Recipe, str | None]:
    """The recipe as a fresh run of it is stored, with `data.mean` and `data.std`, and where the
    pretrained weights of its backbone come from, in words.

    What the recipe leaves open is the backbone's own, or the mean and std of the `trained` weights
    that the run starts from instead. `UserError` where pretrained weights are wanted and cannot be
    had.
    """
    config = recipe.detector.backbone
    if trained is not None:
        return recipe.with_statistics(*trained), None
    source = pretrained_source(config)
    if source is not None:
        return recipe.with_statistics(source.mean, source.std), source.about
    name = _published(config)
    return recipe.with_statistics(
        *(IMAGENET if name is None or name in RESNETS else timm_statistics(name))
    ), None


def build_backbone(
    config: AnyBackboneConfig,
) -> ResNet | ResNetVD | TimmBackbone | WindowViT | EvaViT | TimmViT:
    """The backbone, with pretrained weights where the recipe asks for them."""
    if isinstance(config, WindowViTConfig):
        return _window_vit(config)
    if isinstance(config, EvaViTConfig):
        return _eva_vit(config)
    if isinstance(config, TimmViTConfig):
        return _timm_vit(config)
    norm: Norm = config.normalisation
    resnet = config.name in RESNETS
    if config.dilation and not resnet:
        raise UserError(
            f"backbone {config.name}: dilation (DC5) exists for {', '.join(RESNETS)} only"
        )
    if config.drop_path and (resnet or config.name in VD_RESNETS):
        raise UserError(
            f"backbone {config.name}: it has no drop path",
            "Leave detector.backbone.drop_path at 0.",
        )
    shared: dict[str, Any] = {
        "pretrained": pretrained_source(config),
        "norm": norm,
        "frozen": config.frozen,
    }
    try:
        if resnet:
            return ResNet(config.name, config.strides, dilation=config.dilation, **shared)
        if config.name in VD_RESNETS:
            return ResNetVD(config.name, config.strides, **shared)
        return TimmBackbone(config.name, config.strides, drop_path=config.drop_path, **shared)
    except TypeError:
        if not config.drop_path:
            raise
        raise UserError(
            f"backbone {config.name} has no drop path", "Leave detector.backbone.drop_path at 0."
        ) from None
    except NotImplementedError:
        raise UserError(
            f"backbone {config.name} cannot be dilated", "DC5 needs resnet50 or resnet101."
        ) from None


def _eva_vit(config: EvaViTConfig) -> EvaViT:
    model: EvaViT = EvaViT(
        **config.model_dump(exclude={"kind", "timm", "pretrained", "weights", "strides"})
    )
    source = pretrained_source(config)
    if source is not None:
        model.start_from(source, config.timm)
    return model


def _timm_vit(config: TimmViTConfig) -> TimmViT:
    from detrellis.nn.timm_vit import TimmViT  # only here: timm's import takes a second

    options = config.model_dump(include={"drop_path", "checkpointing", "frozen"})
    return TimmViT(config.name, pretrained=pretrained_source(config), **options)


def _window_vit(config: WindowViTConfig) -> WindowViT:
    parts = config.model_dump(exclude={"kind", "timm", "pretrained", "weights", "style"})
    model: WindowViT = WindowViT(**parts, dinov2=config.style == "dinov2")
    source = pretrained_source(config)
    if source is not None:
        model.start_from(source, config.timm)
    return model
