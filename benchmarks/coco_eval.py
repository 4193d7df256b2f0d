"""COCO evaluation side by side:
the adapter over hotcoco, and pycocotools as its documentation uses it.

    python benchmarks/coco_eval.py --images 1000
    python benchmarks/coco_eval.py --images 5000 --skip-pycocotools    # COCO val2017's size: 500,000 detections

Both get the same synthetic detections: the adapter as tensors, batch by batch, pycocotools as a
list of dicts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detrellis.data.annotations import Annotations
from detrellis.data.classes import ClassMap
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.eval_result import STATISTICS
from detrellis.types import Detections

CLASSES, MEAN_BOXES, CROWD = 80, 7.3, 0.01  # as in COCO val2017


def synthetic(images: int, rng: np.random.Generator) -> Annotations:
    """Annotations with COCO's numbers of boxes, sizes and crowds."""
    counts = rng.poisson(MEAN_BOXES, images)
    total = int(counts.sum())
    sides = np.exp(rng.normal(4, 1, (total, 2))).clip(4, 500)
    boxes = np.column_stack([rng.uniform(0, 640, (total, 2)), sides])
    return Annotations(
        root=Path(),
        classes=ClassMap(tuple(range(1, CLASSES + 1)), tuple(f"class {i}" for i in range(CLASSES))),
        image_ids=np.sort(rng.choice(600_000, images, replace=False)).astype(np.int64),
        file_names=np.zeros(images, dtype="S1"),
        sizes=np.full((images, 2), 640),
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes,
        labels=rng.integers(0, CLASSES, total),
        crowd=rng.random(total) < CROWD,
        areas=boxes[:, 2] * boxes[:, 3] * 0.7,
        ids=np.arange(1, total + 1),
    )


def detections(a: Annotations, per_image: int, rng: np.random.Generator) -> list[Detections]:
    """Shaken ground truth filled up with noise."""
    found = []
    for i in range(len(a)):
        own = slice(a.starts[i], a.starts[i + 1])
        noise = per_image - len(a.labels[own])
        xywh = np.concatenate(
            [
                a.boxes[own],
                np.column_stack([rng.uniform(0, 640, (noise, 2)), rng.uniform(5, 300, (noise, 2))]),
            ]
        )
        xywh *= rng.normal(1, 0.06, xywh.shape)
        labels = np.concatenate([a.labels[own], rng.integers(0, CLASSES, noise)])
        scores = np.concatenate([rng.beta(4, 3, len(a.labels[own])), rng.beta(1, 6, noise)])
        order = np.argsort(-scores)
        xyxy = np.column_stack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])
        found.append(
            Detections(
                *(torch.tensor(x[order]) for x in (scores.astype("f"), labels, xyxy.astype("f")))
            )
        )
    return found


def adapter(
    a: Annotations, found: list[Detections], batch: int = 16
) -> tuple[dict[str, float], list[float | None]]:
    """Seconds by part, and the statistics."""
    start = time.perf_counter()
    evaluator = CocoEvaluator(a)
    for i in range(0, len(a), batch):
        evaluator.update(a.image_ids[i : i + batch].tolist(), found[i : i + batch])
    collected = time.perf_counter()
    result = evaluator.compute()
    seconds = {"collect": collected - start, "evaluate": time.perf_counter() - collected}
    return seconds, [result.stats[name] for name in STATISTICS]


def pycocotools(
    a: Annotations, found: list[Detections]
) -> tuple[dict[str, float], list[float | None]]:
    """The same from pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    owner = a.image_ids[a.box_rows]
    columns = (a.ids, owner, a.labels + 1, a.boxes, a.areas, a.crowd.astype(int))
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    truth = [
        dict(zip(keys, row, strict=True))
        for row in zip(*(c.tolist() for c in columns), strict=True)
    ]
    start = time.perf_counter()
    results: list[dict[str, Any]] = []
    for image_id, d in zip(a.image_ids.tolist(), found, strict=True):
        for score, label, (x, y, x2, y2) in zip(
            *(t.tolist() for t in (d.scores, d.labels, d.boxes)), strict=True
        ):
            results.append(
                {
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": [x, y, x2 - x, y2 - y],
                    "score": score,
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = {"images": [{"id": i} for i in a.image_ids.tolist()], "annotations": truth}
        gt.dataset["categories"] = [{"id": i} for i in a.classes.ids]
        gt.createIndex()
        dt = gt.loadRes(results)
        collected = time.perf_counter()
        evaluation = COCOeval(gt, dt, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    seconds = {"collect": collected - start, "evaluate": time.perf_counter() - collected}
    return seconds, [None if s < 0 else float(s) for s in evaluation.stats]


def main() -> None:
    """Prints seconds, memory and the largest difference between the statistics."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--per-image", type=int, default=100)
    parser.add_argument("--skip-pycocotools", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    a = synthetic(args.images, rng)
    found = detections(a, args.per_image, rng)
    print(
        f"{len(a):,} images, {len(a.ids):,} boxes, {sum(len(d.scores) for d in found):,} detections"
    )
    numbers = {}
    for run in (adapter,) if args.skip_pycocotools else (adapter, pycocotools):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds, numbers[run.__name__] = run(a, found)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        parts = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        print(
            f"{run.__name__:12} {sum(seconds.values()):8.2f} s ({parts}); peak memory grew by "
            f"{grown:.0f} MiB"
        )
    print(
        "  ".join(
            f"{name} {value:.4f}"
            for name, value in zip(STATISTICS, numbers["adapter"], strict=True)
        )
    )
    if "pycocotools" in numbers:
        pairs = zip(numbers["adapter"], numbers["pycocotools"], strict=True)
        print(f"largest difference: {max(abs(x - y) for x, y in pairs):.1e}")


if __name__ == "__main__":
    main()
