"""Co-DINO on LVIS (Co-DETR, Table 6): large-scale jitter, copy-paste, and the federated loss."""

from __future__ import annotations

from detrellis.recipes.co import co_dino_r50, co_dino_swin_l, large_scale
from detrellis.recipes.config import Recipe, Recipes
from detrellis.schemes.config import CDNConfig, FederatedConfig


def federated(recipe: Recipe) -> Recipe:
    """The recipe with the federated loss."""
    return recipe.replace(schemes=recipe.schemes.replace(federated=FederatedConfig()))


def co_dino_r50_lvis() -> Recipe:
    """ResNet-50 at 1024 pixels, 12 epochs."""
    about = "Co-DINO for LVIS, ResNet-50, large-scale jitter and copy-paste (needs masks)"
    return federated(
        large_scale(
            co_dino_r50(), "co-dino-r50-lvis", about, side=1024, epochs=12, drops=(11 / 12,)
        )
    )


def co_dino_swin_l_lvis() -> Recipe:
    """Swin-L, pretrained on ImageNet-22K, at 1280 pixels, 36 epochs."""
    about = "Co-DINO for LVIS, Swin-L, large-scale jitter and copy-paste (needs masks)"
    base = large_scale(
        co_dino_swin_l(), "co-dino-swin-l-lvis", about, side=1280, epochs=36, drops=(30 / 36,)
    )
    return federated(base)


def co_dino_swin_l_lvis_finetune() -> Recipe:
    """Swin-L that was trained on Objects365 (`--weights`),
    at 1536 pixels, 16 epochs, 1000 detections.
    """
    about = (
        "Co-DINO for LVIS from Objects365 weights, Swin-L, large-scale jitter and copy-paste "
        "(needs masks)"
    )
    base = large_scale(
        co_dino_swin_l(), "co-dino-swin-l-lvis-finetune", about, side=1536, epochs=16, drops=(0.5,)
    )
    base = base.replace(
        detector=base.detector.replace(top_k=1000),
        optim=base.optim.replace(lr=1e-4, weight_decay=1e-4),
        schemes=base.schemes.replace(cdn=CDNConfig(number=500, box_noise=0.4)),
    )
    return federated(base)


RECIPES: Recipes = {
    "co-dino-r50-lvis": co_dino_r50_lvis,
    "co-dino-swin-l-lvis": co_dino_swin_l_lvis,
    "co-dino-swin-l-lvis-finetune": co_dino_swin_l_lvis_finetune,
}
