"""Pictures with their times, one by one, as a video:
MP4, in H.264 where PyAV has an encoder for it, else in MPEG-4.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from detrellis.predictions.video import BT709

ENCODERS = {"libx264": {"preset": "veryfast", "crf": "20"}, "mpeg4": {}}  # the first that is there
# Of a second: whole at 24, 25, 30, 50, 60 and 29.97 frames; MPEG-4 takes no shorter one
TICK = Fraction(1, 60000)
BITS = 0.3  # a pixel, of an encoder that knows no quality
LIMITED = 1  # FFmpeg's number of video's own range of brightness


class VideoWriter:
    """A video that can be played whenever the writer has been closed, whatever came before."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        """`rate`: frames a second, on average;
        each frame's time is told with it. The file is made with the first.
        """
        self.path, self.rate = path, rate
        self._container: Any = None
        self._stream: Any = None
        self._size = (0, 0)  # width, height, even
        self._last = -1  # tick

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def add(self, image: Image.Image, time: float) -> None:
        """The picture that is shown from `time` on, in seconds; later than the one before. A side
        of an odd number of pixels grows by one, and a picture of another size than the first is
        fitted to it."""
        import av
        from av.video.reformatter import ColorRange, Colorspace

        if self._container is None:
            self._open(image)
        width, height = self._size
        if abs(image.width - width) > 1 or abs(image.height - height) > 1:
            image = image.resize((width, height))
        pixels = np.asarray(image.convert("RGB"))[:height, :width]
        pixels = np.pad(
            pixels,
            ((0, height - pixels.shape[0]), (0, width - pixels.shape[1]), (0, 0)),
            mode="edge",
        )
        whole = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame = whole.reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        self._last = max(round(time / TICK), self._last + 1)
        frame.pts, frame.time_base = self._last, TICK
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Writes what the encoder holds back, and the file's end."""
        container, self._container = self._container, None
        if container is None:
            return
        with container:
            container.mux(self._stream.encode())

    def _open(self, image: Image.Image) -> None:
        import av

        self._size = (image.width + image.width % 2, image.height + image.height % 2)
        name = next(name for name in ENCODERS if name in av.codecs_available and _encodes(name))
        self._container = av.open(str(self.path), "w", format="mp4")
        stream = self._container.add_stream(
            name, rate=self.rate.limit_denominator(1001), options=ENCODERS[name]
        )
        stream.width, stream.height = self._size
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = TICK
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        if not ENCODERS[name]:
            context.bit_rate = round(
                BITS * self._size[0] * self._size[1] * max(float(self.rate), 1.0)
            )
        self._stream = stream


def _encodes(name: str) -> bool:
    import av

    try:
        return bool(av.Codec(name, "w").is_encoder)
    except ValueError:
        return False
