"""The box around a shape that an annotation tool drew, and the finding of those that have none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from detrellis.data.doctor.findings import Finding, finding
from detrellis.data.formats.named_classes import Box


def around(points: Sequence[Sequence[float]]) -> Box:
    """The box around points (x, y)."""
    xs, ys = [float(p[0]) for p in points], [float(p[1]) for p in points]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def around_ellipse(cx: float, cy: float, rx: float, ry: float, theta: float = 0.0) -> Box:
    """The box around an ellipse that is turned by `theta` radians."""
    x = math.hypot(rx * math.cos(theta), ry * math.sin(theta))
    y = math.hypot(rx * math.sin(theta), ry * math.cos(theta))
    return cx - x, cy - y, 2 * x, 2 * y


def skipped_shapes(split: str, source: Path, skipped: Counter[str]) -> list[Finding]:
    """The finding of shapes that have no box, by kind and number; none where there are none."""
    if not skipped:
        return []
    listed = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())
    what = f"{skipped.total()} shapes have no box and are left out: {listed}"
    return [finding("skipped-shapes", split, source, what, count=skipped.total())]
