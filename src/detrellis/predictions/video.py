"""Videos as pictures: their frames one by one, upright, each with its number and its time.
Needs PyAV.

A video is decoded from its start to its end, and only the frame that is looked at is in memory.
Times are those that the file gives, from its first frame on, so that a rate that varies stays as it
is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detrellis.data.files import hidden
from detrellis.errors import UserError

INSTALL = "pip install 'detrellis[video]'"
VIDEOS = frozenset(
    {
        ".mp4",
        ".avi",
        ".mov",
        ".mkv",
        ".webm",
        ".m4v",
        ".mpg",
        ".mpeg",
        ".wmv",
        ".flv",
        ".mts",
        ".3gp",
    }
)
AGAIN = "Copy, download or export the file again; what could be read of it is used."
# Seconds, or share of the duration if less, by which a video may end before its header says
EARLY = (0.5, 0.2)
LOCAL = {"protocol_whitelist": "file"}  # a playlist that is called like a video opens no address
BT601, BT709, UNSPECIFIED = 5, 1, 2  # how colours are coded, by FFmpeg's numbers
HIGH = 720  # lines from which a video that does not say so is BT.709


class Frame(NamedTuple):
    """One picture of a video."""

    number: int  # from 0
    time: float  # seconds since the first frame
    pixels: Tensor  # (3, H, W) uint8 RGB


def is_video(path: str | Path) -> bool:
    """Whether it is called like a video, and is not hidden."""
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in VIDEOS and not hidden(name)


def has_library() -> bool:
    """Whether PyAV can be imported."""
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


def frame_rate(path: Path) -> Fraction:
    """Frames a second, on average; 25 where the file does not say, or cannot be read."""
    return _head(path)[0]


def frames_expected(path: Path) -> int:
    """About how many frames there are, as the file says; 1 where it does not, or cannot be read."""
    return _head(path)[1]


def read_frames(path: Path, every: int = 1) -> Iterator[Frame]:
    """Each `every`th frame, from the first one on.

    Raises `UserError` that names the file: at once where it is no video, and after the last frame
    that can be read where it is damaged, or ends before its header says.
    """
    import av

    try:
        with _opened(path) as container:
            yield from _decoded(path, container, every)
    except (av.FFmpegError, OSError) as error:
        reason = (
            os.strerror(error.errno)
            if isinstance(error, OSError) and error.errno
            else _reason(error)
        )
        raise UserError(f"{path}: a video that cannot be read ({reason})", AGAIN) from None


def read_frame(path: Path, number: int) -> Tensor:
    """The pixels of one frame `(3, H, W)`, for which all before it are decoded."""
    for frame in read_frames(path):
        if frame.number == number:
            return frame.pixels
    raise UserError(f"{path}: has no frame {number}", "Has the file changed since?")


def _decoded(path: Path, container: Any, every: int) -> Iterator[Frame]:
    """The frames, and at the end what was wrong with the file."""
    if not container.streams.video:
        raise UserError(
            f"{path}: holds no pictures, only {_kinds(container)}", "Leave it out, or give a video."
        )
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rate, number, damaged, start, time, end = _rate(stream), 0, 0, None, 0.0, 0.0
    for packet in container.demux([s for s in container.streams if s.type in ("video", "audio")]):
        end = max(end, _end(packet))
        if packet.stream.index != stream.index:
            continue
        frames, whole = _frames(packet)
        damaged += not whole
        for frame in frames:
            time = float(1 / rate) + time if frame.time is None else frame.time
            start = time if start is None else start
            if number % every == 0:
                yield Frame(number, time - start, _pixels(frame))
            number += 1
    _whole(path, number, damaged, end, container)


def _whole(path: Path, frames: int, damaged: int, end: float, container: Any) -> None:
    """Raises `UserError` where the file is not:
    it has ended at `end` seconds, with parts that are `damaged`.
    """
    duration = (container.duration or 0) / 1_000_000
    begin = max((container.start_time or 0) / 1_000_000, 0)
    if not frames:
        raise UserError(f"{path}: a video of which no frame can be read", AGAIN)
    if duration - (end - begin) > min(EARLY[0], EARLY[1] * duration):
        raise UserError(
            f"{path}: ends after {end - begin:.1f} of {duration:.1f} seconds, {frames} frames "
            "were read",
            AGAIN,
        )
    if damaged:
        raise UserError(
            f"{path}: {damaged} parts of it are damaged, {frames} frames were read", AGAIN
        )


def _frames(packet: Any) -> tuple[list[Any], bool]:
    """The frames of a piece of the file, and whether it is as it was written."""
    import av

    try:
        frames = packet.decode()
    except av.FFmpegError:
        return [], False
    return frames, not packet.is_corrupt


def _pixels(frame: Any) -> Tensor:
    """RGB `(3, H, W)`, turned as the file says that it is shown."""
    coded = frame.colorspace
    if coded == UNSPECIFIED:
        coded = BT709 if frame.height >= HIGH else BT601
    pixels = frame.to_ndarray(format="rgb24", src_colorspace=coded)
    turned = np.rot90(pixels, round(frame.rotation / 90))  # both count against the clock
    return torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 0, 1)


def _end(packet: Any) -> float:
    """Seconds at which what the packet holds is over; 0 where it does not say."""
    return (
        0.0
        if packet.pts is None
        else float((packet.pts + (packet.duration or 0)) * packet.time_base)
    )


def _head(path: Path) -> tuple[Fraction, int]:
    """Frames a second and their number, as far as the file says."""
    import av

    try:
        with _opened(path) as container:
            stream = container.streams.video[0]
            seconds = Fraction(container.duration or 0, 1_000_000)
            return _rate(stream), max(stream.frames or round(seconds * _rate(stream)), 1)
    except (UserError, av.FFmpegError, OSError, IndexError):  # reading it says what is wrong
        return Fraction(25), 1


def _rate(stream: Any) -> Fraction:
    return Fraction(stream.average_rate or stream.guessed_rate or 25)


def _opened(path: Path) -> Any:
    import av

    if not path.stat().st_size:
        raise UserError(f"{path}: the file is empty", AGAIN)
    return av.open(os.path.abspath(path), options=LOCAL)


def _kinds(container: Any) -> str:
    return " and ".join(sorted({str(stream.type) for stream in container.streams})) or "nothing"


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).lower()
