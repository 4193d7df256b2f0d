"""Line charts as SVG, in the colours of the page around them; no package is needed for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

# Okabe and Ito's colours: told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 46  # margins
MARKS = 8  # on an axis, at most

Line = Sequence[tuple[float, float]]


def line_chart(
    lines: Mapping[str, Line], x_name: str, y_name: str, top: float | None = None
) -> str:
    """The lines by name, from 0 on the upright axis to `top` (default: the highest value)."""
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    wide, tall = (high - low) or 1.0, top or max(y for _, y in points) or 1.0
    whole = all(x == int(x) for x, _ in points)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - low) / wide * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - min(y / tall, 1) * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for y in marks(0, tall):
        start, up = place(low, y)
        parts.append(
            f'<path d="M{start:.1f} {up:.1f}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity=".15"/>'
        )
        parts.append(f'<text x="{start - 6:.1f}" y="{up + 5:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in marks(low, high, whole):
        across, base = place(x, 0)
        parts.append(
            f'<text x="{across:.1f}" y="{base + 18:.1f}" text-anchor="middle">{x:.4g}</text>'
        )
    for number, line in enumerate(lines.values()):
        path = "L".join("{:.1f} {:.1f}".format(*place(x, y)) for x, y in line if math.isfinite(y))
        colour = COLOURS[number % len(COLOURS)]
        parts.append(
            f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>'
    )
    alt = f"{y_name} by {x_name}"
    svg = (
        f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="14" '
    )
    return f'{svg}fill="currentColor">{"".join(parts)}</svg>{_legend(lines)}'


def marks(low: float, high: float, whole: bool = False) -> list[float]:
    """The multiples of a round number from `low` to `high`, `MARKS` of them at most: of 1, 2 or 5
    times a power of ten, and of 1 or more where only `whole` ones make sense.
    """
    room = max(high - low, 1e-9) / (MARKS - 1)
    power = 10.0 ** math.floor(math.log10(room))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= room * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _legend(lines: Mapping[str, Line]) -> str:
    keys = (
        f'<span><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{escape(name)}</span>'
        for number, name in enumerate(lines)
    )
    return f'<p class="legend">{"".join(keys)}</p>'
