"""Co-DETR's large systems (Tables 5 and 6):
Co-DINO on EVA-02's ViT-L or a Swin-L, from Objects365 to COCO and LVIS.
"""

from __future__ import annotations

from typing import Any

from detrellis.recipes.backbones import EvaViTConfig
from detrellis.recipes.co import co_dino_r50, co_dino_swin_l, large_scale
from detrellis.recipes.config import OptimConfig, Recipe, Recipes, ScheduleConfig
from detrellis.recipes.data import DataConfig
from detrellis.recipes.lvis import federated
from detrellis.schemes.config import CDNConfig

# Of all released detectors on EVA-02, which itself was trained with others.
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
WIDE = EvaViTConfig(
    window=24, global_blocks=(3, 7, 11, 15, 19, 23), drop_path=0.4, checkpointing=True
)
# Its rotary positions are of squares of one size
SQUARE = EvaViTConfig(drop_path=0.3, checkpointing=True)
# Layer by layer lower rates towards the pixels; what has one dimension does not decay.
BY_LAYER = OptimConfig(
    lr=5e-5,
    weight_decay=0.01,
    scaled={},
    layer_decay=0.8,
    decay_norms=False,
    undecayed=("bias",),
    batch_size=64,
    checkpointing=True,
)


def _co_dino(
    name: str, about: str, backbone: EvaViTConfig, *, queries: int, noise: int, optim: OptimConfig
) -> Recipe:
    """Co-DINO with 5 scales on this ViT, with so many queries, and so many of denoising;
    1000 detections.
    """
    base = co_dino_r50()
    detector = base.detector.replace(
        backbone=backbone,
        queries=base.detector.queries.replace(count=queries),
        top_k=1000,
    )
    schemes = base.schemes.replace(cdn=CDNConfig(number=noise, box_noise=0.4))
    return base.replace(name=name, about=about, detector=detector, schemes=schemes, optim=optim)


def _squares(recipe: Recipe, side: int) -> Recipe:
    """Large-scale jitter on squares, whose cells rotary positions count."""
    backbone = SQUARE.replace(extent=side // 16)
    return recipe.replace(
        detector=recipe.detector.replace(backbone=backbone), data=recipe.data.replace(**IMAGENET)
    )


def co_dino_vit_l() -> Recipe:
    """COCO from Objects365 weights (`--weights`), 12 epochs."""
    about = "Co-DINO for COCO from Objects365 weights, EVA-02's ViT-L, 5 scales"
    optim = BY_LAYER.replace(ema=0.9999, ema_ramp=2000)
    recipe = _co_dino("co-dino-vit-l", about, WIDE, queries=1500, noise=300, optim=optim)
    assert recipe.schemes.co is not None
    return recipe.replace(
        schemes=recipe.schemes.replace(co=recipe.schemes.co.replace(regions="convolutional")),
        schedule=ScheduleConfig(epochs=12, drops=(7 / 12,), warmup_steps=500),
        data=DataConfig(size=1280, max_side=2048, sides="480-1536", sides_max=2400, **IMAGENET),
    )


def co_dino_vit_l_lvis() -> Recipe:
    """LVIS from Objects365 weights (`--weights`), at 1536 pixels, 16 epochs."""
    about = (
        "Co-DINO for LVIS from Objects365 weights, EVA-02's ViT-L, large-scale jitter and "
        "copy-paste (needs masks)"
    )
    optim = OptimConfig(lr=5e-5, weight_decay=0.05, batch_size=64)
    recipe = _co_dino("co-dino-vit-l-lvis", about, SQUARE, queries=900, noise=300, optim=optim)
    recipe = large_scale(recipe, recipe.name, about, side=1536, epochs=16, drops=(9 / 16, 15 / 16))
    recipe = recipe.replace(schedule=recipe.schedule.replace(warmup_steps=500))
    return federated(_squares(recipe, 1536))


def co_dino_vit_l_objects365() -> Recipe:
    """Objects365, which the recipe for COCO starts from, 26 epochs."""
    about = "Co-DINO for Objects365, EVA-02's ViT-L, 5 scales: what co-dino-vit-l starts from"
    optim = BY_LAYER.replace(lr=2.5e-4, batch_size=224)
    recipe = _co_dino(
        "co-dino-vit-l-objects365", about, WIDE, queries=1500, noise=1000, optim=optim
    )
    return recipe.replace(
        schedule=ScheduleConfig(epochs=26, drops=(24 / 26,), warmup_steps=500),
        data=DataConfig(
            size=1024,
            max_side=1280,
            sides="480-1024",
            sides_max=1280,
            unreadable="replace",
            **IMAGENET,
        ),
    )


def co_dino_vit_l_objects365_lsj() -> Recipe:
    """Objects365 with large-scale jitter at 1280 pixels,
    which the recipe for LVIS starts from, 26 epochs.
    """
    about = (
        "Co-DINO for Objects365, EVA-02's ViT-L, large-scale jitter: what co-dino-vit-l-lvis "
        "starts from"
    )
    optim = BY_LAYER.replace(lr=2e-4, batch_size=192)
    recipe = _co_dino(
        "co-dino-vit-l-objects365-lsj", about, SQUARE, queries=900, noise=1000, optim=optim
    )
    recipe = large_scale(recipe, recipe.name, about, side=1280, epochs=26, drops=(24 / 26,))
    recipe = recipe.replace(schedule=recipe.schedule.replace(warmup_steps=500))
    data = recipe.data.replace(copy_paste=None, unreadable="replace")  # there are no masks
    return _squares(recipe.replace(data=data), 1280)


def co_dino_swin_l_objects365() -> Recipe:
    """Objects365 with a Swin-L, 22 epochs: how it was trained otherwise is not published."""
    about = "Co-DINO for Objects365, Swin-L, 5 scales: what the -finetune recipes start from"
    recipe = co_dino_swin_l()
    return recipe.replace(
        name="co-dino-swin-l-objects365",
        about=about,
        schedule=ScheduleConfig(epochs=22, drops=(20 / 22,)),
        data=recipe.data.replace(unreadable="replace"),
        schemes=recipe.schemes.replace(cdn=CDNConfig(number=500, box_noise=0.4)),
    )


def co_dino_swin_l_finetune() -> Recipe:
    """COCO with a Swin-L from Objects365 weights (`--weights`), 16 epochs."""
    recipe = co_dino_swin_l()
    return recipe.replace(
        name="co-dino-swin-l-finetune",
        about="Co-DINO for COCO from Objects365 weights, Swin-L, 5 scales",
        optim=recipe.optim.replace(lr=1e-4, weight_decay=1e-4),
        schemes=recipe.schemes.replace(cdn=CDNConfig(number=500, box_noise=0.4)),
        schedule=ScheduleConfig(epochs=16, drops=(0.5,)),
        data=DataConfig(size=1280, max_side=2048, sides="480-1536", sides_max=2048),
    )


RECIPES: Recipes = {
    "co-dino-vit-l": co_dino_vit_l,
    "co-dino-vit-l-lvis": co_dino_vit_l_lvis,
    "co-dino-vit-l-objects365": co_dino_vit_l_objects365,
    "co-dino-vit-l-objects365-lsj": co_dino_vit_l_objects365_lsj,
    "co-dino-swin-l-objects365": co_dino_swin_l_objects365,
    "co-dino-swin-l-finetune": co_dino_swin_l_finetune,
}
