"""Mask DINO (Li et al., CVPR 2023):
boxes and masks by one DINO, whose queries begin with boxes around masks.

| deviation from the released code | why |
| --- | --- |
| proposals have heads of their own; those of the layers there | as all two-stage detectors here |
| class and mask heads read queries that are normalised once | twice there, by the same norm: `decoder.double_norm` |
| the smallest proposals are the finest level's | the coarsest's there: `queries.smallest_on` |
| class heads start at probability 0.01, and tokens that propose nothing are ranked last | as in DINO here |
| boxes are relative to the image, and no token of padding is read | to the padded square there |
| a batch whose fullest image has more than 100 objects is denoised in one group | in none there |
"""

from __future__ import annotations

from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.config import LossConfig, OptimConfig, Recipe, Recipes, ScheduleConfig
from detrellis.recipes.data import DataConfig
from detrellis.recipes.detector import (
    DecoderConfig,
    DetectorConfig,
    MasksConfig,
    MixedQueriesConfig,
)
from detrellis.recipes.encoders import DeformableEncoderConfig
from detrellis.recipes.mask2former import DROPS
from detrellis.schemes.config import DNConfig, SchemesConfig


def maskdino_detector(backbone: BackboneConfig) -> DetectorConfig:
    """Mask DINO's network on a backbone."""
    return DetectorConfig(
        backbone=backbone,
        encoder=DeformableEncoderConfig(hidden=2048),
        queries=MixedQueriesConfig(
            content_from="states",
            position="boxes",
            proposal_targets="classes",
            boxes_from_masks="bitmask",
        ),
        decoder=DecoderConfig(
            layers=9,
            hidden=2048,
            refine="look_forward_twice",
            final_norm=True,
            shared_heads=True,
            initial_output=True,
        ),
        masks=MasksConfig(),
        dropout=0.0,
        position_offset=0.0,
    )


def mask_dino_r50() -> Recipe:
    """ResNet-50, 50 epochs."""
    return Recipe(
        name="mask-dino-r50",
        about="Mask DINO, ResNet-50, 4 scales, 50 epochs",
        detector=maskdino_detector(BackboneConfig(norm="frozen_norm")),
        loss=LossConfig(classes=4.0, cost_classes=4.0),
        schemes=SchemesConfig(dn=DNConfig(total=100, indicator=False, padded_background=True)),
        optim=OptimConfig(
            lr=1e-4,
            weight_decay=0.05,
            scaled={"backbone": 0.1},
            decay_norms=False,
            undecayed=("label_embed", "queries.content", "relative_position_bias_table"),
            clip=0.01,
        ),
        schedule=ScheduleConfig(drops=DROPS),
        # Large-scale jitter, as Mask2Former's.
        data=DataConfig(size=(1024, 1024), augment="fixed", jitter=0.0, zoom=(0.1, 2.0)),
    )


RECIPES: Recipes = {"mask-dino-r50": mask_dino_r50}
