"""Co-DETR: auxiliary heads on Deformable DETR++, DINO, Conditional DETR and DAB-DETR."""

from __future__ import annotations

from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.conditional import conditional_detr_r50
from detrellis.recipes.config import LossConfig, Recipe, Recipes, ScheduleConfig
from detrellis.recipes.dab import dab_detr_r50
from detrellis.recipes.data import DataConfig
from detrellis.recipes.deformable import SWIN_L, deformable_detr_r50_two_stage_plus
from detrellis.recipes.dino import dino_detector, dino_r50
from detrellis.schemes.config import BranchName, CoConfig

GREY = 114  # of the padding that Co-DETR's networks see as a part of the picture


def _collaborative(
    base: Recipe, name: str, about: str, branches: tuple[BranchName, ...], epochs: int
) -> Recipe:
    """The base with these branches;
    the learning rate falls before the last twelfth or sixth, as released.
    """
    drops = (11 / 12,) if epochs == 12 else (30 / 36,)
    return base.model_copy(
        update={
            "name": name,
            "about": f"{about}, branches {' and '.join(branches)}",
            "schemes": base.schemes.model_copy(update={"co": CoConfig(branches=branches)}),
            "schedule": ScheduleConfig(epochs=epochs, drops=drops),
        }
    )


def co_deformable_detr_r50() -> Recipe:
    """On Deformable DETR++, K=2, 12 epochs; free of NMS."""
    base = deformable_detr_r50_two_stage_plus()
    return _collaborative(
        base, "co-deformable-detr-r50", "Co-Deformable-DETR, ResNet-50", ("rcnn", "atss"), 12
    )


def co_deformable_detr_r50_k1() -> Recipe:
    """On Deformable DETR++, K=1: ATSS alone."""
    base = deformable_detr_r50_two_stage_plus()
    return _collaborative(
        base, "co-deformable-detr-r50-k1", "Co-Deformable-DETR, ResNet-50", ("atss",), 12
    )


def _co_dino(name: str, about: str) -> Recipe:
    """DINO with 5 scales, quality focal loss and soft-NMS, as released."""
    base = dino_r50()
    detector = dino_detector(strides=(4, 8, 16, 32), levels=5)
    # The released code has heads for each layer, in contrast to DINO's.
    detector = detector.replace(decoder=detector.decoder.replace(shared_heads=False), soft_nms=0.8)
    base = base.model_copy(
        update={
            "detector": detector,
            "loss": LossConfig(classification="qfl", classes=1.0),
            "optim": base.optim.model_copy(update={"lr": 2e-4}),
        }
    )
    return _collaborative(base, name, about, ("rcnn", "atss"), 12)


def co_dino_r50() -> Recipe:
    """On DINO with 5 scales, K=2, 12 epochs."""
    return _co_dino("co-dino-r50", "Co-DINO, ResNet-50, 5 scales")


def co_dino_r50_9enc() -> Recipe:
    """With 9 encoder layers."""
    recipe = _co_dino("co-dino-r50-9enc", "Co-DINO, ResNet-50, 5 scales, 9 encoder layers")
    detector = recipe.detector
    return recipe.replace(detector=detector.replace(encoder=detector.encoder.replace(layers=9)))


def co_dino_swin_l() -> Recipe:
    """With a Swin-L pretrained on ImageNet-22K."""
    recipe = _co_dino("co-dino-swin-l", "Co-DINO, Swin-L, 5 scales")
    backbone = BackboneConfig(name=SWIN_L, drop_path=0.3, strides=(4, 8, 16, 32))
    return recipe.replace(detector=recipe.detector.replace(backbone=backbone))


def large_scale(
    recipe: Recipe, name: str, about: str, *, side: int, epochs: int, drops: tuple[float, ...]
) -> Recipe:
    """The recipe "++": large-scale jitter and copy-paste on squares,
    whose padding is a part of the picture.
    """
    data = DataConfig(size=(side, side), augment="lsj", copy_paste=1.0, pad=GREY)
    schedule = ScheduleConfig(epochs=epochs, drops=drops)
    return recipe.model_copy(
        update={"name": name, "about": about, "data": data, "schedule": schedule}
    )


def co_dino_r50_lsj() -> Recipe:
    """With large-scale jitter at 1024 pixels and copy-paste, 12 epochs."""
    about = "Co-DINO, ResNet-50, 5 scales, large-scale jitter and copy-paste (needs masks)"
    return large_scale(
        co_dino_r50(), "co-dino-r50-lsj", about, side=1024, epochs=12, drops=(11 / 12,)
    )


def co_dino_r50_lsj_36e() -> Recipe:
    """The same, 36 epochs."""
    about = (
        "Co-DINO, ResNet-50, 5 scales, large-scale jitter and copy-paste (needs masks), 36 epochs"
    )
    return large_scale(
        co_dino_r50(), "co-dino-r50-lsj-36e", about, side=1024, epochs=36, drops=(30 / 36,)
    )


def co_dino_swin_l_lsj() -> Recipe:
    """Swin-L with large-scale jitter at 1280 pixels and copy-paste, 36 epochs."""
    about = "Co-DINO, Swin-L, 5 scales, large-scale jitter and copy-paste (needs masks)"
    return large_scale(
        co_dino_swin_l(), "co-dino-swin-l-lsj", about, side=1280, epochs=36, drops=(30 / 36,)
    )


def co_conditional_detr_r50() -> Recipe:
    """On Conditional DETR, whose one level a pyramid spreads to five, 36 epochs."""
    base = conditional_detr_r50()
    return _collaborative(
        base, "co-conditional-detr-r50", "Co-DETR on Conditional DETR", ("rcnn", "atss"), 36
    )


def co_dab_detr_r50() -> Recipe:
    """On DAB-DETR, 36 epochs."""
    return _collaborative(
        dab_detr_r50(), "co-dab-detr-r50", "Co-DETR on DAB-DETR", ("rcnn", "atss"), 36
    )


RECIPES: Recipes = {
    "co-deformable-detr-r50": co_deformable_detr_r50,
    "co-deformable-detr-r50-k1": co_deformable_detr_r50_k1,
    "co-dino-r50": co_dino_r50,
    "co-dino-r50-9enc": co_dino_r50_9enc,
    "co-dino-swin-l": co_dino_swin_l,
    "co-dino-r50-lsj": co_dino_r50_lsj,
    "co-dino-r50-lsj-36e": co_dino_r50_lsj_36e,
    "co-dino-swin-l-lsj": co_dino_swin_l_lsj,
    "co-conditional-detr-r50": co_conditional_detr_r50,
    "co-dab-detr-r50": co_dab_detr_r50,
}
