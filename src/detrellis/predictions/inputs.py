"""Which pictures `predict` looks at: files, folders, patterns;
arrays, images and tensors; and the frames of videos.

| given | taken |
| --- | --- |
| a file | itself, whatever its name |
| a folder | the images and videos in it, sorted, without hidden ones; with `recursive` also those in its folders |
| a pattern: `pics/*.jpg`, `pics/**/*.png` | the files that it fits, sorted, unless a file or folder is called so |
| a NumPy array | uint8, `(H, W, 3)` RGB (OpenCV's is BGR: `array[..., ::-1]`), `(H, W)` grey, or `(H, W, 4)` RGBA |
| a `PIL.Image` | its pixels as they are: an EXIF orientation is not applied, so that boxes fit what was given |
| a tensor | `(3, H, W)` RGB or `(1, H, W)` grey, uint8 or floating point from 0 to 1, on any device |
| a list of these | each in turn; an iterator's one by one, as they are needed |
"""

from __future__ import annotations

import glob
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from detrellis.data.decode import read_header, read_image, to_rgb, upright_size
from detrellis.data.files import is_image, walk
from detrellis.errors import Advice, UserError, shell_line
from detrellis.predictions.video import INSTALL, VIDEOS, has_library, is_video, read_frames

Picture = str | Path | Image.Image | NDArray[Any] | Tensor
Pictures = Annotated[Picture | Iterable[Picture], "checked by find_pictures"]

URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # not C:/
NOWHERE = PurePath()
ARRAYS = (
    "Give a NumPy array (H, W, 3) of uint8 in RGB, a PIL image, a tensor (3, H, W), or a file's "
    "name."
)


@dataclass(frozen=True)
class InputPicture:
    """One picture in which objects are to be detected:
    a file, or pixels; or a video, which stands for its frames.
    """

    path: Path | None
    below: PurePath  # the file's place in the folder that was given, or its name
    pixels: Tensor | None = None  # (3, H, W) uint8 RGB
    listed: bool = False  # it was found in a folder or by a pattern, and not named itself
    every: int = 1  # of a video, one frame of so many
    frame: int | None = None  # its number in the video `path`
    time: float | None = None  # its seconds there
    broken: UserError | None = None  # why the video cannot be read on

    @property
    def is_video(self) -> bool:
        """Whether it stands for its frames, and is none itself."""
        return (
            self.path is not None
            and self.pixels is None
            and self.broken is None
            and is_video(self.path)
        )

    def size(self) -> tuple[int, int]:
        """Height and width of what `read` returns; `UserError` where the file is broken."""
        if self.pixels is not None:
            return self.pixels.shape[1], self.pixels.shape[2]
        assert self.path is not None
        return upright_size(read_header(self.path))

    def read(self) -> Tensor:
        """Uint8 RGB `(3, H, W)`; `UserError` where the file is broken."""
        if self.broken is not None:
            raise self.broken
        if self.pixels is not None:
            return self.pixels
        assert self.path is not None
        header = read_header(self.path)
        if header.several and header.format != "TIFF":  # whose first page is the picture
            raise UserError(f"{self.path}: an animation, not a picture", frames_of(str(self.path)))
        return read_image(self.path)


def find_pictures(pictures: Pictures, recursive: bool = False) -> Iterator[InputPicture]:
    """The pictures that `pictures` means (see the top of the file), one by one; a video as one,
    which `each_frame` takes apart. Where PyAV is missing, folders and patterns give no videos, and
    a note says so.

    Raises `UserError` for what is none: no such file, an empty folder, a URL, another type, shape
    or range.
    """
    if isinstance(pictures, str | Path | Image.Image | np.ndarray | Tensor):
        yield from _pictures_of(pictures, recursive)
        return
    if not isinstance(pictures, Iterable) or isinstance(pictures, bytes | bytearray | dict):
        raise UserError(f"{type(pictures).__name__}: not a picture", ARRAYS)
    for position, picture in enumerate(pictures):
        try:
            yield from _pictures_of(picture, recursive)
        except UserError as error:
            if isinstance(picture, str | Path):
                raise
            raise UserError(f"picture {position}: {error.message}", error.remedy) from None


def each_frame(pictures: Iterable[InputPicture]) -> Iterator[InputPicture]:
    """The pictures, with the frames of a video in its place;
    last comes one that says why it cannot be read on.
    """
    for picture in pictures:
        if picture.is_video:
            yield from _frames(picture)
        else:
            yield picture


def _frames(video: InputPicture) -> Iterator[InputPicture]:
    assert video.path is not None
    try:
        for number, time, pixels in read_frames(video.path, video.every):
            yield replace(video, pixels=pixels, frame=number, time=time)
    except UserError as error:
        yield replace(video, broken=error)


def without_repeats(pictures: Iterable[InputPicture]) -> list[InputPicture]:
    """The pictures with each file once:
    it may be named itself, lie in a folder, and fit a pattern.
    """
    seen: set[str] = set()
    unique = []
    for picture in pictures:
        file = "" if picture.path is None else os.path.realpath(picture.path)
        if file not in seen:
            unique.append(picture)
        if file:
            seen.add(file)
    return unique


