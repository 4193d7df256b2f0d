"""Every golden vector, dispatched by folder and file name:
a new file of a known kind needs no new code.

The files are read from `$DETRELLIS_GOLDEN` (default: `../shared/golden` beside the repository),
from `$DETRELLIS_GOLDEN_NEW` (`../shared/golden_new`: also of parts that are not built yet, which
are skipped by name), and from the small copies in `tests/golden/data`. Inputs, outputs and
tolerances are documented by each folder's README.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from . import (
    align,
    analysis,
    base,
    co,
    co_analysis,
    co_dense,
    co_nms,
    co_rcnn,
    dfine,
    group,
    jitter,
    large,
    lvis,
    lwdetr,
    mask2former,
    maskdino,
    masks,
    models,
    rates,
    realtime,
    rivals,
    sam,
)
from .arrays import Arrays

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
FULL = Path(os.environ.get("DETRELLIS_GOLDEN", SHARED / "golden"))
NEW = Path(os.environ.get("DETRELLIS_GOLDEN_NEW", SHARED / "golden_new"))
CARRIED = Path(__file__).parent / "data"

# Longest matching prefix of "folder/name" wins.
KINDS: dict[str, Callable[[Arrays], None]] = {
    "base/msda_": base.check_deformable_attention,
    "base/msda_module_": base.check_deformable_module,
    "base/sine_pe": base.check_sine,
    "base/giou": base.check_giou,
    "base/loss_": base.check_set_loss,
    "base/postprocess_": base.check_postprocess,
    "base/cdn_": base.check_cdn,
    "base/cdn_loss": base.check_denoising_loss,
    "base/dn_detr_": base.check_dn,
    "base/dn_loss": base.check_denoising_loss,
    "base/dino_tiny_": models.check_dino,
    "base/hdetr_": models.check_hdetr,
    "base/instability": analysis.check_instability,
    "align/align_": align.check_align,
    "align/align_dn": align.check_align_denoising,
    "align/align_full_criterion": align.check_full_criterion,
    "align/mixed_matcher_": align.check_mixed_matcher,
    "align/pmc_": align.check_pmc,
    "align/compare_": align.check_compare,
    "align/hdetr_": align.check_hybrid,
    "align/fig1_": analysis.check_misalignment,
    "group/conddetr_groups_": group.check_conditional,
    "group/lwdetr_groups_twostage_": group.check_two_stage,
    "group/group_dn_mask": group.check_denoising_mask,
    "group/pd_md": group.check_distances,
    "co/positive_queries": co.check_positive_queries,
    "co/aux_query_embed": co.check_query_embed,
    "co/aux_decoder_loss": co.check_auxiliary_loss,
    "co/denoising": co.check_denoising,
    "co/hungarian": co.check_hungarian,
    "co/analysis_derived": co_analysis.check_derived,
    "co/nms": co_nms.check_nms,
    "co/atss_assigner": co_dense.check_atss_assigner,
    "co/atss_head": co_dense.check_atss,
    "co/retina_head_giou": partial(co_dense.check_head, branch=co_dense.RetinaNet),
    "co/retina_head_l1": co_dense.check_retina_l1,
    "co/fcos_head": partial(co_dense.check_head, branch=co_dense.FCOS, quality="ctr"),
    "co/fcos_targets": co_dense.check_fcos_targets,
    "co/gfl_head": partial(co_dense.check_head, branch=co_dense.GFL),
    "co/paa_head": co_dense.check_paa,
    "co/losses": co_dense.check_losses,
    "co/box_coders": co_dense.check_coders,
    "co/anchors": co_dense.check_anchors,
    "co/max_iou_assigner": co_rcnn.check_max_iou,
    "co/rpn_head_firstk": co_rcnn.check_rpn,
    "co/rcnn_bbox_loss": co_rcnn.check_region_losses,
    "co/roi": co_rcnn.check_regions,
    "realtime/class_losses": rivals.check_class_losses,
    "large/fed_loss": large.check_federated,
    "realtime/rtdetr_": realtime.check_rtdetr,
    "realtime/rtdetrv2_": realtime.check_rtdetr,
    "realtime/rtdetr_cdn": realtime.check_cdn,
    "realtime/lwdetr_": lwdetr.check_model,
    "realtime/rfdetr_": lwdetr.check_model,
    "large/copy_paste": jitter.check_copy_paste,
    "large/lvis_eval": lvis.check_lvis_eval,
    "large/lsj_detectron2": jitter.check_detectron2,
    "large/lsj_mmdet": jitter.check_mmdet,
    "large/layer_decay": rates.check_layer_decay,
    "large/memory_fusion": large.check_memory_fusion,
    "large/repeat_factors": large.check_repeat_factors,
    "large/simple_pyramid": large.check_pyramid,
    "large/vit_": large.check_vit,
    "realtime/dfine_": dfine.check_model,
    "realtime/dfine_fdr": dfine.check_fdr,
    "rivals/dfine": dfine.check_losses,
    "rivals/dynamic_assigner": rivals.check_dynamic,
    "rivals/box_attention": rivals.check_box_attention,
    "rivals/mal": rivals.check_mal,
    "rivals/relation": rivals.check_relation,
    "rivals/rank_loss": rivals.check_rank,
    "rivals/salience_targets": rivals.check_salience,
    "segmentation/hf_mask2former_": mask2former.check_model,
    "segmentation/m2f_loss_": mask2former.check_loss,
    "segmentation/group_mask2former_": mask2former.check_groups,
    "segmentation/maskdino_": maskdino.check,
    "segmentation/instance_inference": masks.check_instance_inference,
    "segmentation/mask_ap": masks.check_mask_ap,
    "sam/aligner_": sam.check_aligner,
    "sam/layer_": sam.check_layer,
    "sam/detector_": sam.check_detector,
    "sam/posenc": sam.check_positions,
    "sam/criterion": sam.check_criterion,
    "sam/smca_detr_ss_": sam.check_smca,
    "sam/smca_ms_declayers_": sam.check_scale_selection,
    **{
        f"base/hf_{name}_": partial(models.check_hf, kind=kind)
        for name, kind in models.FAMILIES.items()
    },
}

# Too large to carry: their parts are carried.
LARGE = {
    *(
        "sam/layer_",
        "sam/detector_",
        "realtime/dfine_",
        "realtime/rtdetr_",
        "realtime/rtdetrv2_",
        "large/vit_",
        "large/simple_pyramid",
    ),
    *("segmentation/hf_mask2former_", "segmentation/group_mask2former_", "segmentation/maskdino_"),
}


def kind(name: str) -> str:
    known = [k for k in KINDS if name.startswith(k)]
    return max(known, key=len, default="")


def files() -> list[Path]:
    return sorted(
        f for place in (FULL, NEW, CARRIED) if place.is_dir() for f in place.glob("*/*.npz")
    )


@pytest.mark.parametrize("path", files(), ids=lambda p: f"{p.parts[-4]}-{p.parent.name}-{p.stem}")
def test_golden(path: Path) -> None:
    name = f"{path.parent.name}/{path.stem}"
    found = kind(name)
    if not found and path.is_relative_to(NEW):
        pytest.skip(f"{name} is of a part that is not built yet")
    assert found, f"{path}: no kind of golden vector starts like {name}; add one to KINDS"
    with np.load(path, allow_pickle=False) as data:
        KINDS[found](Arrays(data))


def test_the_full_set_is_present() -> None:
    if not FULL.is_dir():
        pytest.skip(
            f"{FULL} is missing: set DETRELLIS_GOLDEN to the folder of golden vectors to test "
            "all of them"
        )
    assert any(FULL.glob("*/*.npz"))


def test_small_copies_cover_every_kind_but_whole_models() -> None:
    carried = {kind(f"{f.parent.name}/{f.stem}") for f in CARRIED.glob("*/*.npz")}
    modules = (models.__name__, lwdetr.__name__)
    whole = {k for k, check in KINDS.items() if getattr(check, "func", check).__module__ in modules}
    assert carried >= set(KINDS) - whole - LARGE
