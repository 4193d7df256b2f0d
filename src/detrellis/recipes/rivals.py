"""Detectors that the four papers are compared with,
each a base with a scheme, and some with a network part.
"""

from __future__ import annotations

from typing import Any

from detrellis.recipes.align import h_deformable_detr_r50
from detrellis.recipes.config import Recipe, Recipes, ScheduleConfig
from detrellis.recipes.dab import dab_detr_r50
from detrellis.recipes.deformable import deformable_detr_r50_two_stage_plus
from detrellis.recipes.detector import ConditionalAttentionConfig
from detrellis.recipes.dino import dino_r50
from detrellis.recipes.encoders import SalienceEncoderConfig
from detrellis.schemes.config import (
    CDNConfig,
    DACConfig,
    HybridConfig,
    MSConfig,
    RankConfig,
    SchemesConfig,
    SQRConfig,
)


def _deformable(name: str, about: str, schemes: SchemesConfig, **parts: Any) -> Recipe:
    """Deformable DETR++ with 900 queries, 12 epochs.
    `parts`: what changes of its queries and its decoder.
    """
    base = deformable_detr_r50_two_stage_plus()
    queries = base.detector.queries.replace(count=900, **parts.get("queries", {}))
    decoder = base.detector.decoder.replace(**parts.get("decoder", {}))
    return base.model_copy(
        update={
            "name": name,
            "about": about,
            "detector": base.detector.replace(queries=queries, decoder=decoder, top_k=300),
            "loss": base.loss.replace(classes=1.0),
            "schemes": schemes,
            "schedule": ScheduleConfig(epochs=12, drops=(11 / 12,)),
        }
    )


def ms_deformable_detr_r50() -> Recipe:
    """MS-DETR. Its authors report AP 50.0."""
    about = "MS-DETR: Deformable DETR++ with mixed supervision, ResNet-50"
    return _deformable(
        "ms-deformable-detr-r50", about, SchemesConfig(ms=MSConfig()), decoder={"cross_first": True}
    )


def dac_deformable_detr_r50() -> Recipe:
    """DAC-DETR with contrastive denoising. Its authors report AP 50.0."""
    schemes = SchemesConfig(cdn=CDNConfig(), dac=DACConfig())
    about = "DAC-DETR on Deformable DETR++, ResNet-50"
    return _deformable("dac-deformable-detr-r50", about, schemes, queries={"position": "boxes"})


def relation_dino_r50() -> Recipe:
    """Relation-DETR with its branch of further queries. Its authors report AP 51.7."""
    base = dino_r50()
    detector = base.detector.replace(
        cross_attention=base.detector.cross_attention.replace(position_scale=True),
        decoder=base.detector.decoder.replace(relation=True, shared_heads=False),
        position_temperature=10000.0,
        position_offset=-0.5,
    )
    return base.model_copy(
        update={
            "name": "relation-dino-r50",
            "about": "Relation-DETR: DINO with position relation, ResNet-50",
            "detector": detector,
            "loss": base.loss.replace(classification="vfl_detached"),
            "schemes": base.schemes.model_copy(update={"hybrid": HybridConfig(queries=1500)}),
        }
    )


def rank_h_deformable_detr_r50() -> Recipe:
    """Rank-DETR on H-DETR. Its authors report AP 50.2."""
    base = h_deformable_detr_r50()
    return base.model_copy(
        update={
            "name": "rank-h-deformable-detr-r50",
            "about": "Rank-DETR on H-DETR, ResNet-50",
            "detector": base.detector.replace(decoder=base.detector.decoder.replace(ranked=True)),
            "schemes": base.schemes.model_copy(update={"rank": RankConfig()}),
        }
    )


def sqr_dab_detr_r50() -> Recipe:
    """SQR on DAB-DETR, 50 epochs. Its authors report AP 44.4."""
    base, about = dab_detr_r50(), "SQR on DAB-DETR, ResNet-50"
    return base.model_copy(
        update={
            "name": "sqr-dab-detr-r50",
            "about": about,
            "schemes": SchemesConfig(sqr=SQRConfig()),
        }
    )


def cascade_dino_r50() -> Recipe:
    """Cascade-DETR on DINO, whose queries read the cells in their boxes,
    and learn how well those fit.
    """
    base = dino_r50()
    attention = ConditionalAttentionConfig(within_boxes=True)
    return base.model_copy(
        update={
            "name": "cascade-dino-r50",
            "about": "Cascade-DETR on DINO, ResNet-50",
            "detector": base.detector.replace(cross_attention=attention, iou_branch="product"),
            "loss": base.loss.replace(iou_branch=2.0, iou_error="l2"),
        }
    )


def _salient(name: str, about: str, encoder: dict[str, Any], **queries: Any) -> Recipe:
    """DINO whose encoder refines the tokens that matter, with heads of their own for each layer."""
    base = dino_r50()
    network = base.detector
    detector = network.replace(
        encoder=SalienceEncoderConfig(hidden=2048, **encoder),
        queries=network.queries.replace(**queries),
        decoder=network.decoder.replace(shared_heads=False),
    )
    return base.replace(name=name, about=about, detector=detector)


def salience_detr_r50() -> Recipe:
    """Salience-DETR. Its authors report AP 50.0."""
    queries = {"distinct": 0.3, "distinct_by": "cells"}
    recipe = _salient("salience-detr-r50", "Salience-DETR, ResNet-50", {}, **queries)
    return recipe.replace(
        detector=recipe.detector.replace(position_temperature=10000.0, position_offset=-0.5)
    )


def focus_detr_r50() -> Recipe:
    """Focus-DETR, 36 epochs. Its authors report AP 50.4."""
    encoder = {"level_ratios": 0.5, "targets": "objects", "background": False}
    recipe = _salient("focus-detr-r50", "Focus-DETR, ResNet-50", encoder)
    return recipe.replace(schedule=ScheduleConfig(epochs=36, drops=(30 / 36,)))


RECIPES: Recipes = {
    "ms-deformable-detr-r50": ms_deformable_detr_r50,
    "dac-deformable-detr-r50": dac_deformable_detr_r50,
    "relation-dino-r50": relation_dino_r50,
    "rank-h-deformable-detr-r50": rank_h_deformable_detr_r50,
    "sqr-dab-detr-r50": sqr_dab_detr_r50,
    "cascade-dino-r50": cascade_dino_r50,
    "salience-detr-r50": salience_detr_r50,
    "focus-detr-r50": focus_detr_r50,
}
