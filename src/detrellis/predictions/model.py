"""A detector with what it needs to predict: its recipe's resizing, and the names of its classes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from detrellis.arguments import BatchSize, Iou, Score, checked
from detrellis.data.batch import Normalise, stack_images
from detrellis.data.classes import ClassMap
from detrellis.data.transforms import eval_transform
from detrellis.detector import Detector, evaluating
from detrellis.engine.views import View, read_views
from detrellis.errors import UserError
from detrellis.predictions.inputs import InputPicture, Pictures, each_frame, find_pictures
from detrellis.predictions.record import (
    OnError,
    Prediction,
    Predictions,
    UnreadablePicture,
    collect_predictions,
)
from detrellis.predictions.tiles import IOU, Tiling, Window, merged, one_way
from detrellis.recipes import Recipe
from detrellis.types import DecoderOutput, Detections

# From outputs, and the sizes (B, 2) of the original images, to the detections of each.
Finish = Callable[[DecoderOutput, Tensor], list[Detections]]
WINDOW = 4  # batches' worth of pictures, read ahead, among which those of one size are batched


@dataclass
class Model:
    """A trained detector with its recipe and its classes."""

    detector: Detector
    recipe: Recipe
    classes: ClassMap
    device: torch.device
    # The `DataSource` it was trained on, as `to_dict` gives it
    data: Mapping[str, Any] | None = None

    @property
    def normalise(self) -> Normalise:
        """How pixels become what the detector reads."""
        return Normalise.of(**self.recipe.data.statistics())

    def fused(self) -> Model:
        """The same for inference alone, sooner: see `Detector.fused`.
        `detrellis.predict` and the command take it.
        """
        return replace(self, detector=self.detector.fused())

    @checked
    def predict(
        self,
        pictures: Pictures,
        *,
        threshold: Score = 0.3,
        nms: Iou | None = None,
        tta: bool | str = False,
        tiles: Tiling | int | None = None,
        batch_size: BatchSize = 1,
        recursive: bool = False,
        on_error: OnError = "raise",
    ) -> Predictions:
        """Detections scoring at least `threshold`, in order: of files, folders, patterns, arrays,
        images and tensors, and of each frame of a video.

        `predictions/inputs.py` says what is taken; `recursive` looks into the folders of folders.
        `nms` drops what overlaps a better detection of its class by more than that IoU: for a
        detector that was trained too shortly to keep one query for each object. `batch_size`
        pictures of one size go through the detector at a time, which changes nothing but rounding.

        `tta` looks at each picture at several sizes and mirrored, and merges what it finds: True,
        or which sizes and how, such as `"640,800,flip,wbf"` (`engine/views.py`). `tiles` looks at
        large pictures in tiles of so many pixels, for small objects; a `Tiling` says how
        (`predictions/tiles.py`).

        A picture that is broken does not stop the others. At the end, `on_error="raise"` raises a
        `UserError` that has all the others in its `predictions`; `"skip"` leaves the broken ones in
        `failures` of what is returned, and so does a function, which is called with each as it
        comes.
        """
        tiling = Tiling(tiles) if isinstance(tiles, int) else tiles
        results = self.detect(
            find_pictures(pictures, recursive), threshold, nms, batch_size, tta, tiling
        )
        return collect_predictions(results, on_error)

    @checked
    def stream(
        self, pictures: Pictures, *, threshold: Score = 0.3, nms: Iou | None = None
    ) -> Iterator[Prediction]:
        """As `predict`, one picture or frame at a time, also of an iterator that has no end. Raises
        at a broken picture, and where a video cannot be read on."""
        for result in self.detect(find_pictures(pictures), threshold, nms, batch_size=1):
            if isinstance(result, UnreadablePicture):
                raise UserError(result.why, result.remedy)
            yield result

    def detect(
        self,
        pictures: Iterable[InputPicture],
        threshold: float | Sequence[float],
        nms: float | None,
        batch_size: int,
        tta: bool | str = False,
        tiling: Tiling | None = None,
    ) -> Generator[Prediction | UnreadablePicture]:
        """The detections in each picture, and each frame of a video,
        from a score on, or from one by class index; or why it cannot be read."""
        pictures = each_frame(pictures)
        if tiling is not None:
            one_way(tta)
            yield from self._of_tiles(pictures, threshold, nms, batch_size, tiling)
            return
        data, postprocess = self.recipe.data, self.detector.postprocess
        views = read_views(tta, data, nms)
        ways = (
            (View(eval_transform(data.size, **data.resizing())),) if views is None else views.views
        )
        plain = replace(postprocess, nms=nms)
        while window := list(
            itertools.islice(pictures, 1 if batch_size == 1 else WINDOW * batch_size)
        ):
            read = [_read(picture, ways) for picture in window]
            readable = {
                row: image for row, image in enumerate(read) if isinstance(image, _ResizedImage)
            }
            of_views = []
            for i, way in enumerate(ways):
                finish = plain if views is None else partial(way.detections, postprocess)
                of_views.append(self._in_view(readable, i, way.pad_to, finish, batch_size))
            for row, (picture, image) in enumerate(zip(window, read, strict=True)):
                if isinstance(image, UnreadablePicture):
                    yield image
                    continue
                parts = [of_view[row] for of_view in of_views]
                merged = (
                    parts[0]
                    if views is None
                    else views.merged(parts, image.size, postprocess.top_k)
                )
                yield self._prediction(picture, image.size, merged, threshold)

    def _of_tiles(
        self,
        pictures: Iterable[InputPicture],
        threshold: float | Sequence[float],
        nms: float | None,
        batch_size: int,
        tiling: Tiling,
    ) -> Generator[Prediction | UnreadablePicture]:
        """As `detect`, in tiles; one picture is in memory at a time."""
        for picture in pictures:
            try:
                image = picture.read()
            except UserError as error:
                assert picture.path is not None
                yield UnreadablePicture.of(picture.path, error)
                continue
            detections = self.in_tiles(image, tiling, nms, batch_size, threshold)
            yield self._prediction(
                picture, (int(image.shape[1]), int(image.shape[2])), detections, threshold
            )

    def in_tiles(
        self,
        image: Tensor,
        tiling: Tiling,
        nms: float | None,
        batch_size: int,
        threshold: float | Sequence[float] = 0.0,
        k: int | None = None,
    ) -> Detections:
        """What is detected in the tiles of an image `(3, H, W)` uint8 from a score on,
        put together, on the host.

        `nms` is the IoU within each tile, and between tiles instead of 0.5. Only `batch_size` tiles
        are resized at a time.
        """
        data = self.recipe.data
        way = View(eval_transform(data.size, **data.resizing()))
        finish = replace(self.detector.postprocess, nms=nms)
        height, width = int(image.shape[1]), int(image.shape[2])
        windows = dict(enumerate(tiling.windows(height, width)))
        sizes = {i: torch.Size((w.bottom - w.top, w.right - w.left)) for i, w in windows.items()}
        of_tiles: list[tuple[Window, Detections]] = []
        for rows in _batches_of_one_size(sizes, batch_size):
            parts = [
                image[:, w.top : w.bottom, w.left : w.right] for w in map(windows.__getitem__, rows)
            ]
            resized = [
                way(part, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))[0] for part in parts
            ]
            frames = [way.resize.frame(*sizes[row]) for row in rows]
            for row, some in zip(
                rows, self._forward(resized, frames, way.pad_to, finish), strict=True
            ):
                host = Detections(
                    some.scores.cpu().float(),
                    some.labels.cpu(),
                    some.boxes.cpu().float(),
                    some.masks,
                )
                of_tiles.append(
                    (windows[row], host.take(_reaching(host, threshold).nonzero()[:, 0]))
                )
        return merged(of_tiles, (height, width), IOU if nms is None else nms, k)

    def _in_view(
        self,
        read: Mapping[int, _ResizedImage],
        view: int,
        pad_to: tuple[int, int] | None,
        finish: Finish,
        batch_size: int,
    ) -> dict[int, Detections]:
        """What `finish` makes of each image in the view of that number."""
        images = {row: image.views[view] for row, image in read.items()}
        by_row: dict[int, Detections] = {}
        for rows in _batches_of_one_size(
            {row: image.shape for row, image in images.items()}, batch_size
        ):
            frames = [read[row].frame for row in rows]
            by_row |= zip(
                rows,
                self._forward([images[row] for row in rows], frames, pad_to, finish),
                strict=True,
            )
        return by_row

    def _forward(
        self,
        batch: list[Tensor],
        frames: list[tuple[float, float]],
        pad_to: tuple[int, int] | None,
        finish: Finish,
    ) -> list[Detections]:
        """What `finish` makes of each image of a batch, whose `frames` (see `Resize.frame`) are
        given, computed on the detector's device, in its precision and in evaluation mode; all of
        these stay what they were."""
        like = next(self.detector.parameters())
        images = stack_images(batch, pad_to, self.normalise).to(like.device)
        sizes = torch.tensor(frames, device=like.device)
        if like.dtype.itemsize > 2:
            images = images._replace(pixels=images.pixels.to(like.dtype))
        with evaluating(self.detector):
            return finish(self.detector(images), sizes)

    def _prediction(
        self,
        picture: InputPicture,
        size: tuple[int, int],
        detections: Detections,
        threshold: float | Sequence[float],
    ) -> Prediction:
        height, width = size
        corner = torch.tensor([width, height, width, height])
        boxes = detections.boxes.cpu().float().clamp(min=0).minimum(corner)
        scores = detections.scores.cpu().float()
        every = detections.labels.cpu()
        kept = _reaching(detections._replace(scores=scores, labels=every), threshold)
        labels = every[kept].tolist()
        return Prediction(
            picture.path,
            size,
            scores[kept].tolist(),
            [self.classes.names[i] for i in labels],
            labels,
            [self.classes.ids[i] for i in labels],
            [tuple(b) for b in boxes[kept].tolist()],
            picture.pixels,
            None
            if detections.masks is None
            else tuple(itertools.compress(detections.masks, kept.tolist())),
            picture.frame,
            picture.time,
        )


@dataclass(frozen=True)
class _ResizedImage:
    """A picture as the detector sees it, before it is normalised and padded."""

    views: tuple[Tensor, ...]  # (3, h, w) from 0 to 255
    size: tuple[int, int]  # height, width of the original
    frame: tuple[float, float]  # the same of what boxes are relative to


def _read(picture: InputPicture, ways: Sequence[View]) -> _ResizedImage | UnreadablePicture:
    try:
        image = picture.read()
    except UserError as error:
        assert picture.path is not None
        return UnreadablePicture.of(picture.path, error)
    resized = tuple(
        way(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))[0] for way in ways
    )
    size = (int(image.shape[1]), int(image.shape[2]))
    return _ResizedImage(resized, size, ways[0].resize.frame(*size))


def _reaching(detections: Detections, threshold: float | Sequence[float]) -> Tensor:
    """Whether the score of each is at least `threshold`, or that of its class; on the host."""
    least = torch.tensor(threshold)
    return detections.scores >= (least[detections.labels] if least.ndim else least)


def _batches_of_one_size(shapes: Mapping[int, torch.Size], batch_size: int) -> Iterator[list[int]]:
    """Positions of images of the same size, `batch_size` at most at a time:
    padding would change the detections.
    """
    by_shape: dict[torch.Size, list[int]] = {}
    for position, shape in shapes.items():
        by_shape.setdefault(shape, []).append(position)
    for positions in by_shape.values():
        yield from (positions[i : i + batch_size] for i in range(0, len(positions), batch_size))
