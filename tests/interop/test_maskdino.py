"""Mask DINO's own checkpoints, in both orders of its levels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detrellis.detector import Detector
from detrellis.errors import UserError
from detrellis.interop.links import link_up, missing, to_theirs
from detrellis.interop.load import load_foreign
from detrellis.interop.mask2former import backbone
from detrellis.interop.maskdino import HEAD, names, turned
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.network import build_detector
from detrellis.types import ImageBatch

from ..small import small


def config(*, finest_first: bool, learned: bool) -> DetectorConfig:
    """As the file tells it: what no shape says is as released."""
    return (
        small("mask_dino_r50")
        .override(
            [
                *("detector.backbone.name=resnet50", "detector.backbone.norm=frozen_norm"),
                *(
                    "detector.encoder.heads=8",
                    "detector.decoder.heads=8",
                    "detector.decoder.double_norm=true",
                ),
                f"detector.queries.content_from={'learned' if learned else 'states'}",
                f"detector.queries.count={12 if learned else 300}",
                f"detector.queries.smallest_on={'coarsest' if finest_first else 'finest'}",
                *("detector.queries.empty_compete=true", "detector.top_k=100"),
            ]
        )
        .detector
    )


def released(
    detector: Detector, config: DetectorConfig, *, finest_first: bool
) -> dict[str, torch.Tensor]:
    """The weights of the detector under its names; proposals and layers share their heads there."""
    head, layers = detector.queries.head, detector.decoder.heads
    assert head is not None
    head.classify.load_state_dict(layers.classes[0].state_dict())
    head.move.load_state_dict(layers.boxes[0].state_dict())
    for ours, theirs in (
        (head.embed, layers.embed),
        (head.output_norm, detector.decoder.final_norm),
    ):
        assert ours is not None
        ours.load_state_dict(theirs.state_dict())
    state = detector.state_dict()
    table = names(config, HEAD, finest_first=finest_first) + backbone(
        config, "backbone", of_transformers=False
    )
    links = link_up(state, table, config.decoder.layers)
    assert not missing(state, links)
    return turned(to_theirs(state, links), config, finest_first=finest_first)


@pytest.mark.parametrize(("finest_first", "learned"), [(True, False), (False, True)])
@torch.no_grad()
def test_its_weights_predict_the_same(finest_first: bool, learned: bool, tmp_path: Path) -> None:
    chosen = config(finest_first=finest_first, learned=learned)
    detector = build_detector(chosen, 80).eval()
    path = tmp_path / "model_final.pth"
    weights = released(detector, chosen, finest_first=finest_first)
    weights[f"{HEAD}predictor.label_enc.weight"] = torch.zeros(80, 64)  # of training
    torch.save({"model": weights}, path)
    found = load_foreign(path)
    assert found.skipped == (f"{HEAD}predictor.label_enc.weight",)
    again = build_detector(found.recipe.detector, len(found.classes))
    again.load_state_dict(dict(found.weights))
    batch = ImageBatch(torch.randn(1, 3, 64, 96))
    one, other = detector(batch), again.eval()(batch)
    assert one.mask_embeds is not None
    assert other.mask_embeds is not None
    for ours, theirs in (
        (one.logits, other.logits),
        (one.boxes, other.boxes),
        (one.mask_embeds, other.mask_embeds),
    ):
        assert torch.equal(ours, theirs)
    # Nothing is half-loaded.
    del weights[f"{HEAD}predictor.mask_embed.layers.0.weight"]
    torch.save({"model": weights}, path)
    with pytest.raises(UserError, match=r"mask_embed\.layers\.0\.weight is missing"):
        load_foreign(path)
