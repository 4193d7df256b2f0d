"""The fonts that names are written in, and names as a font can write them."""

from __future__ import annotations

import functools
import unicodedata

from PIL import ImageFont

# Pillow's own font has no letters beyond ASCII; where a name needs them, the first of these that
# has them all.
FONTS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
    "msyh.ttc",
)


@functools.cache
def font_of(name: str | None, size: int) -> ImageFont.FreeTypeFont:
    """The font of this name, `size` pixels high; None is Pillow's own."""
    font = ImageFont.load_default(size) if name is None else ImageFont.truetype(name, size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


@functools.cache
def font_name(letters: frozenset[str]) -> str | None:
    """The font that can write most of these letters; None is Pillow's own, the choice for ASCII."""
    if all(c.isascii() for c in letters):
        return None
    return min((None, *FONTS), key=lambda name: len(missing(name, letters)))


@functools.cache
def missing(name: str | None, letters: frozenset[str]) -> frozenset[str]:
    """Letters that the font lacks:
    it draws them as it draws one that no font has. All, if it is not installed.
    """
    try:
        font = font_of(name, 24)
    except OSError:
        return letters
    nothing = bytes(font.getmask("\U0010ffff"))
    return frozenset(c for c in letters if not c.isspace() and bytes(font.getmask(c)) == nothing)


def writable(text: str, font: str | None, otherwise: str = "?") -> str:
    """On one line, and in ASCII if the font lacks a letter of it. `otherwise` stands for what ASCII
    cannot say, or two classes could be called the same."""
    text = " ".join(text.split())
    if not missing(font, frozenset(text)):
        return text or otherwise
    # Letters, without accents
    parts = [c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)]
    plain = " ".join("".join(c for c in parts if c.isascii()).split())
    return plain if all(c.isascii() for c in parts) else f"{otherwise} {plain}".strip()


def shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, without its end where it would be wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
