"""A memory of the tokens at all depths."""

from __future__ import annotations

import torch

from detrellis.recipes.network import build_detector

from ..small import CLASSES, images, small


def test_it_reads_the_tokens_before_the_encoder_and_after_each_layer() -> None:
    recipe = small("tiny").override(["detector.encoder.fusion=true", "detector.encoder.layers=2"])
    detector = build_detector(recipe.detector, CLASSES).eval()
    batch = images()
    start = detector.neck(detector.backbone(batch.pixels), batch.padding)
    after: list[torch.Tensor] = []
    for layer in detector.encoder.layers:  # type: ignore[union-attr]
        layer.register_forward_hook(lambda _, __, memory: after.append(memory.tokens))
    fused = detector.encoder(start)
    expected = detector.encoder.fusion([start.tokens, *after])  # type: ignore[operator]
    torch.testing.assert_close(fused.tokens, expected)
    assert not torch.allclose(fused.tokens, after[-1])


def test_without_it_nothing_of_it_is_there() -> None:
    assert not any(
        "fusion" in name for name in build_detector(small("tiny").detector, CLASSES).state_dict()
    )
