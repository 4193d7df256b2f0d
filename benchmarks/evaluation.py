"""COCO evaluation of a validation set of COCO's size,
from arrays to the twelve numbers, with a budget.

    python benchmarks/evaluation.py

Side by side with pycocotools: `benchmarks/coco_eval.py`, which also makes the detections. It
threads, so the clock on the wall counts here.
"""

from __future__ import annotations

import numpy as np
from coco_eval import adapter, detections, synthetic
from common import Row, arguments, finish


def main() -> None:
    """See the top of the file."""
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--per-image", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    annotations = synthetic(args.images, random)
    found = detections(annotations, args.per_image, random)
    seconds = []
    for _ in range(args.rounds):
        parts, _ = adapter(annotations, found)
        seconds.append(sum(parts.values()))
        print(", ".join(f"{name} {value:.2f} s" for name, value in parts.items()))
    what = f"{args.images:,} images x {args.per_image} detections"
    finish([Row(what, min(seconds), 3, "s")], args.json)


if __name__ == "__main__":
    main()
