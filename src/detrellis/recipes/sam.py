"""SAM-DETR and SAM-DETR++, each also with SMCA, denoising, or both, 12 epochs;
and SMCA-DETR by itself, 50 epochs.

`-o schedule.epochs=50 -o schedule.drops=[0.8]` is the longer schedule of SAM-DETR's table 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from detrellis.recipes.config import LossConfig, OptimConfig, Recipe, Recipes, ScheduleConfig
from detrellis.recipes.dab import with_indicator
from detrellis.recipes.detector import (
    AnchorQueriesConfig,
    DecoderConfig,
    DenseAttentionConfig,
    DetectorConfig,
    SemanticAttentionConfig,
)
from detrellis.recipes.detr import single_scale_detector
from detrellis.recipes.encoders import DeformableEncoderConfig, IntraScaleEncoderConfig
from detrellis.schemes.config import DNConfig, SchemesConfig


def sam_detector(*, dilation: bool = False) -> DetectorConfig:
    """Semantic attention on one map, with 300 learned boxes and no dropout."""
    return single_scale_detector(dilation=dilation).replace(
        queries=AnchorQueriesConfig(content="zero"),
        cross_attention=SemanticAttentionConfig(),
        decoder=DecoderConfig(hidden=2048, refine="detached"),
        dropout=0.0,
        scores="sigmoid",
        position_offset=-0.5,
    )


def sam_plus_detector() -> DetectorConfig:
    """The same on three levels, coarse to fine, behind a deformable encoder."""
    detector = sam_detector()
    return detector.replace(
        backbone=detector.backbone.replace(strides=(8, 16, 32)),
        encoder=DeformableEncoderConfig(levels=3),
    )


# Name: what it is, its detector, images a step.
_BASES: dict[str, tuple[str, Callable[[], DetectorConfig], int]] = {
    "sam-detr-r50": ("SAM-DETR, ResNet-50", sam_detector, 16),
    "sam-detr-r50-dc5": (
        "SAM-DETR, ResNet-50 with a dilated last stage",
        partial(sam_detector, dilation=True),
        8,
    ),
    "sam-detr-plus-r50": ("SAM-DETR++, ResNet-50, 3 scales", sam_plus_detector, 16),
}


def _sam(base: str, *, smca: bool, dn: bool) -> Recipe:
    """A base, with Gaussian priors around the salient points, with denoising, or with both:
    the paper's best.
    """
    about, make, batch = _BASES[base]
    detector = make().replace(cross_attention=SemanticAttentionConfig(smca=smca))
    additions = " and ".join(word for word, added in (("SMCA", smca), ("denoising", dn)) if added)
    return Recipe(
        name=_name(base, smca, dn),
        about=f"{about} with {additions}" if additions else about,
        detector=with_indicator(detector, "shared") if dn else detector,
        loss=LossConfig(classes=2.0),
        schemes=SchemesConfig(dn=DNConfig() if dn else None),
        optim=OptimConfig(lr=1e-4, batch_size=batch),
        schedule=ScheduleConfig(epochs=12, drops=(10 / 12,)),
    )


def _name(base: str, smca: bool, dn: bool) -> str:
    return f"{base}{'-smca' if smca else ''}{'-dn' if dn else ''}"


def _smca(name: str, about: str, detector: DetectorConfig) -> Recipe:
    return Recipe(
        name=name,
        about=about,
        detector=detector,
        loss=LossConfig(classes=2.0),
        optim=OptimConfig(lr=1e-4, batch_size=16),
        schedule=ScheduleConfig(epochs=50, drops=(0.8,)),
    )


def smca_detector() -> DetectorConfig:
    """DETR's network with 300 queries, whose attention a Gaussian prior weighs."""
    detector = single_scale_detector()
    return detector.replace(
        queries=detector.queries.replace(count=300),
        cross_attention=DenseAttentionConfig(smca=True),
        scores="sigmoid",
    )


def smca_detr_r50() -> Recipe:
    """SMCA-DETR on one map."""
    return _smca("smca-detr-r50", "SMCA-DETR, ResNet-50", smca_detector())


def smca_detr_ms_r50() -> Recipe:
    """SMCA-DETR on strides 16 to 64:
    of five encoder layers the middle one alone reads all levels together.
    """
    detector = smca_detector()
    several = detector.replace(
        backbone=detector.backbone.replace(strides=(16, 32)),
        encoder=IntraScaleEncoderConfig(layers=5, levels=3),
        decoder=detector.decoder.replace(hidden=1024),
    )
    return _smca("smca-detr-ms-r50", "SMCA-DETR, ResNet-50, 3 scales", several)


RECIPES: Recipes = {
    **{
        _name(base, smca, dn): partial(_sam, base, smca=smca, dn=dn)
        for base in _BASES
        for dn in (False, True)
        for smca in (False, True)
    },
    "smca-detr-r50": smca_detr_r50,
    "smca-detr-ms-r50": smca_detr_ms_r50,
}
