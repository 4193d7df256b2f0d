"""From annotations to batches on the device.

Everything an image goes through is a function of (seed, epoch, image index) alone: the number of
workers, the rank and an interruption change nothing, and a checkpoint has no random state of the
loader to save.
"""

from __future__ import annotations

import hashlib
import itertools
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detrellis.boxes import xyxy_to_cxcywh
from detrellis.data.annotations import Annotations
from detrellis.data.augmentation import Augmentation
from detrellis.data.decode import read_image
from detrellis.data.drawing import pointed
from detrellis.data.masks import SIDE, MaskReader
from detrellis.data.operations import Picture, chance, integer
from detrellis.data.paste import Cutouts, drawn_objects, paste, sampled_grids
from detrellis.data.patches import Patch, boxes_around, whole
from detrellis.data.sampler import BatchSampler, EvalSampler, Key
from detrellis.data.transforms import Resize, Transform
from detrellis.errors import UserError
from detrellis.types import IMAGENET_MEAN, IMAGENET_STD, Channels, ImageBatch, Targets

STRIP = 32  # rows of an image that are normalised at once
IN_A_ROW = 8  # pictures that cannot be read, after which it is no accident


@dataclass(frozen=True)
class Normalise:
    """Pixels from 0 to 255 to what a detector reads: `(pixel / 255 - mean) / std`, by channel.
    Default: ImageNet's.
    """

    mean: Channels = IMAGENET_MEAN
    std: Channels = IMAGENET_STD

    @classmethod
    def of(cls, mean: Channels | None, std: Channels | None) -> Normalise:
        """What a recipe says; what it leaves open is ImageNet's."""
        return cls(mean or IMAGENET_MEAN, std or IMAGENET_STD)

    @property
    def statistics(self) -> tuple[Channels, Channels]:
        """Mean and std."""
        return self.mean, self.std

    def into(self, image: Tensor, out: Tensor) -> None:
        """`image (3, H, W)` normalised into `out`, which may be a view: `image * scale + shift`.

        Not a fused multiply-add: that rounds differently at the ends of a thread's part. Strip by
        strip, each of which stays in the cache.
        """
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        scale, shift = 1 / (255 * std), -mean / std
        for rows, into in zip(image.split(STRIP, dim=1), out.split(STRIP, dim=1), strict=True):
            into.copy_(rows).mul_(scale).add_(shift)

    def colours(self, pixels: Tensor) -> Tensor:
        """The inverse: `pixels (3, H, W)` of a batch as uint8."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((pixels.cpu() * std + mean) * 255).round().clamp(0, 255).byte()


class Sample(NamedTuple):
    """One image as the transform leaves it."""

    image: Tensor  # (3, H, W) uint8
    boxes: Tensor  # (n, 4) float32 pixel xyxy in `image`
    labels: Tensor  # (n,) int64 class index
    image_id: int
    # Height, width of the original; of what becomes its padding too where that is image
    size: tuple[float, float]
    masks: Tensor | None = None  # (n, M, M) bool, each seen within its box; None where nobody asked
    patches: Sequence[Patch] | None = None  # n, of the whole image; None where nobody asked

    @property
    def bitmaps(self) -> Tensor | None:
        """The masks in the whole image `(n, H, W)`, bool; None where nobody asked."""
        return (
            None
            if self.patches is None
            else whole(self.patches, (self.image.shape[1], self.image.shape[2]))
        )


class Batch(NamedTuple):
    """A batch of images with their targets, as a training step or an evaluation reads it."""

    images: ImageBatch
    targets: Targets  # boxes normalised cxcywh, relative to the image without its padding
    image_ids: tuple[int, ...]
    sizes: Tensor  # (B, 2) height, width of the original images, see `Sample`

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        images = self.images.to(device, non_blocking=non_blocking)
        targets = self.targets.to(device, non_blocking=non_blocking)
        return Batch(
            images, targets, self.image_ids, self.sizes.to(device, non_blocking=non_blocking)
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a copy to the GPU need not block."""
        pixels, padding = self.images
        images = ImageBatch(pixels.pin_memory(), None if padding is None else padding.pin_memory())
        targets = self.targets.map(Tensor.pin_memory)
        return Batch(images, targets, self.image_ids, self.sizes.pin_memory())


