"""A two-stage detector with distinct queries on timm's features, as `small` is, in a file that
takes pictures of any size. Tracing it takes some 25 seconds at the least, so that the suite has
only the parts: short sizes, orders, rounds of NMS (tests/export).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from detrellis.exporting.run import export

from ..export.test_export import saved

SMALLEST = (
    "detector.backbone.name=tf_mobilenetv3_small_minimal_100",  # padded as EfficientNet is
    "detector.backbone.norm=batch",
    "detector.width=32",
    "detector.decoder.layers=1",
    "data.size=64",
    "data.augment=none",
)


def test_a_network_like_small_takes_pictures_of_any_size(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i, side in enumerate((60, 60, 75, 90, 90, 120)):
        pixels = random.integers(0, 255, (90, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    done = export(saved("small", tmp_path / "run", SMALLEST), verify=tmp_path / "pictures")
    assert done.exported.size == (None, None)
    assert done.verification is not None
    assert all(row.detections > 0 for row in done.verification.rows)
    assert done.verification.passed
