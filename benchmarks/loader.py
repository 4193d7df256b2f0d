"""The loader on one thread: images a second from JPEG files to resized tensors,
and the padding of training batches.

    python benchmarks/loader.py                       # pictures of COCO's size, drawn for the purpose
    python benchmarks/loader.py --data my_data        # the training split of a data set of yours

Decoding and resizing go through `DetectionDataset`, as in training. Everything is resized to fit
512x512 pixels, which is what the budget is for. Large-scale jitter, alone and with copy-paste, is
that of `co-dino-r50-lsj` on squares of 1024 pixels; it needs masks, which are run lengths on drawn
pictures. The padding is that of the recipes' augmentation with batches of two and of sixteen.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import Row, arguments, finish
from numpy.typing import NDArray
from PIL import Image

from detrellis.data.annotations import Annotations
from detrellis.data.dataset import DetectionDataset
from detrellis.data.doctor.check import prepare
from detrellis.data.layout import resolve
from detrellis.data.masks import has_outlines
from detrellis.data.sampler import BatchSampler
from detrellis.data.shapes import write_shapes
from detrellis.data.transforms import eval_transform, short_side_size
from detrellis.engine.samples import augmentation_of
from detrellis.recipes import find_recipe

SIDE = 512
NOISE = 15.0  # standard deviation, in grey levels
COCO = (480, 640)  # height and width of most of COCO's images, or turned
OBJECTS = (1, 13)  # least and most on a drawn picture: seven, as on COCO's
UNIT = "images/s"
JITTERED = "co-dino-r50-lsj"


def images_per_second(dataset: DetectionDataset, count: int, rounds: int) -> float:
    """The fastest round over the first `count` images, in CPU time."""
    keys = [(0, i) for i in range(min(count, len(dataset)))]
    seconds = []
    for _ in range(1 + rounds):  # the first one also reads the files from the disk
        start = time.process_time()
        for key in keys:
            dataset[key]
        seconds.append(time.process_time() - start)
    return len(keys) / min(seconds[1:])


def jittered(annotations: Annotations, copy_paste: float) -> DetectionDataset:
    """Large-scale jitter, with objects pasted as probably as that."""
    recipe = find_recipe(JITTERED)
    recipe = recipe.replace(data=recipe.data.replace(copy_paste=copy_paste))
    return DetectionDataset(annotations, augmentation_of(recipe))


def padding_share(sizes: NDArray[np.int64], batch: int, *, grouped: bool) -> float:
    """Share of the pixels of an epoch's batches that is padding;
    short sides 480 to 800, as DETR's augmentation has.
    """
    sampler = BatchSampler(len(sizes), batch, group_by_aspect=sizes if grouped else None)
    random = np.random.default_rng(0)
    used = total = 0
    for keys in sampler:
        drawn = [
            short_side_size(*sizes[index].tolist(), int(random.choice(range(480, 801, 32))), 1333)
            for _, index in keys
        ]
        used += sum(h * w for h, w in drawn)
        total += len(drawn) * max(h for h, _ in drawn) * max(w for _, w in drawn)
    return 1 - used / total


def training_split(data: Path | None, images: int, scratch: Path) -> Annotations:
    """Of the folder given, or of one with drawn pictures."""
    if data is None:
        data = write_shapes(
            scratch / "shapes", train=images, val=1, size=COCO, objects=OBJECTS, masks=True
        )
        roughen(data / "images" / "train")
    return prepare(resolve(data, None, None, None, None), skip_bad=True)[0]


def roughen(folder: Path) -> None:
    """Add noise until the files are as large as photographs:
    what is in a JPEG file decides how long it decodes.
    """
    random = np.random.default_rng(0)
    for path in folder.iterdir():
        pixels = np.asarray(Image.open(path)).astype(np.float32)
        noisy = pixels + random.normal(0, NOISE, pixels.shape)
        Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(path, quality=92)


def run(args: argparse.Namespace) -> list[Row]:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as scratch:
        annotations = training_split(args.data, args.images, Path(scratch))
        plain = DetectionDataset(annotations, eval_transform((SIDE, SIDE)))
        fastest = images_per_second(plain, args.images, args.rounds)
        rows = [Row(f"decode and resize to {SIDE} px, on one core", fastest, 300, UNIT, True)]
        if has_outlines(annotations):
            for what, copy_paste, budget in (("", 0.0, 60), (" with copy-paste", 1.0, 30)):
                rate = images_per_second(
                    jittered(annotations, copy_paste), args.images, args.rounds
                )
                rows.append(
                    Row(
                        f"large-scale jitter at 1024 px{what}, on one core",
                        rate,
                        budget,
                        UNIT,
                        True,
                    )
                )
        files = [annotations.path(i) for i in range(min(args.images, len(annotations)))]
        kilobytes = np.mean([f.stat().st_size for f in files]) / 1000
        megapixels = annotations.sizes[: args.images].prod(axis=1).mean() / 1e6
    print(
        f"{len(files)} images of {megapixels:.2f} megapixels and {kilobytes:.0f} kB: "
        f"{fastest:.0f} images/s and core"
    )
    sizes = annotations.sizes
    if args.data is None:  # COCO's mixture: three quarters landscape
        landscape = np.random.default_rng(0).random(2000) < 0.75
        sizes = np.where(landscape[:, None], np.array(COCO), np.array(COCO[::-1]))
    for batch in (2, 16):
        mixed, grouped = (padding_share(sizes, batch, grouped=g) for g in (False, True))
        print(
            f"padding in batches of {batch}: {mixed:.1%} of all pixels, {grouped:.1%} with "
            "data.group_by_aspect=true"
        )
    return rows


def main() -> None:
    """See the top of the file."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="data set folder (default: drawn pictures)")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    finish(run(args), args.json)


if __name__ == "__main__":
    main()
