"""timm's plain ViTs as backbones with one map of stride 16: ViT, DeiT, DINOv2, DINOv3, EVA-02."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from detrellis.errors import UserError
from detrellis.nn.backbone import Backbone, Frozen, fetched, fill_by_name, first_stages
from detrellis.nn.pretrained import Source, check_timm_name

PATCH = 16


class TimmViT(Backbone):
    """A plain ViT by timm's name, without its classifier, for images with any sides.

    Images are padded to whole patches with zeros; learned positions are interpolated to each map,
    rotary ones computed for it. Patches have 16 pixels: kernels of another size are resampled
    (FlexiViT, Beyer et al., 2023), which keeps the table of positions. `drop_path`: rate of dropped
    residual branches. `checkpointing`: the backward pass computes each block again, which saves its
    activations. `frozen`: blocks that are not trained, with the embedding.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: Source | None,
        drop_path: float = 0.0,
        checkpointing: bool = False,
        frozen: Frozen = 0,
    ) -> None:
        super().__init__()
        check_timm_name(name)
        options: dict[str, Any] = {
            "patch_size": PATCH,
            "img_size": _image_size(name),
            "drop_path_rate": drop_path,
        }
        options |= {"num_classes": 0, "global_pool": "", "dynamic_img_size": True}
        model: Any
        if pretrained is not None and pretrained.fetched:
            model = fetched(name, pretrained, timm.create_model, **options)
        else:
            model = timm.create_model(name, pretrained=False, **options)
            if pretrained is not None:
                _fill(model, pretrained, name)
        model.set_grad_checkpointing(checkpointing)
        self.model = model
        self.channels = [int(model.embed_dim)]
        if frozen == "all":
            self._freeze([self])
        elif frozen:
            blocks = first_stages(list(model.blocks), frozen, name)
            alone = list(model.parameters(recurse=False))  # of class tokens and positions
            self._freeze([model.patch_embed, *blocks], alone)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """The one map `(B, C, h, w)` of `pixels (B, 3, H, W)`, after the last norm."""
        height, width = pixels.shape[-2:]
        pixels = F.pad(pixels, (0, -width % PATCH, 0, -height % PATCH))
        maps: list[Tensor] = self.model.forward_intermediates(
            pixels, indices=1, norm=True, intermediates_only=True
        )
        return maps


def _image_size(name: str) -> int:
    """Sides of the image that has as many patches of ours as the published model has of its own."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    if not isinstance(model, vision_transformer.VisionTransformer | eva.Eva):
        raise UserError(
            f"detector.backbone.name={name}: it is no plain ViT",
            "For its feature maps: -o detector.backbone.kind=hierarchical; a plain ViT is, for "
            "example, vit_small_patch14_dinov2.lvd142m.",
        )
    return PATCH * int(model.patch_embed.grid_size[0])


def _fill(model: nn.Module, source: Source, name: str) -> None:
    """Load the source's file, in timm's names or those of the model's authors.
    `UserError` for a misfit.
    """
    convert = (eva if isinstance(model, eva.Eva) else vision_transformer).checkpoint_filter_fn
    weights, network = source.read(), f"backbone {name}"
    remedy = (
        "Name weights of this backbone, or the backbone of these weights: -o "
        "detector.backbone.name=NAME."
    )
    try:
        converted = convert(weights, model)
    except (KeyError, AttributeError, RuntimeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{source.about}: its weights do not fit {network}: {what}", remedy
        ) from error
    fill_by_name(model, converted, source, network, remedy)
