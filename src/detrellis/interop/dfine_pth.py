"""D-FINE's own checkpoints: which network a state dict holds, and its names."""

from __future__ import annotations

from typing import Any

from detrellis.errors import UserError
from detrellis.interop.dfine import hgnets
from detrellis.interop.dfine_names import LEAVES
from detrellis.interop.family import Config, Loaded, Repository, Weights
from detrellis.interop.links import Pair
from detrellis.interop.rtdetr import csp, normed
from detrellis.interop.rtdetr_pth import class_count, count, points, shared_table
from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.config import Recipe
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.dfine import dfine_l
from detrellis.recipes.overrides import merged

MARKER = "decoder.pre_bbox_head.layers.0.weight"


def recipe_of(weights: Weights, arguments: Config) -> Recipe:
    """D-FINE's recipe with the sizes of a state dict;
    heads are 8 and queries 300 in all published files.
    """
    recipe = dfine_l()
    detector = DetectorConfig.checked(merged(recipe.detector.model_dump(), _sizes(weights)))
    return recipe.model_copy(update={"name": "dfine", "detector": detector})


def _sizes(weights: Weights) -> dict[str, Any]:
    """The detector's fields that shapes decide."""
    layer, attention = "encoder.encoder.0.layers", "decoder.decoder.layers.0.cross_attn"
    levels = count(weights, "encoder.input_proj")
    inner = weights["encoder.input_proj.0.conv.weight"].shape[0]
    csp = "encoder.fpn_blocks.0.cv2.0"
    return {
        "backbone": _backbone(weights, levels).model_dump(),
        "width": weights["decoder.enc_output.proj.weight"].shape[0],
        "encoder": {
            "layers": count(weights, layer),
            "hidden": weights[f"{layer}.0.linear1.weight"].shape[0],
            "levels": levels,
            "inner": inner,
            "blocks": count(weights, f"{csp}.bottlenecks"),
            "expansion": 2 * weights[f"{csp}.conv1.conv.weight"].shape[0] / inner,
        },
        "cross_attention": {"points": points(weights[f"{attention}.num_points_scale"], levels)},
        "decoder": {
            "layers": count(weights, "decoder.decoder.layers"),
            "hidden": weights["decoder.decoder.layers.0.linear1.weight"].shape[0],
            "distributions": {
                "bins": weights["decoder.dec_bbox_head.0.layers.2.weight"].shape[0] // 4 - 1,
                "scale": abs(float(weights["decoder.reg_scale"])),
                "reach": abs(float(weights["decoder.up"])),
            },
        },
    }


def _backbone(weights: Weights, levels: int) -> BackboneConfig:
    """timm's name of a HGNetV2 of those shapes."""
    stem = [weights[f"backbone.stem.{part}.conv.weight"].shape[0] for part in ("stem1", "stem4")]
    stages = []
    for stage in range(4):
        blocks = f"backbone.stages.{stage}.blocks"
        channels = weights[f"{blocks}.0.aggregation.1.conv.weight"].shape[0]
        stages.append((channels, count(weights, blocks), count(weights, f"{blocks}.0.layers")))
    shapes = (2, 3, 7)  # of a stage in timm's rows: channels, blocks, layers of a block
    known = {
        (
            *row["stem_chs"],
            *(tuple(row[f"stage{i}"][k] for k in shapes) for i in range(1, 5)),
        ): name
        for name, row in hgnets().items()
    }
    name = known.get((*stem, *stages))
    if name is None:
        raise UserError(
            f"the backbone has a stem of {stem} and stages of {stages}: only HGNetV2s are supported"
        )
    # As in the two larger ones
    frozen = "backbone.stem.stem1.bn.num_batches_tracked" not in weights
    strides = (8, 16, 32)[-levels:]
    if frozen:
        return BackboneConfig(
            name=name, pretrained=False, norm="frozen", frozen="stem", strides=strides
        )
    return BackboneConfig(name=name, pretrained=False, norm="batch", strides=strides)


def table(config: DetectorConfig) -> list[Pair]:
    """The authors' names."""
    layer = "decoder.decoder.layers.*"
    rows = [
        *_hgnet(),
        *shared_table(config),
        Pair("decoder.layers.*.gateway.gate", f"{layer}.gateway.gate"),
        Pair("decoder.layers.*.gateway.norm", f"{layer}.gateway.norm"),
        Pair("decoder.heads.initial_box.@", "decoder.pre_bbox_head.@"),
        *(
            Pair(
                f"decoder.heads.qualities.*.mlp.layers.{k}",
                f"decoder.decoder.lqe_layers.*.reg_conf.layers.{k}",
            )
            for k in range(2)
        ),
    ]
    for i in range(len(config.backbone.strides) - 1):
        for part in (0, 1):
            rows += normed(f"neck.downs.{i}.{part}", f"encoder.downsample_convs.{i}.0.cv{part + 1}")
        rows += _fusion(f"neck.top_down.{i}", f"encoder.fpn_blocks.{i}")
        rows += _fusion(f"neck.bottom_up.{i}", f"encoder.pan_blocks.{i}")
    return rows


def _fusion(ours: str, theirs: str) -> list[Pair]:
    rows = [*normed(f"{ours}.first", f"{theirs}.cv1"), *normed(f"{ours}.last", f"{theirs}.cv4")]
    for step in (0, 1):
        our_step, their_step = f"{ours}.steps.{step}", f"{theirs}.cv{step + 2}"
        rows += [
            *normed(f"{our_step}.1", f"{their_step}.1"),
            *csp(f"{our_step}.0", f"{their_step}.0"),
        ]
    return rows


def _hgnet() -> list[Pair]:
    """timm's names, but for the stages'."""
    places = {f"backbone.model.stages_{stage}": f"backbone.stages.{stage}" for stage in range(4)}
    places["backbone.model.stem"] = "backbone.stem"
    return [
        Pair(f"{ours}.@.{part}.{leaf}", f"{theirs}.@.{part}.{leaf}")
        for ours, theirs in places.items()
        for part, leaves in LEAVES.items()
        for leaf in leaves
    ]


REPOSITORY = Repository(
    "D-FINE",
    lambda weights: MARKER in weights,
    recipe_of,
    class_count,
    lambda weights, detector: Loaded(dict(weights), table(detector)),
)
