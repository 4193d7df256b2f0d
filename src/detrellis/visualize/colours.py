"""The colours of classes, and of what stands around pictures."""

from __future__ import annotations

Colour = tuple[int, int, int]
# Each as far as possible from those before it in OKLab, the first ones vivid: most data sets have
# few classes.
PALETTE = [
    0x00A5FF, 0xFF7A00, 0x2ED12E, 0xFF3DCB, 0xFFD400, 0x9A5CFF, 0xFF3B30, 0x00D9C0,
    0xFFB4F0, 0x878700, 0xB46996, 0x87FF87, 0xB4B45A, 0x00A596, 0xB496F0, 0xFFB487,
    0xF087A5, 0x5AFFFF, 0x00A500, 0xD200F0, 0xC3692D, 0x87C3FF, 0x6978D2, 0xF00078,
]  # fmt: skip
# Of later classes: black (0) or white, and how much of it
SHADES = ((0, 0.0), (255, 0.4), (0, 0.25), (255, 0.65))
BACKGROUND, BAR, INK = (24, 24, 28), (44, 44, 52), (240, 240, 240)


def colour_of(label: int) -> Colour:
    """The colour of a class index, the same in every picture."""
    value = PALETTE[label % len(PALETTE)]
    shade, weight = SHADES[label // len(PALETTE) % len(SHADES)]
    red, green, blue = (
        round((value >> shift & 255) * (1 - weight) + shade * weight) for shift in (16, 8, 0)
    )
    return red, green, blue


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever stands out more on `colour` (WCAG's contrast ratio; never below
    4.5).
    """
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in (c / 255 for c in colour)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else (255, 255, 255)