class WorkerError(NamedTuple):
    """A `UserError` on its way out of a worker process: torch would wrap the exception in a
    worker's traceback.
    """

    message: str
    remedy: str


class DetectionDataset(Dataset[Sample]):
    """Images with their boxes, without the crowd regions. Holds flat arrays only (see
    `annotations.py`).

    A `transform` is applied in every epoch, an `Augmentation` as it says. With `masks` (seen within
    the boxes) or `bitmaps` (of the whole image) outlines are read from the annotation file, and for
    what pastes objects by their masks; `UserError` where there are none. In the place of a picture
    that cannot be read stands the next one, if `unreadable` names a file, which says so line by
    line.
    """

    def __init__(
        self,
        annotations: Annotations,
        transform: Transform | Augmentation,
        seed: int = 0,
        *,
        masks: bool = False,
        bitmaps: bool = False,
        unreadable: Path | None = None,
    ) -> None:
        kept = ~annotations.crowd
        self.unreadable = unreadable
        self.root, self.seed = str(annotations.root), seed
        self.augmentation = (
            transform if isinstance(transform, Augmentation) else Augmentation(transform)
        )
        self.file_names = annotations.file_names
        self.sizes = annotations.sizes
        self.image_ids = annotations.image_ids
        self.starts = np.concatenate([[0], np.cumsum(kept)])[annotations.starts]
        x, y, width, height = annotations.boxes[kept].T
        self.boxes = np.stack([x, y, x + width, y + height], axis=1).astype(np.float32)
        self.labels = annotations.labels[kept]
        self.large_scale, self.bitmaps = self.augmentation.large_scale, bitmaps
        entire = bitmaps or (self.large_scale is not None and self.large_scale.copy_paste > 0)
        self.masks = (
            MaskReader(annotations, grids=masks, bitmaps=entire) if masks or entire else None
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: Key) -> Sample:
        """The sample of `(epoch, image index)`. Raises `UserError` where the image cannot be
        read.
        """
        return self._sample(key, first=key)

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample] | WorkerError:
        """A whole batch, as torch's loader fetches it; where there are several sizes, its first key
        decides.
        """
        try:
            return [self._sample(key, first=keys[0]) for key in keys]
        except UserError as error:
            return WorkerError(error.message, error.remedy)

    def _sample(self, key: Key, first: Key) -> Sample:
        epoch, index = key
        choice = mixed_seed(self.seed, epoch, -1 - first[1]) % self.augmentation.choices(epoch)
        transform = self.augmentation.at(epoch, choice, self._partner)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would also reseed the GPU's generator, which fork_rng does
            # not restore here.
            torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, index))
            shown = self._shown(*transform(*self._picture(index)))
            if (
                self.large_scale is not None
                and self.large_scale.copy_paste
                and chance(self.large_scale.copy_paste)
            ):
                shown = _pasted(shown, self._shown(*transform(*self._partner())))
        height, width = self.sizes[index].tolist()
        size = transform.frame(height, width) if isinstance(transform, Resize) else (height, width)
        patches = shown.patches if self.bitmaps else None
        return shown._replace(image_id=int(self.image_ids[index]), size=size, patches=patches)

    def _shown(self, image: Tensor, boxes: Tensor, labels: Tensor) -> Sample:
        """A transformed picture with the masks that are asked for; of no image yet."""
        if self.masks is None:
            return Sample(image, boxes, labels, -1, (0, 0))
        drawn = self.masks(image, boxes, labels)
        labels = torch.from_numpy(self.labels[drawn.rows.numpy()])
        # Boxes of what was cut are those around what is left, as in the released codes.
        cut = self.large_scale is not None
        boxes = boxes_around(drawn.patches) if cut and drawn.patches is not None else drawn.boxes
        return Sample(image, boxes, labels, -1, (0, 0), drawn.grids, drawn.patches)

    def _picture(self, index: int) -> Picture:
        """An image as it is on the disk, with its boxes and labels; where masks are drawn, with its
        points, and the rows of its objects as labels."""
        index, image = self._readable(index)
        rows = slice(self.starts[index], self.starts[index + 1])
        boxes = torch.tensor(self.boxes[rows])
        if self.masks is not None:
            return pointed(image, boxes, torch.arange(rows.start, rows.stop))
        return image, boxes, torch.tensor(self.labels[rows])

    def _readable(self, index: int) -> tuple[int, Tensor]:
        """The image of this index, or the next one that can be read, and its index."""
        for further in range(IN_A_ROW):
            place = (index + further) % len(self)
            try:
                return place, self._image(place, *self.sizes[place].tolist())
            except UserError as error:
                if self.unreadable is None or further == IN_A_ROW - 1:
                    raise
                with self.unreadable.open("a") as file:  # a line at a time: several workers write
                    file.write(f"{error.message.splitlines()[0]}\n")
        raise AssertionError("unreachable")

    def _partner(self) -> Picture:
        """An image drawn from torch's generator, to be mixed with another one."""
        return self._picture(integer(0, len(self) - 1))

    def _image(self, index: int, height: int, width: int) -> Tensor:
        path = Path(self.root, bytes(self.file_names[index]).decode())
        image = read_image(path, (height, width))
        if image.shape[1:] != (height, width):
            size = f"{image.shape[2]}x{image.shape[1]}"
            raise UserError(
                f"{path}: the file is {size} pixels (width x height), the annotations say "
                f"{width}x{height}",
                "Its boxes would be wrong. Run `detrellis check` to list all such files.",
            )
        return image


