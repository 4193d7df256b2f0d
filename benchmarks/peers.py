"""Deformable DETR in `transformers`,
from a configuration with random weights, and the same network in Detrellis.

The weights go through the converter that users have: saved in transformers' format, read with
`load_foreign`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from detrellis.detector import Detector
from detrellis.interop.load import load_foreign
from detrellis.recipes.config import Recipe
from detrellis.recipes.network import build_detector

# Nothing is fetched, all weights are random; read when it is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = {  # a ResNet-18 and three layers: what a CPU steps through in seconds
    "num_queries": 300,
    "d_model": 256,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
    "two_stage_num_proposals": 300,
}
FULL = {  # the sizes of `dino-r50`
    "num_queries": 900,
    "d_model": 256,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
    "two_stage_num_proposals": 900,
}
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet18": {
        "layer_type": "basic",
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
    },
    "resnet50": {
        "layer_type": "bottleneck",
        "depths": [3, 4, 6, 3],
        "hidden_sizes": [256, 512, 1024, 2048],
    },
}


def theirs(backbone: str, sizes: dict[str, int]) -> Any:
    """Two-stage with box refinement, as shipped."""
    resnet = transformers.ResNetConfig(
        embedding_size=64, **BACKBONES[backbone], out_features=["stage2", "stage3", "stage4"]
    )
    config = transformers.DeformableDetrConfig(
        backbone_config=resnet,
        **sizes,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        num_feature_levels=4,
        encoder_n_points=4,
        decoder_n_points=4,
        dropout=0.0,
        two_stage=True,
        with_box_refine=True,
        auxiliary_loss=True,
        num_labels=80,
    )
    torch.manual_seed(0)
    return transformers.DeformableDetrForObjectDetection(config)


def ours(model: Any) -> tuple[Detector, Recipe]:
    """The same network with the same weights, and the recipe that the converter found."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = load_foreign(Path(folder))
    detector = build_detector(found.recipe.detector, len(found.classes))
    detector.load_state_dict(dict(found.weights))
    return detector, found.recipe
