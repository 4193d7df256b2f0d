"""A set of 100,000 images: how long a run takes to its first step,
and whether loading an epoch takes more memory.

    python benchmarks/large_set.py [--masks]

The images are copies of a few small pictures, so that only their number counts (not links: `check`
calls one file that is listed twice an error). The run is a process of its own, timed from its first
line, imports included, to where its first step would begin. Then an epoch goes through the loader
as in training; each worker's memory is what it shares with nobody (Linux alone tells). With
`--masks` each object has a polygon of twelve corners, and the detector learns masks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Row, arguments, finish

from detrellis.data.doctor.check import prepare
from detrellis.data.layout import resolve
from detrellis.data.loader import build_loader
from detrellis.data.sampler import BatchSampler
from detrellis.data.shapes import write_shapes
from detrellis.engine.samples import training_dataset
from detrellis.recipes import find_recipe

# Pictures that there really are, their pixels, boxes of each: COCO's average
FILES, SIDE, BOXES = 32, 64, 7
BATCH, WORKERS, LOOKS = 50, 2, 40
TENTH = LOOKS // 10
CORNERS = [
    # Around the middle of a box of 20 by 24 pixels
    (10 + 10 * math.cos(a * math.pi / 6), 12 + 12 * math.sin(a * math.pi / 6))
    for a in range(12)
]
WITH_MASKS = "detector.masks={}"
START = f"""
import time
began = time.perf_counter()
import json, os, sys
import detrellis
from detrellis.engine.train import TrainRun

def first(run, batches):
    print(json.dumps([time.perf_counter() - began, time.process_time()]), flush=True)
    os._exit(0)

TrainRun.train_step = first
detrellis.train(
    "tiny", data=sys.argv[1], out=sys.argv[2], override=sys.argv[3:], workers={WORKERS}, device="cpu"
)
"""


def copied_set(folder: Path, images: int, masks: bool) -> Path:
    """A data set in COCO's layout with so many images."""
    data = write_shapes(folder / "set", train=FILES, val=5, size=(SIDE, SIDE), masks=masks)
    folder = data / "images" / "train"
    real = [path.read_bytes() for path in sorted(folder.iterdir())]
    for index in range(images):
        (folder / f"copy_{index:06}.jpg").write_bytes(real[index % FILES])
    file = data / "annotations" / "instances_train.json"
    coco = json.loads(file.read_text())
    kinds = [category["id"] for category in coco["categories"]]
    names = (f"copy_{index:06}.jpg" for index in range(images))
    coco["images"] = [
        {"id": i, "file_name": name, "height": SIDE, "width": SIDE} for i, name in enumerate(names)
    ]
    coco["annotations"] = [_object(i, kinds, masks) for i in range(images * BOXES)]
    file.write_text(json.dumps(coco))
    return data


def _object(index: int, kinds: list[int], mask: bool) -> dict[str, Any]:
    box = [4 + 3 * (index % 7), 5 + 2 * (index % 11), 20, 24]
    image, kind = index // BOXES, kinds[index % len(kinds)]
    left, top, *_ = box
    outline = [round(side, 2) for x, y in CORNERS for side in (left + x, top + y)]
    return {
        "id": index,
        "image_id": image,
        "category_id": kind,
        "bbox": box,
        "area": 480,
        "iscrowd": 0,
        **({"segmentation": [outline]} if mask else {}),
    }


def seconds_to_the_first_step(data: Path, out: Path, override: list[str]) -> tuple[float, float]:
    """Of the wall, and of the main process's CPU."""
    done = subprocess.run(
        [sys.executable, "-c", START, data, out, *override],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    wall, cpu = json.loads(done.stdout.splitlines()[-1])
    return wall, cpu


def own_megabytes(process: int) -> float:
    """Memory of a process that it shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000


def memory_over_an_epoch(data: Path, images: int, override: list[str]) -> list[float]:
    """The workers' own memory together, in MB, at `LOOKS` places of the epoch."""
    training = prepare(resolve(data, None, None, None, None))[0]
    recipe = find_recipe("tiny").override([f"data.size=[{SIDE}, {SIDE}]", *override])
    dataset = training_dataset(training, recipe, seed=0)
    loader = build_loader(dataset, BatchSampler(images, BATCH), workers=WORKERS)
    found, every = [], len(loader) // LOOKS
    for number, _ in enumerate(loader, start=1):
        if number % every == 0:
            workers = getattr(loader.batches._iterator, "_workers")  # noqa: B009
            found.append(sum(own_megabytes(worker.pid) for worker in workers))
    loader.close()
    return found


def run(args: argparse.Namespace) -> list[Row]:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as scratch:
        override = [WITH_MASKS] if args.masks else []
        data = copied_set(Path(scratch), args.images, args.masks)
        wall, cpu = seconds_to_the_first_step(data, Path(scratch, "run"), override)
        print(
            f"{args.images:,} images, {args.images * BOXES:,} boxes: first step after {wall:.1f} "
            f"s, {cpu:.1f} s of CPU"
        )
        start = time.perf_counter()
        memory = memory_over_an_epoch(data, args.images, override)
    print(
        (
            f"an epoch through {WORKERS} workers: {time.perf_counter() - start:.0f} s; their own "
            "memory in MB: "
        ),
        end="",
    )
    print(", ".join(f"{megabytes:.0f}" for megabytes in memory))
    # Of several looks, since one may see a worker while it holds a picture, or while it does not
    first, last = statistics.mean(memory[:TENTH]), statistics.mean(memory[-TENTH:])
    print(
        f"{first:.1f} MB in the first tenth, {last:.1f} MB in the last, {max(memory):.1f} at most"
    )
    return [
        Row("to the first step, CPU time", cpu, 20, "s"),
        Row("workers' memory, last tenth of an epoch against its first", last / first, 1.05, "x"),
    ]


def main() -> None:
    """See the top of the file."""
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--masks", action="store_true", help="objects have masks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    finish(run(args), args.json)


if __name__ == "__main__":
    main()
