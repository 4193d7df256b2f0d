"""Every kind of image file becomes an 8-bit RGB tensor, or an error that names the file."""

from __future__ import annotations

import io
import os
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from detrellis.data import jpeg
from detrellis.data.decode import ORIENTATION, read_header, read_image, upright_size
from detrellis.errors import UserError
from tests.data.sets import picture


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".tiff"])
def test_lossless_rgb_is_exact(tmp_path: Path, suffix: str) -> None:
    image = picture(0)
    path = tmp_path / f"a{suffix}"
    image.save(path, lossless=True)
    read = read_image(path)
    assert read.dtype == torch.uint8
    assert read.stride() == (1, 3 * read.shape[2], 3)
    assert torch.equal(read, pixels(image))


def test_jpeg_agrees_with_pillow(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    picture(0).save(path, quality=90)
    assert torch.equal(read_image(path), pixels(Image.open(path)))


NEW_PILLOW = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="it writes YCbCr, and cannot read it"
)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", pytest.param("YCbCr", marks=NEW_PILLOW)])
def test_other_modes_are_converted(tmp_path: Path, mode: str) -> None:
    image = picture(1).convert(mode)
    path = tmp_path / ("a.png" if mode in ("L", "1", "P") else "a.tiff")
    image.save(path)
    assert read_header(path).mode == mode
    assert torch.equal(read_image(path), pixels(image))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (8, 6), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 6))
    image.convert(mode).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert (read[:, :, :4] == 255).all()
    assert (read[:, :, 4:] == 0).all()


def test_transparent_palette_lies_over_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30])
    image.save(tmp_path / "a.png", transparency=0)
    assert (read_image(tmp_path / "a.png") == 255).all()


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bits_keep_the_upper_8(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], dtype=np.uint16)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(values).save(path)
    expected = torch.tensor([[0, 0, 1], [128, 254, 255]], dtype=torch.uint8)
    assert torch.equal(read_image(path), expected.expand(3, 2, 3))


def test_unknown_range_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(path)
    with pytest.raises(UserError, match=r"a\.tiff.*floating-point"):
        read_image(path)


# Inverse of an orientation's turn, as Image.Transpose
BACK = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}