def _pasted(below: Sample, above: Sample) -> Sample:
    """A sample with some objects of another one on it."""
    assert below.patches is not None
    assert above.patches is not None
    objects = Cutouts(above.image, above.boxes, above.labels, above.patches).take(
        drawn_objects(len(above.labels))
    )
    image, boxes, labels, patches = paste(
        Cutouts(below.image, below.boxes, below.labels, below.patches), objects
    )
    grids = None if below.masks is None else sampled_grids(patches, SIDE)
    return below._replace(image=image, boxes=boxes, labels=labels, masks=grids, patches=patches)


def mixed_seed(seed: int, epoch: int, index: int) -> int:
    """64 well-mixed bits: torch's generator reads the low 32 only, so sums or shifts would
    collide.
    """
    return int.from_bytes(
        hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest(), "little"
    )


@dataclass(frozen=True)
class Collate:
    """Samples to a `Batch`: normalise, pad at the bottom and right to `pad_to` or to the largest
    image.
    """

    pad_to: tuple[int, int] | None = None
    normalise: Normalise = Normalise()

    def __call__(self, samples: list[Sample] | WorkerError) -> Batch | WorkerError:
        """The batch; an error of a worker is passed on."""
        if isinstance(samples, WorkerError):
            return samples
        counts = tuple(len(s.labels) for s in samples)
        drawn = [s.masks for s in samples if s.masks is not None]
        masks = torch.cat(drawn) if drawn else None
        labels = torch.cat([s.labels for s in samples])
        sizes = torch.tensor([s.size for s in samples])
        images = stack_images([s.image for s in samples], self.pad_to, self.normalise)
        patches = [s.patches for s in samples if s.patches is not None]
        height, width = images.pixels.shape[2:]
        bitmaps = whole(list(itertools.chain(*patches)), (height, width)) if patches else None
        targets = Targets(labels, _normalised_boxes(samples), counts, masks, bitmaps)
        return Batch(images, targets, tuple(s.image_id for s in samples), sizes)


