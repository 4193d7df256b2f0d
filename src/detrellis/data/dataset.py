"""The images of a data set, augmented, with their boxes and masks, one at a time.

Everything an image goes through is a function of (seed, epoch, image index) alone: the number of
workers, the rank and an interruption change nothing, and a checkpoint has no random state of the
loader to save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detrellis.data.annotations import Annotations
from detrellis.data.augmentation import Augmentation
from detrellis.data.decode import read_image
from detrellis.data.drawing import pointed
from detrellis.data.masks import SIDE, MaskReader
from detrellis.data.operations import Picture, chance, integer
from detrellis.data.paste import Cutouts, drawn_objects, paste, sampled_grids
from detrellis.data.patches import Patch, boxes_around, whole
from detrellis.data.sampler import Key
from detrellis.data.transforms import Resize, Transform
from detrellis.errors import UserError

IN_A_ROW = 8  # pictures that cannot be read, after which it is no accident


class Sample(NamedTuple):
    """One image as the transform leaves it."""

    image: Tensor  # (3, H, W) uint8; float32 from 0 to 255 without antialiasing
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


class WorkerError(NamedTuple):
    """A `UserError` on its way out of a worker process:
    torch would wrap the exception in a worker's traceback.
    """

    message: str
    remedy: str


class DetectionDataset(Dataset[Sample]):
    """Images with their boxes, without the crowd regions.
    Holds flat arrays only (see `annotations.py`).

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
        """The sample of `(epoch, image index)`.
        Raises `UserError` where the image cannot be read.
        """
        return self._sample(key, first=key)

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample] | WorkerError:
        """A whole batch, as torch's loader fetches it;
        where there are several sizes, its first key decides.
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
    """64 well-mixed bits: torch's generator reads the low 32 only,
    so sums or shifts would collide.
    """
    return int.from_bytes(
        hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest(), "little"
    )
