"""Image files to 8-bit RGB tensors:
the one reader of training, evaluation, prediction and the doctor.

| in the file | what becomes of it |
| --- | --- |
| 8-bit RGB | as it is |
| grey, bilevel, palette, CMYK, YCbCr, Lab | converted to RGB by Pillow |
| transparency | laid over white, as viewers and labelling tools show it |
| 16 bits a channel | the upper 8 bits are kept |
| 32-bit integers that fit 16 bits | as 16 bits; others, and floats, are refused: their range is anyone's guess |
| EXIF orientation | applied so that the pixels agree with the annotations' frame, see `turn` |
| several pictures (animations, pages) | the first one |

All of it goes through Pillow, because no file may end the process: a decoder that trusts what it
reads does, at a PNG with one changed byte. Whatever Pillow says about a broken file becomes a
`UserError`.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from detrellis.data import jpeg
from detrellis.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

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
BACK = UPRIGHT | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # what undoes that
JPEGS = ("JPEG", "MPO")  # as Pillow calls them; MPO holds several
REMEDY = (
    "Replace or re-export the file, or leave the image out (`check --fix` and `train "
    "--skip-bad` do)."
)


class Header(NamedTuple):
    """The properties of an image file that are known before a pixel is decoded."""

    size: tuple[int, int]  # (height, width) as stored
    mode: str  # Pillow's: "RGB", "L", "P", "CMYK", "I;16", ...
    format: str  # "JPEG", "PNG", ...
    orientation: int  # EXIF: 1 is upright
    several: bool = False  # whether other pictures follow in the file: an animation, or pages


def turn(header: Header, size: tuple[int, int] | None) -> int:
    """The EXIF orientation to apply to an image whose annotations live in a frame of `size`
    (height, width).

    Labelling tools either showed the picture upright or ignored the tag, and the frame tells which:
    a quarter turn is applied unless `size` is the size as stored. Where the size cannot tell (half
    turns, mirrors, squares, no `size`), the tag is applied, because viewers do.
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
    """Size, mode and orientation without decoding.
    `UserError` where the file is missing or no image.
    """
    with _opened(path) as image:
        return _header(image)


def read_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """As `read_pixels`, a tensor `(3, H, W)`.
    In memory the channels stand last, as decoders write and resizing likes them."""
    import torch  # only now: the doctor does without

    return torch.from_numpy(read_pixels(path, size)).permute(2, 0, 1)


def read_pixels(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """The image as uint8 RGB `(H, W, 3)`;
    `UserError` naming the file where it cannot be read to its end.

    `size` is the (height, width) that the annotations give for the image: it decides only what is
    done about an EXIF orientation (see `turn`) and never resizes.
    """
    with _opened(path) as image:
        pixels = np.array(_upright(image, path, size), dtype=np.uint8)
        if image.format in JPEGS and jpeg.grey(pixels) and jpeg.starved(path.read_bytes()):
            raise UserError(
                "damaged: the picture data end too soon, and the rest of the picture is grey",
                REMEDY,
            )
    return pixels


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The file as Pillow opens it.
    Whatever is raised inside becomes a `UserError` that names the file.
    """
    try:
        with warnings.catch_warnings():
            # A large picture is the user's own (Pillow refuses the absurd ones), and odd metadata
            # are no odd pixels.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            # Before it is opened: a pipe would keep the process waiting for ever
            if why := absence(path):
                raise UserError(
                    why,
                    REMEDY if path.exists() else "Put it there, or correct the name or the folder.",
                )
            with Image.open(path) as image:
                yield image
    except UserError as error:
        raise UserError(f"{path}: {error.message}", error.remedy) from error
    except UnidentifiedImageError as error:
        why = (
            "the file is empty (0 bytes)"
            if path.stat().st_size == 0
            else "not an image, or of an unknown format"
        )
        raise UserError(f"{path}: {why}", REMEDY) from error
    except Exception as error:
        # Pillow's readers meet what their authors never thought of, and say so in many ways.
        raise UserError(
            f"{path}: the image cannot be read ({_first_line(error)})", REMEDY
        ) from error


def absence(path: Path) -> str:
    """Why there is no file to read, `no such file` for example; "" where there is one."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return f"a broken link to {os.readlink(path)}" if path.is_symlink() else "no such file"
    except (OSError, ValueError) as error:
        return f"cannot be read ({_first_line(error)})"
    if stat.S_ISREG(mode):
        return ""
    return "a folder, not a file" if stat.S_ISDIR(mode) else "a pipe or a device, not a file"


def _upright(image: Image.Image, path: Path, size: tuple[int, int] | None) -> Image.Image:
    """RGB, in the frame of the annotations."""
    header = _header(image)
    if header.format == "EPS":
        raise UserError("PostScript, which is a program and no image", REMEDY)
    if (
        header.format in JPEGS
        and image.width * image.height > jpeg.MAX_PIXELS * path.stat().st_size
    ):
        raise UserError(
            f"damaged: no JPEG of its length holds {image.width}x{image.height} pixels", REMEDY
        )
    wanted = turn(header, size)
    image.load()
    # These alone Pillow turns by itself
    if header.format == "TIFF" and header.orientation in UPRIGHT:
        turned = None if wanted == header.orientation else BACK[header.orientation]
    else:
        turned = UPRIGHT.get(wanted)
    pixels = to_rgb(image)
    return pixels if turned is None else pixels.transpose(turned)


def _header(image: Image.Image) -> Header:
    orientation, height, width = 1, image.height, image.width
    # Pillow would look for EXIF everywhere; only these hold an orientation, and most files have
    # none of them.
    if any(
        key in image.info for key in ("exif", "Raw profile type exif", "xmp")
    ) or image.format in ("TIFF", "MPO"):
        try:
            orientation = int(image.getexif().get(ORIENTATION, 1))
        except Exception:  # a broken EXIF block says nothing about the pixels
            orientation = 1
    if isinstance(image, TiffImageFile):  # whose size is the upright one in some versions of Pillow
        width, height = int(image.tag_v2[IMAGEWIDTH]), int(image.tag_v2[IMAGELENGTH])
    # A phone's second picture is a map of depth or brightness.
    several = image.format != "MPO" and bool(getattr(image, "is_animated", False))
    return Header((height, width), image.mode, image.format or "", orientation, several)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, as the table at the top says; `UserError` for values whose range nobody knows."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
            "RGB"
        )
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> NDArray[np.uint8]:
    remedy = "Convert it to 8 or 16 bits a channel, scaled as the detector shall see it."
    if image.mode == "F":
        raise UserError("a floating-point image, whose range of values is unknown", remedy)
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise UserError(
            f"32-bit values ({values.min()} to {values.max()}) that do not fit 16 bits", remedy
        )
    return (values >> 8).astype(np.uint8)


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