def _pictures_of(picture: object, recursive: bool) -> Iterator[InputPicture]:
    """The pictures that one argument means: those of a name, or its own pixels."""
    if isinstance(picture, str | Path):
        yield from _named(str(picture), recursive)
    elif isinstance(picture, Image.Image):
        yield InputPicture(None, NOWHERE, _of_array(np.asarray(to_rgb(picture))))
    elif isinstance(picture, np.ndarray):
        yield InputPicture(None, NOWHERE, _of_array(picture))
    elif isinstance(picture, Tensor):
        yield InputPicture(None, NOWHERE, _of_tensor(picture))
    else:
        raise UserError(f"{type(picture).__name__}: not a picture", ARRAYS)


def _named(name: str, recursive: bool) -> list[InputPicture]:
    """The files that a name on the command line means."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return _in_folder(path, recursive)
    if path.exists():
        if path.suffix.lower() in VIDEOS and not has_library():
            raise UserError(
                f"{name}: a video, for which PyAV is needed", f"{INSTALL}, or {frames_of(name)}"
            )
        return [InputPicture(path, PurePath(path.name))]
    if URL.match(name):
        raise UserError(f"{name}: a URL, not a file", "Download it first, then give the file.")
    if name == "-":
        raise UserError(
            "-: pictures are not read from standard input",
            "Write it to a file, then give the file.",
        )
    if glob.has_magic(name):
        paths = _readable(Path(p) for p in glob.glob(str(path), recursive=True))
        images = [InputPicture(p, PurePath(p.name), listed=True) for p in paths]
        if not images:
            raise UserError(
                f"{name}: no image fits this pattern", f"The current folder is {Path.cwd()}."
            )
        return images
    raise UserError(
        f"{name}: no such file or folder",
        f"Give images or folders; the current folder is {Path.cwd()}.",
    )


def _in_folder(folder: Path, recursive: bool) -> list[InputPicture]:
    below = (Path(parent, name) for parent, files in walk(folder) for name in files)
    paths = _readable(below if recursive else folder.iterdir())
    if paths:
        return [InputPicture(p, p.relative_to(folder), listed=True) for p in paths]
    in_subfolders = 0 if recursive else len(_readable(below))
    suffixes = Counter(
        p.suffix.lower() or "without suffix" for p in folder.iterdir() if p.is_file()
    )
    counts = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(8))
    remedy = f"It holds: {counts or 'no file'}."
    if in_subfolders:
        remedy = f"{in_subfolders} are in its folders: add --recursive."
    raise UserError(f"{folder}: no images in this folder", remedy)


def _readable(files: Iterable[Path]) -> list[Path]:
    """The images and videos among the files, sorted."""
    readable = sorted(p for p in files if (is_image(p) or is_video(p)) and p.is_file())
    videos = [p for p in readable if is_video(p)]
    if not videos or has_library():
        return readable
    more = f" and {len(videos) - 1} more videos are" if len(videos) > 1 else ", a video, is"
    warnings.warn(Advice(f"{videos[0]}{more} left out: {INSTALL}"), stacklevel=2)
    return [p for p in readable if not is_video(p)]


def frames_of(name: str) -> str:
    """The way from a video to pictures, as a remedy."""
    command = (
        f"mkdir frames && {shell_line(['ffmpeg', '-i', name, '-vf', 'fps=5', 'frames/%06d.jpg'])}"
    )
    return f"Extract frames, and give their folder: {command}"


def _of_array(array: NDArray[Any]) -> Tensor:
    about = f"a NumPy array of {array.dtype}, shape {array.shape}"
    if array.dtype != np.uint8:
        raise UserError(
            about,
            "Give uint8, 0 to 255. From floats in 0 to 1: (array * 255).round().astype('uint8').",
        )
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or not array.size:
        raise UserError(
            about,
            "Give (height, width, 3) in RGB, (height, width) in grey, or a list of such arrays.",
        )
    pixels = np.ascontiguousarray(array)
    if pixels.ndim == 2 or pixels.shape[2] == 4:
        pixels = np.asarray(to_rgb(Image.fromarray(pixels)))
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def _of_tensor(tensor: Tensor) -> Tensor:
    about = f"a tensor of {str(tensor.dtype).removeprefix('torch.')}, shape {tuple(tensor.shape)}"
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3) or not tensor.numel():
        raise UserError(
            about, "Give (3, height, width) in RGB or (1, height, width); of a batch, list(batch)."
        )
    values = tensor.detach().cpu()
    if tensor.is_floating_point():
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also where one is not a number
            raise UserError(
                f"{about}, with values from {low:g} to {high:g}",
                "Give values from 0 to 1, or uint8.",
            )
        values = (values.float() * 255).round().to(torch.uint8)
    elif tensor.dtype != torch.uint8:
        raise UserError(about, "Give uint8, or floating point from 0 to 1.")
    return values.expand(3, -1, -1)
