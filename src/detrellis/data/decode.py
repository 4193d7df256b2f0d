"""Image files to 8-bit RGB tensors: the one reader of training, evaluation, prediction and the doctor.

| in the file | what becomes of it |
| --- | --- |
| 8-bit RGB JPEG or PNG | decoded by torchvision, straight into a tensor |
| grey, bilevel, palette, CMYK, YCbCr, Lab | converted to RGB by Pillow |
| transparency | laid over white, as viewers and labelling tools show it |
| 16 bits a channel | the upper 8 bits are kept |
| 32-bit integers that fit 16 bits | as 16 bits; others, and floats, are refused: their range is anyone's guess |
| EXIF orientation | applied so that the pixels agree with the annotations' frame, see `turn` |
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from detrellis.errors import UserError

ORIENTATION = 0x0112  # the EXIF tag

# What turns stored pixels upright, for each EXIF orientation. 5 to 8 swap height and width.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
REMEDY = "Replace or re-export the file, or leave the image out (`check --fix` and `train --skip-bad` do)."


class Header(NamedTuple):
    """What an image file says about itself before a pixel is decoded."""

    size: tuple[int, int]  # (height, width) as stored
    mode: str  # Pillow's: "RGB", "L", "P", "CMYK", "I;16", ...
    format: str  # "JPEG", "PNG", ...
    orientation: int  # EXIF: 1 is upright


def turn(header: Header, size: tuple[int, int] | None) -> int:
    """The EXIF orientation to apply to an image whose annotations live in a frame of `size` (height, width).

    Labelling tools either showed the picture upright or ignored the tag, and the frame tells which: a quarter turn is
    applied unless `size` is the size as stored. Where the size cannot tell (half turns, mirrors, squares, no `size`),
    the tag is applied, because viewers do.
    """
    if header.orientation not in UPRIGHT:
        return 1
    height, width = header.size
    quarter = header.orientation >= 5 and height != width
    as_stored = quarter and size is not None and tuple(size) == (height, width)
    return 1 if as_stored else header.orientation


def upright_size(header: Header, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """(height, width) of the tensor that `read_image(path, size)` returns."""
    height, width = header.size
    return (width, height) if turn(header, size) >= 5 else (height, width)


def read_header(path: Path) -> Header:
    """Size, mode and orientation without decoding. `UserError` where the file is missing or no image."""
    with _open(path) as image:
        return _header(image)


def read_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """The image as uint8 RGB `(3, H, W)`; `UserError` naming the file where it cannot be read to its end.

    `size` is the (height, width) that the annotations give for the image: it decides only what is done about an EXIF
    orientation (see `turn`) and never resizes. In memory the channels stand last, as decoders write and resizing
    likes them.
    """
    with _open(path) as image:
        header = _header(image)
        orientation = turn(header, size)
        if orientation == 1 and header.mode == "RGB" and header.format in ("JPEG", "PNG"):
            fast = _read_fast(path)
            if fast is not None:
                return fast
        try:
            image.load()
            pixels = _to_rgb(image)
            upright = pixels.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else pixels
        except UserError as error:
            raise UserError(f"{path}: {error.message}", error.remedy) from error
        except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
            raise UserError(f"{path}: the image cannot be decoded ({_first_line(error)})", REMEDY) from error
    return torch.from_numpy(np.array(upright, dtype=np.uint8)).permute(2, 0, 1)


def _open(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # A large picture is the user's own: Pillow refuses the absurd ones with an error, which is caught below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such image file", "Put it there, or correct the name or the folder.") from error
    except UnidentifiedImageError as error:
        why = "the file is empty (0 bytes)" if path.stat().st_size == 0 else "not an image, or of an unknown format"
        raise UserError(f"{path}: {why}", REMEDY) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: the image cannot be opened ({_first_line(error)})", REMEDY) from error


def _header(image: Image.Image) -> Header:
    orientation = 1
    # Pillow would look for EXIF everywhere; only these hold an orientation, and most files have none of them.
    if any(key in image.info for key in ("exif", "Raw profile type exif", "xmp")) or image.format in ("TIFF", "MPO"):
        try:
            orientation = int(image.getexif().get(ORIENTATION, 1))
        except Exception:  # a broken EXIF block says nothing about the pixels
            orientation = 1
    return Header((image.height, image.width), image.mode, image.format or "", orientation)


def _read_fast(path: Path) -> Tensor | None:
    """torchvision's decoder; None where it will not do, for Pillow to try or to say why."""
    from torchvision.io import ImageReadMode, read_file
    from torchvision.io import decode_image as decode

    try:
        pixels: Tensor = decode(read_file(str(path)), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError):
        return None
    return pixels if pixels.dtype == torch.uint8 else None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> NDArray[np.uint8]:
    remedy = "Convert it to 8 or 16 bits a channel, scaled as the detector shall see it."
    if image.mode == "F":
        raise UserError("a floating-point image, whose range of values is unknown", remedy)
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise UserError(f"32-bit values ({values.min()} to {values.max()}) that do not fit 16 bits", remedy)
    return (values >> 8).astype(np.uint8)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