def with_orientation(path: Path, orientation: int, size: tuple[int, int] = (8, 12)) -> torch.Tensor:
    """Saves what a camera would store for an upright picture; returns the upright picture."""
    upright = picture(2, *size)
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(BACK[orientation]))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(path, exif=exif, lossless=True)
    return pixels(upright)


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_applied_when_the_frame_is_upright(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    upright = with_orientation(path, orientation)
    assert torch.equal(read_image(path, (8, 12)), upright)
    assert torch.equal(read_image(path), upright)
    assert upright_size(read_header(path)) == (8, 12)


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_exif_is_left_alone_when_the_frame_is_as_stored(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    upright = Image.fromarray(with_orientation(path, orientation).permute(1, 2, 0).numpy())
    assert torch.equal(
        read_image(path, (12, 8)), pixels(upright.transpose(Image.Transpose(BACK[orientation])))
    )
    assert upright_size(read_header(path), (12, 8)) == (12, 8)


def test_exif_is_applied_to_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    upright = with_orientation(path, 6, (32, 48))
    assert (read_image(path, (32, 48)).float() - upright).abs().mean() < 20


def damaged(path: Path, kind: str) -> None:
    picture(3, 64, 64).save(path)
    data = path.read_bytes()
    broken = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "text": b"<html>404</html>",
        "head": data[:30],
    }
    path.write_bytes(broken[kind])


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "head"])
def test_damaged_files_are_named(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    damaged(path, kind)
    with pytest.raises(UserError) as error:
        read_image(path)
    assert str(path) in error.value.message
    assert error.value.remedy


def test_no_file_blocks_or_misleads(tmp_path: Path) -> None:
    (tmp_path / "link.jpg").symlink_to("moved/away.jpg")
    with pytest.raises(UserError, match=r"link\.jpg: a broken link to moved/away\.jpg"):
        read_image(tmp_path / "link.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UserError, match=r"pipe\.jpg: a pipe or a device"):
        read_image(tmp_path / "pipe.jpg")
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    # Which Pillow would hand to an interpreter
    with pytest.raises(UserError, match=r"a\.jpg: PostScript"):
        read_image(tmp_path / "a.jpg")


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg: no such file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match="a folder, not a file"):
        read_image(tmp_path)


def test_of_several_pictures_the_first_is_read(tmp_path: Path) -> None:
    first, second = picture(0).convert("P"), picture(1).convert("P")
    for name in ("a.gif", "a.tiff"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        assert read_header(tmp_path / name).several
        assert torch.equal(read_image(tmp_path / name), pixels(first))
    first.save(tmp_path / "one.gif")
    assert not read_header(tmp_path / "one.gif").several


FORMATS = {
    "JPEG": {"quality": 80},
    "JPEG, progressive": {"quality": 80, "progressive": True},
    "JPEG, restarts": {"quality": 80, "restart_marker_blocks": 4},
    "PNG": {},
    "WEBP": {},
    "GIF": {},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
}


def encoded(kind: str, image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, kind.split(",")[0], **FORMATS[kind])
    return file.getvalue()


def spoilt(data: bytes, chance: random.Random) -> bytes:
    spoilt = bytearray(data)
    place = chance.randrange(len(data))
    match chance.randrange(4):
        case 0:
            spoilt[place] = chance.randrange(256)
        case 1:
            spoilt[chance.randrange(min(len(data), 64))] = chance.choice([0, 127, 128, 255])
        case 2:
            del spoilt[place:]
        case 3:
            spoilt[place : place + chance.randrange(64)] = chance.randbytes(chance.randrange(64))
    return bytes(spoilt)


@pytest.mark.parametrize("kind", FORMATS)
def test_no_broken_file_does_more_than_raise(tmp_path: Path, kind: str) -> None:
    """Whatever is raised must be a `UserError`;
    the process must live; and warnings stay with their author.
    """
    chance, path = random.Random(0), tmp_path / "a.jpg"
    data = encoded(kind, picture(0))
    refused: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            path.write_bytes(spoilt(data, chance))
            try:
                assert read_image(path).shape[0] == 3
            except UserError as error:
                refused.append(error.message)
    assert len(refused) > 5
    assert all(message.startswith(f"{path}: ") for message in refused)


def test_a_png_with_one_wrong_byte_is_refused(tmp_path: Path) -> None:
    """Which ends a process whose decoder trusts the length of a block of filtered rows."""
    path = tmp_path / "a.png"
    data = bytearray(encoded("PNG", picture(0)))
    data[data.index(b"IDAT") + 40] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.png"):
        read_image(path)


def test_a_size_that_the_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Before memory is asked for it."""
    path = tmp_path / "a.jpg"
    data = bytearray(encoded("JPEG", picture(0)))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 13000, 13000)
    path.write_bytes(data)
    with pytest.raises(UserError, match="no JPEG of its length holds 13000x13000 pixels"):
        read_image(path)
    data = bytearray(encoded("PNG", picture(0)))
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    with pytest.raises(UserError, match="3600000000 pixels"):
        read_image(path)


JPEGS = [kind for kind in FORMATS if kind.startswith("JPEG")]


@pytest.mark.parametrize(("kind", "lost"), [("JPEG", 1000), ("JPEG, restarts", 400)])
def test_a_jpeg_that_lost_its_middle_is_refused(tmp_path: Path, kind: str, lost: int) -> None:
    """Its missing part would be grey, without a word from the decoder."""
    path = tmp_path / "a.jpg"
    data = encoded(kind, picture(0, 96, 128))
    start = data.index(b"\xff\xda") + 14
    path.write_bytes(data[: start + 40] + data[start + 40 + lost :])
    with pytest.raises(UserError, match=r"a\.jpg: damaged: the picture data end too soon"):
        read_image(path)


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_that_is_grey_is_read(tmp_path: Path, kind: str) -> None:
    half = picture(0, 64, 64)
    half.paste((jpeg.GREY,) * 3, (0, 32, 64, 64))
    for number, image in enumerate(
        (half, Image.new("RGB", (40, 24), (jpeg.GREY,) * 3), half.convert("L"))
    ):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(encoded(kind, image))
        assert jpeg.grey(read_image(path).permute(1, 2, 0).numpy())


def test_doubts_about_picture_data() -> None:
    """Where a stream lost its place, not where a camera pads its files."""
    data = encoded("JPEG", picture(0, 96, 128))
    progressive = encoded("JPEG, progressive", picture(0, 96, 128))
    for fine in (
        *(data, progressive, encoded("JPEG, restarts", picture(0, 96, 128))),
        data[:-2] + bytes(500) + data[-2:],
        data + b"a camera's own notes" * 50,
    ):
        assert jpeg.doubt(fine) == ""
    assert "left over" in jpeg.doubt(data[:-2] + bytes(range(1, 200)) + data[-2:])
    start = progressive.index(b"\xff\xda") + 14
    assert "too soon" in jpeg.doubt(progressive[: start + 40] + progressive[start + 140 :])
