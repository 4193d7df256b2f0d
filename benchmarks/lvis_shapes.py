"""A synthetic set in LVIS's form, for what LVIS is too large for:
shapes of 45 classes with a long tail, of which each image is searched for some only.

    python benchmarks/lvis_shapes.py lvis-shapes
    detrellis train tiny --data lvis-shapes --scheme federated=10

A class is a shape in a colour ("red disc"). In training the k-th class has a share of 1/k^1.2 of
the objects, and its letter follows from its images there as in LVIS: r up to 10, c up to 100, f
above. Validation draws all classes alike, so that rare ones are known as well as frequent ones.
As in LVIS's annotation, an image's classes are settled one by one: of those that are in it one in
four is passed over, and its objects stay without a box; of those that are not, a few are listed as
absent; and of some that are annotated one object of two or more is left out, and the class is
listed as not exhaustive.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detrellis.data.shapes import CATEGORIES, Kinds, coco_box, draw_image
from detrellis.rle import Bitmap

COLOURS = {
    "red": (215, 35, 35),
    "green": (40, 165, 50),
    "blue": (40, 60, 215),
    "yellow": (230, 215, 40),
    "magenta": (210, 50, 205),
    "cyan": (50, 205, 215),
    "orange": (240, 135, 30),
    "white": (245, 245, 245),
    "black": (10, 10, 10),
}
NAMES = [f"{colour} {shape}" for shape, colour in product(CATEGORIES.values(), COLOURS)]
TAIL = 1.2  # exponent of the classes' shares in training
PASSED_OVER = 0.25  # of the classes that are in an image
NOT_EXHAUSTIVE = 0.3  # of the annotated classes with several objects in an image
ABSENT = 8  # classes an image that are listed as not in it
BINS = ((10, "r"), (100, "c"))  # most images of LVIS's letters; above: f
Random = np.random.Generator
Objects = list[tuple[int, Bitmap]]  # category ids and masks


def kinds(seed: int) -> tuple[Kinds, Kinds]:
    """The classes as training and as validation draw them;
    the seed decides which are frequent.
    """
    ranks = np.random.default_rng(seed).permutation(len(NAMES)) + 1
    shares = ranks.astype(np.float64) ** -TAIL
    shapes = {i + 1: name.split()[1] for i, name in enumerate(NAMES)}
    colours = {i + 1: COLOURS[name.split()[0]] for i, name in enumerate(NAMES)}
    return Kinds(shapes, tuple(shares / shares.sum()), colours), Kinds(shapes, None, colours)


def searched(objects: Objects, random: Random) -> tuple[Objects, list[int], list[int]]:
    """The objects that are annotated, and the category ids that the image is said to lack
    and those whose objects are not all marked.
    """
    counts = Counter(category for category, _ in objects)
    absent = random.choice([i + 1 for i in range(len(NAMES)) if i + 1 not in counts], ABSENT, False)
    settled = [category for category in counts if random.random() >= PASSED_OVER]
    partial = [c for c in settled if counts[c] > 1 and random.random() < NOT_EXHAUSTIVE]
    left = [next(i for i, (c, _) in enumerate(objects) if c == category) for category in partial]
    marked = [row for i, row in enumerate(objects) if row[0] in settled and i not in left]
    return marked, sorted(absent.tolist()), sorted(partial)


def write_split(
    out: Path, split: str, count: int, side: int, kinds: Kinds, random: Random
) -> dict[str, Any]:
    """Writes the pictures; returns what its file says, without the categories."""
    folder = out / "images" / split
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        pixels, objects = draw_image(side, side, (1, 5), random, kinds)
        name = f"{image_id:012}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=92)
        marked, absent, partial = searched(objects, random)
        images.append(
            {
                "id": image_id,
                "coco_url": f"http://images.cocodataset.org/{split}/{name}",
                "width": side,
                "height": side,
                "neg_category_ids": absent,
                "not_exhaustive_category_ids": partial,
            }
        )
        for category, mask in marked:
            row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category}
            annotations.append(row | {"bbox": coco_box(mask), "area": int(mask.sum())})
    return {"images": images, "annotations": annotations}


def write_lvis_shapes(out: Path, *, train: int, val: int, side: int, seed: int = 0) -> Counter[str]:
    """Writes the set in COCO's layout; returns how many classes have each letter."""
    (out / "annotations").mkdir(parents=True)
    contents = {
        split: write_split(out, split, count, side, drawn, np.random.default_rng([seed, index]))
        for index, (split, count, drawn) in enumerate(
            zip(("train", "val"), (train, val), kinds(seed), strict=True)
        )
    }
    rows = contents["train"]["annotations"]
    seen = Counter(category for _, category in {(r["image_id"], r["category_id"]) for r in rows})
    instances = Counter(row["category_id"] for row in rows)
    categories = [
        {
            "id": i,
            "name": name,
            "frequency": next((letter for most, letter in BINS if seen[i] <= most), "f"),
            "image_count": seen[i],
            "instance_count": instances[i],
        }
        for i, name in enumerate(NAMES, 1)
    ]
    for split, content in contents.items():
        file = out / "annotations" / f"instances_{split}.json"
        file.write_text(json.dumps(content | {"categories": categories}))
    return Counter(str(category["frequency"]) for category in categories)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="new folder for the set")
    parser.add_argument("--train", type=int, default=1000, help="images to train on")
    parser.add_argument("--val", type=int, default=300)
    parser.add_argument("--side", type=int, default=112, help="of the pictures, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    letters = write_lvis_shapes(
        args.out, train=args.train, val=args.val, side=args.side, seed=args.seed
    )
    spread = ", ".join(f"{letters[letter]} {letter}" for letter in "rcf")
    print(f"{args.out}: {args.train} + {args.val} images, classes: {spread}")


if __name__ == "__main__":
    main()
