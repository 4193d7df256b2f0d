"""Batches: images normalised and padded to one size, with their targets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from detrellis.boxes import xyxy_to_cxcywh
from detrellis.data.dataset import Sample, WorkerError
from detrellis.data.patches import whole
from detrellis.types import IMAGENET_MEAN, IMAGENET_STD, Channels, ImageBatch, Targets

STRIP = 32  # rows of an image that are normalised at once


@dataclass(frozen=True)
class Normalise:
    """Pixels from 0 to 255 to what a detector reads:
    `(pixel / 255 - mean) / std`, by channel. Default: ImageNet's.
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


IMAGENET = Normalise()


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


@dataclass(frozen=True)
class Collate:
    """Samples to a `Batch`: normalise,
    pad at the bottom and right to `pad_to` or to the largest image.
    """

    pad_to: tuple[int, int] | None = None
    normalise: Normalise = IMAGENET

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
    normalise: Normalise = IMAGENET,
) -> ImageBatch:
    """Images `(3, h, w)` from 0 to 255, normalised and padded with zeros to `pad_to`,
    or to the largest height and width.
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
