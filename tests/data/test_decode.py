"""Every kind of image file becomes an 8-bit RGB tensor, or an error that names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
    difference = (read_image(path).int() - pixels(Image.open(path)).int()).abs()
    assert difference.max() <= 4  # two builds of one codec
    assert difference.float().mean() < 0.5


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
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


def with_orientation(path: Path, orientation: int, size: tuple[int, int] = (8, 12)) -> torch.Tensor:
    """Saves what a camera would store for an upright picture; returns the upright picture."""
    upright = picture(2, *size)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # inverse of the turn, as Image.Transpose
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(path, exif=exif)
    return pixels(upright)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_applied_when_the_frame_is_upright(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "a.png"
    upright = with_orientation(path, orientation)
    assert torch.equal(read_image(path, (8, 12)), upright)
    assert torch.equal(read_image(path), upright)
    assert upright_size(read_header(path)) == (8, 12)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_exif_is_left_alone_when_the_frame_is_as_stored(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "a.png"
    with_orientation(path, orientation)
    assert torch.equal(read_image(path, (12, 8)), pixels(Image.open(path)))
    assert upright_size(read_header(path), (12, 8)) == (12, 8)


def test_exif_is_applied_to_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    upright = with_orientation(path, 6, (32, 48))
    assert (read_image(path, (32, 48)).float() - upright).abs().mean() < 20


def damaged(path: Path, kind: str) -> None:
    picture(3, 64, 64).save(path)
    data = path.read_bytes()
    broken = {"truncated": data[: len(data) // 2], "empty": b"", "text": b"<html>404</html>", "head": data[:30]}
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


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg: no such image file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match="cannot be opened"):
        read_image(tmp_path)
