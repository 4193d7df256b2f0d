"""JPEG files whose picture data are damaged:
decoders go on, fill the rest with grey, and tell nobody.

A JPEG's picture is one bit stream (several in a progressive file, or with restart markers). Bits
that were changed or lost shift all that follow. Where the stream then ends too soon, what is
missing of the picture becomes exactly middle grey, which `grey` looks for at no price; `starved`
then makes sure, because a picture may *be* grey. Where it ends too late, bytes are left over; as
some cameras leave some too, that is a `doubt`. Damage after which the stream comes out even shows
in the picture alone.
"""

from __future__ import annotations

import io
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GREY = 128  # what a block without data becomes
# In picture data 255 is followed by 0 unless it starts a marker
MARKER = re.compile(rb"\xff+([^\x00\xff])")
SCAN, END, RESTARTS = 0xDA, 0xD9, range(0xD0, 0xD8)
MAX_PIXELS = 1024  # a byte: a block of 64 takes a bit or two at the least
FILLER = bytes(256)  # what a stream that ended too soon would go on with: many blocks of a picture
LEFT_OVER = 64  # bytes that are worth a word


def grey(pixels: NDArray[np.uint8]) -> bool:
    """Whether RGB pixels `(H, W, 3)` hold two neighbouring blocks of middle grey, or end with one.

    Each block of 8 x 8 is looked at in its middle.
    """
    blocks = (pixels[4::8, 4::8] == GREY).all(axis=2)
    return bool((blocks[:, 1:] & blocks[:, :-1]).any() or (pixels[-1, -1] == GREY).all())


def starved(data: bytes) -> bool:
    """Whether the picture data of a JPEG file that decodes end before the picture does."""
    pixels = _decoded(io.BytesIO(data))
    try:
        return not np.array_equal(pixels, _decoded(io.BytesIO(_refilled(data))))
    except OSError:
        return True


def doubt(data: bytes) -> str:
    """What is odd about the picture data of a JPEG file that decodes; "" where nothing is.

    A progressive file is decoded twice, another one once.
    """
    streams = _streams(data)
    if "progressive" in Image.open(io.BytesIO(data)).info:
        return "part of its picture data ends too soon" if starved(data) else ""
    if not streams:
        return ""
    end = len(data[: streams[-1][1]].rstrip(b"\x00\xff"))  # some cameras pad
    file = _Withheld(data, end - LEFT_OVER)
    with Image.open(file) as image:
        image.load()
        needed = file.tell() > file.withheld
    return (
        ""
        if needed
        else (
            f"{LEFT_OVER} bytes or more of its picture data are left over when the picture is "
            "complete"
        )
    )


class _Withheld(io.BytesIO):
    """A file that gives no byte from `withheld` on before it was asked again."""

    def __init__(self, data: bytes, withheld: int) -> None:
        super().__init__(data)
        self.withheld = withheld

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes, or up to where bytes are withheld."""
        room = self.withheld - self.tell()
        wanted = len(self.getbuffer()) if size is None or size < 0 else size
        return super().read(min(wanted, room) if room > 0 else wanted)


def _decoded(file: io.BytesIO) -> NDArray[np.uint8]:
    return np.asarray(Image.open(file))


def _refilled(data: bytes) -> bytes:
    """The file with `FILLER` at the end of every stream,
    which a decoder passes over where the stream was whole.
    """
    parts, place = [], 0
    for _, end in _streams(data):
        parts += [data[place:end], FILLER]
        place = end
    return b"".join([*parts, data[place:]])


def _streams(data: bytes) -> list[tuple[int, int]]:
    """(first byte of the scan, end) of each stream of picture data, in order;
    a scan with restarts has several.
    """
    streams: list[tuple[int, int]] = []
    place = 2
    while (marker := MARKER.search(data, place)) is not None and marker[1][0] != END:
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        if marker[1][0] != SCAN:
            continue
        start = place
        for marker in MARKER.finditer(data, start):
            streams.append((start, marker.start()))
            place = marker.start()
            if marker[1][0] not in RESTARTS:
                break
        else:
            break
    return streams