def _normalised_boxes(samples: list[Sample]) -> Tensor:
    scaled = []
    for sample in samples:
        height, width = sample.image.shape[1:]
        scaled.append(sample.boxes / sample.boxes.new_tensor([width, height, width, height]))
    return xyxy_to_cxcywh(torch.cat(scaled)).float()


def stack_images(
    images: Sequence[Tensor],
    pad_to: tuple[int, int] | None = None,
    normalise: Normalise = Normalise(),
) -> ImageBatch:
    """Uint8 `(3, h, w)` images, normalised and padded with zeros to `pad_to`, or to the largest
    height and width.
    """
    height, width = pad_to or (max(i.shape[1] for i in images), max(i.shape[2] for i in images))
    pixels = torch.empty(len(images), 3, height, width)
    padded = any(image.shape[1:] != (height, width) for image in images)
    padding = torch.ones(len(images), height, width, dtype=torch.bool) if padded else None
    for number, (image, into) in enumerate(zip(images, pixels, strict=True)):
        h, w = image.shape[1:]
        normalise.into(image, into[:, :h, :w])
        into[:, h:] = 0
        into[:, :h, w:] = 0
        if padding is not None:
            padding[number, :h, :w] = False
    return ImageBatch(pixels, padding)


class Loader:
    """Iterates batches in the sampler's order and raises what the workers could not read as a
    `UserError`.
    """

    def __init__(self, batches: DataLoader[Sample], sampler: BatchSampler | EvalSampler) -> None:
        self.batches, self.sampler = batches, sampler

    @property
    def dataset(self) -> DetectionDataset:
        """The images that are loaded."""
        dataset = self.batches.dataset
        assert isinstance(dataset, DetectionDataset)
        return dataset

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.batches)
        try:
            while (batch := _next(batches)) is not None:
                yield batch
        except (Exception, KeyboardInterrupt):
            self.close()
            raise

    def close(self) -> None:
        """Ends the workers. Where nobody calls it they end when the loader is collected, but a
        loader that hangs on an exception's traceback may be collected by one of its own threads,
        which then waits for itself."""
        iterator, self.batches._iterator = self.batches._iterator, None
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def _next(batches: Iterator[Batch | WorkerError]) -> Batch | None:
    """The next batch, None after the last."""
    try:
        batch = next(batches, None)
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
            raise
        raise _died(error) from error
    if isinstance(batch, WorkerError):
        raise UserError(batch.message, batch.remedy)
    return batch


def _died(error: RuntimeError) -> UserError:
    """The error of a dead worker, with the remedy that torch's message suggests."""
    message = f"{error} {error.__cause__ or ''}".lower()
    fewer = "use fewer workers (--workers 0: none) or smaller batches"
    if "bus error" in message:
        remedy = (
            f"The shared memory ran out: {fewer}; in a container, give it more (docker: "
            "--shm-size or --ipc=host)."
        )
    elif "killed by signal: killed" in message:
        remedy = f"It was killed from outside, mostly because the memory ran out: {fewer}."
    else:
        remedy = (
            "An image may have ended it: `detrellis check` decodes them all. Or memory was "
            f"short: {fewer}."
        )
    return UserError(f"a loader worker died: {str(error).splitlines()[0]}", remedy)


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and a batch system's SIGTERM reach every process of the group; the main one saves and
    ends the workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def build_loader(
    dataset: DetectionDataset,
    sampler: BatchSampler | EvalSampler,
    *,
    normalise: Normalise = Normalise(),
    workers: int = 0,
    pin_memory: bool = False,
) -> Loader:
    """Loads the sampler's batches with `workers` processes, each of them two batches ahead.

    A worker computes with one thread, which torch sees to; with `workers=0` the caller's process
    does the work.
    """
    batches = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=Collate(dataset.augmentation.pad_to, normalise),
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        # Its own generator: without one every epoch takes a number from the global one, whose state
        # the model shares.
        generator=torch.Generator(),
        worker_init_fn=_ignore_signals,
    )
    return Loader(batches, sampler)
