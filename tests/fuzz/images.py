"""Image files of every encoding, whole and spoilt;
and what must hold of whatever becomes of them.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from detrellis.data.decode import read_header, read_image, upright_size
from detrellis.data.doctor.check import check
from detrellis.data.layout import resolve
from detrellis.errors import UserError
from tests.fuzz.harness import refusal
from tests.fuzz.values import Random, pick, spoil_bytes

WIDTH, HEIGHT = 96, 64
SIDES = (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1)  # of what headers claim


def _picture(mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise.repeat(8, axis=0).repeat(8, axis=1))
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    return picture.convert(mode)


def _saved(format: str, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    _picture(mode).save(file, format=format, **options)
    return file.getvalue()


def _animated(format: str) -> bytes:
    file = io.BytesIO()
    frames = [_picture().rotate(90 * turn) for turn in range(3)]
    frames[0].save(file, format=format, save_all=True, append_images=frames[1:])
    return file.getvalue()


def _turned(format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _saved(format, exif=exif.tobytes())


ENCODINGS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: _saved("JPEG"),
    "jpeg progressive": lambda: _saved("JPEG", progressive=True),
    "jpeg cmyk": lambda: _saved("JPEG", "CMYK"),
    "jpeg grey": lambda: _saved("JPEG", "L"),
    "jpeg turned": lambda: _turned("JPEG", 6),
    "jpeg of an unknown turn": lambda: _turned("JPEG", 60000),
    "mpo": lambda: _animated("MPO"),
    "jpeg 2000": lambda: _saved("JPEG2000"),
    "png": lambda: _saved("PNG"),
    "png palette": lambda: _saved("PNG", "P", transparency=3),
    "png 16 bit": lambda: _saved("PNG", "I;16"),
    "png bilevel": lambda: _saved("PNG", "1"),
    "png transparent": lambda: _saved("PNG", "LA"),
    "png turned": lambda: _turned("PNG", 5),
    "apng": lambda: _animated("PNG"),
    "gif": lambda: _animated("GIF"),
    "bmp": lambda: _saved("BMP"),
    "tiff": lambda: _saved("TIFF", compression="tiff_lzw"),
    "tiff jpeg": lambda: _saved("TIFF", compression="jpeg"),
    "tiff deflate": lambda: _saved("TIFF", "CMYK", compression="tiff_deflate"),
    "tiff float": lambda: _saved("TIFF", "F"),
    "tiff packbits": lambda: _saved("TIFF", "P", compression="packbits"),
    "tiff group 4": lambda: _saved("TIFF", "1", compression="group4"),
    "tiff turned": lambda: _turned("TIFF", 8),
    "webp": lambda: _saved("WEBP"),
    "webp lossless": lambda: _saved("WEBP", "RGBA", lossless=True),
    "webp animated": lambda: _animated("WEBP"),
    "avif": lambda: _saved("AVIF"),
    "ico": lambda: _saved("ICO"),
    "tga": lambda: _saved("TGA", compression="tga_rle"),
    "ppm": lambda: _saved("PPM"),
    "pcx": lambda: _saved("PCX"),
    "sgi": lambda: _saved("SGI"),
    "dds": lambda: _saved("DDS"),
    "psd": lambda: (
        b"8BPS\0\1"
        + bytes(6)
        + struct.pack(">HIIHH", 3, HEIGHT, WIDTH, 8, 3)
        + bytes(12 + 2 + 3 * 6144)
    ),
}


@cache
def whole(name: str) -> bytes:
    """A file of the encoding before anything is spoilt."""
    return ENCODINGS[name]()


def spoilt(seed: int) -> bytes:
    """A file of the seed's encoding with bytes changed or gone,
    other sizes declared, or chunks added.
    """
    random = np.random.default_rng(seed)
    data = whole(list(ENCODINGS)[seed % len(ENCODINGS)])
    for _ in range(int(random.integers(1, 3))):
        data = pick(random, (_flipped, _header_flipped, _resized, spoil_bytes, _cut, _chunked))(
            random, data
        )
    return data


def _flipped(random: Random, data: bytes) -> bytes:
    """Single bits turned."""
    changed = bytearray(data)
    for place in random.integers(max(len(data), 1), size=int(random.integers(1, 20))).tolist():
        changed[place : place + 1] = bytes(
            b ^ (1 << int(random.integers(8))) for b in changed[place : place + 1]
        )
    return bytes(changed)


def _header_flipped(random: Random, data: bytes) -> bytes:
    """Bytes changed where the properties stand."""
    return _flipped(random, data[:128]) + data[128:]


def _resized(random: Random, data: bytes) -> bytes:
    """Another width or height wherever one seems to be declared;
    the checksum of a PNG's header set right.
    """
    for side in (WIDTH, HEIGHT, WIDTH - 1, HEIGHT - 1):
        claimed = pick(random, SIDES)
        for layout in (">I", "<I", ">H", "<H"):
            largest = 2 ** (16 if layout[1] == "H" else 32) - 1
            old, new = struct.pack(layout, side), struct.pack(layout, min(claimed, largest))
            if random.random() < 0.5:
                data = data[:200].replace(old, new) + data[200:]
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 33:
        data = data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]
    return data


def _cut(random: Random, data: bytes) -> bytes:
    """The beginning, of any length."""
    return data[: int(random.integers(len(data) + 1))]


def _chunked(random: Random, data: bytes) -> bytes:
    """A PNG with a text that is a bomb, or a profile that is none;
    others get bytes in the middle.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        at = int(random.integers(len(data) + 1))
        return data[:at] + random.bytes(64) + data[at:]
    kind, content = pick(random, ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"eXIf", b"")))
    body = content + zlib.compress(bytes(1 << 22))
    return (
        data[:33]
        + struct.pack(">I", len(body))
        + kind
        + body
        + struct.pack(">I", zlib.crc32(kind + body))
        + data[33:]
    )


def attempt(seed: int, folder: Path) -> None:
    """Reading a spoilt picture, as training and prediction do, and the doctor's words about it."""
    suffix = pick(np.random.default_rng(seed), (".jpg", ".png", ".tif", ".webp"))
    path = folder / f"picture{suffix}"
    path.write_bytes(spoilt(seed))
    readable = False
    try:
        header = read_header(path)
        image = read_image(path)
        assert image.shape == (3, *upright_size(header)), f"{image.shape} of {header}"
        readable = True
    except UserError as error:
        refusal(error, str(path))
    rows = {
        "images": [{"id": 1, "file_name": path.name}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}],
        "categories": [{"id": 1, "name": "a"}],
    }
    (folder / "train.json").write_text(json.dumps(rows))
    report = check(resolve(folder), workers=1)
    unreadable = [f for f in report.findings if f.code == "unreadable-image"]
    assert readable == (not unreadable), unreadable
    assert all(path.name in f.file for f in unreadable)
