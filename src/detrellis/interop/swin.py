"""Swin Transformers: how transformers and detectron2 call what timm's hold,
and which of timm's has which sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detrellis.errors import UserError
from detrellis.interop.links import Pair

# (channels, blocks of each stage, window) of timm's Swins, and the side of the images that each was
# trained on.
SWINS: dict[tuple[int, tuple[int, ...], int], tuple[str, int]] = {
    (96, (2, 2, 6, 2), 7): ("swin_tiny_patch4_window7_224", 224),
    (96, (2, 2, 18, 2), 7): ("swin_small_patch4_window7_224", 224),
    (128, (2, 2, 18, 2), 7): ("swin_base_patch4_window7_224", 224),
    (128, (2, 2, 18, 2), 12): ("swin_base_patch4_window12_384", 384),
    (192, (2, 2, 18, 2), 7): ("swin_large_patch4_window7_224", 224),
    (192, (2, 2, 18, 2), 12): ("swin_large_patch4_window12_384", 384),
}
STAGES = range(4)


def name_of(channels: int, depths: tuple[int, ...], window: int) -> str:
    """timm's name of the Swin of these sizes. `UserError` where it has none."""
    if (channels, depths, window) not in SWINS:
        known = ", ".join(name for name, _ in SWINS.values())
        raise UserError(
            f"a Swin of {channels} channels, {list(depths)} blocks and windows of {window} is "
            "not supported",
            f"Detrellis reads {known}.",
        )
    return SWINS[channels, depths, window][0]


def config_of(name: str) -> dict[str, Any]:
    """transformers' `backbone_config` of timm's Swin `name`. `UserError` for another backbone."""
    plain = name.split(".")[0]
    for (channels, depths, window), (known, side) in SWINS.items():
        if known == plain:
            return {
                "model_type": "swin",
                "embed_dim": channels,
                "depths": list(depths),
                "num_heads": [channels // 32 * 2**i for i in STAGES],
                "window_size": window,
                "image_size": side,
                "drop_path_rate": 0.0,
                "out_features": [f"stage{i + 1}" for i in STAGES],
            }
    raise UserError(
        f"backbone {name} cannot be saved for transformers",
        "It takes ResNets and Swin Transformers.",
    )


def checked(config: Mapping[str, Any]) -> str:
    """timm's name for a `backbone_config` of transformers."""
    usual: dict[str, Any] = {
        "patch_size": 4,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "use_absolute_embeddings": False,
    }
    usual |= {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_channels": 3}
    for field, value in usual.items():
        if config.get(field, value) != value:
            raise UserError(
                f"config.json: backbone_config.{field}={config[field]!r} is not supported",
                f"Detrellis has {value!r}.",
            )
    depths = tuple(config.get("depths", (2, 2, 6, 2)))
    return name_of(config.get("embed_dim", 96), depths, config.get("window_size", 7))


def huggingface(prefix: str) -> list[Pair]:
    """transformers' `SwinBackbone` as every version of it stores it."""
    rows = [
        Pair("backbone.model.patch_embed.proj", f"{prefix}.embeddings.patch_embeddings.projection"),
        Pair("backbone.model.patch_embed.norm", f"{prefix}.embeddings.norm"),
    ]
    for i in STAGES:
        ours = f"backbone.model.layers_{i}.blocks.*"
        theirs = f"{prefix}.encoder.layers.{i}.blocks.*"
        table = "relative_position_bias_table"
        rows += [
            Pair(f"{ours}.norm1", f"{theirs}.layernorm_before"),
            Pair(f"{ours}.attn.{table}", f"{theirs}.attention.self.{table}"),
            Pair(f"{ours}.attn.qkv", f"{theirs}.attention.self.{{query,key,value}}"),
            Pair(f"{ours}.attn.proj", f"{theirs}.attention.output.dense"),
            Pair(f"{ours}.norm2", f"{theirs}.layernorm_after"),
            Pair(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense"),
            Pair(f"{ours}.mlp.fc2", f"{theirs}.output.dense"),
            Pair(
                f"backbone.model.layers_{i + 1}.downsample.@",
                f"{prefix}.encoder.layers.{i}.downsample.@",
            ),
            Pair(f"backbone.norms.{i}", f"{prefix}.hidden_states_norms.stage{i + 1}"),
        ]
    return rows


def detectron2(prefix: str) -> list[Pair]:
    """Swin's own names, which Mask2Former keeps."""
    rows = [Pair("backbone.model.patch_embed.@", f"{prefix}.patch_embed.@")]
    for i in STAGES:
        rows += [
            Pair(f"backbone.model.layers_{i}.blocks.@", f"{prefix}.layers.{i}.blocks.@"),
            Pair(
                f"backbone.model.layers_{i + 1}.downsample.@", f"{prefix}.layers.{i}.downsample.@"
            ),
            Pair(f"backbone.norms.{i}", f"{prefix}.norm{i}"),
        ]
    return rows
