"""How long LVIS's AP takes, and how much memory: random boxes of its validation set's size.

python benchmarks/lvis_evaluation.py            # 19,809 images, 300 detections each
python benchmarks/lvis_evaluation.py --images 2000
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import torch

from detrellis.data.annotations import Annotations, Federation
from detrellis.data.classes import ClassMap
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.types import Detections

CLASSES = 1203


def truth(images: int) -> Annotations:
    """Twelve objects an image on average, of classes with a long tail."""
    random = np.random.default_rng(0)
    counts = random.poisson(12, images)
    boxes = np.concatenate(
        [random.uniform(0, 400, (counts.sum(), 2)), random.uniform(8, 200, (counts.sum(), 2))], 1
    )
    shares = 1 / np.arange(1, CLASSES + 1)
    ids = np.arange(1, images + 1)
    absent = np.stack([np.repeat(ids, 9), random.integers(1, CLASSES + 1, 9 * images)], 1)
    frequency = {k + 1: "fcr"[min(k // 405, 2)] for k in range(CLASSES)}
    return Annotations(
        root=Path(),
        classes=ClassMap(tuple(range(1, CLASSES + 1)), tuple(map(str, range(CLASSES)))),
        image_ids=ids,
        file_names=np.array([b"x"] * images),
        sizes=np.full((images, 2), 640),
        starts=np.concatenate([[0], np.cumsum(counts)]),
        boxes=boxes,
        labels=random.choice(CLASSES, counts.sum(), p=shares / shares.sum()),
        crowd=np.zeros(counts.sum(), dtype=np.bool_),
        areas=boxes[:, 2:].prod(1),
        ids=np.arange(1, counts.sum() + 1),
        federation=Federation(absent, absent[: images // 2], frequency),
    )


def main() -> None:
    """Print the time of the statistics, and the process's largest memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=19809)
    images = parser.parse_args().images
    evaluator, generator = CocoEvaluator(truth(images)), torch.Generator().manual_seed(0)
    for image in range(1, images + 1):
        boxes = torch.rand(300, 4, generator=generator) * 300
        boxes[:, 2:] += boxes[:, :2]
        scores = torch.rand(300, generator=generator)
        labels = torch.randint(0, CLASSES, (300,), generator=generator)
        evaluator.update([image], [Detections(scores.sort(descending=True).values, labels, boxes)])
    start = time.perf_counter()
    evaluator.compute()
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{images:,} images with 300 detections: {seconds:.1f} s, {memory:.1f} GB")


if __name__ == "__main__":
    main()
