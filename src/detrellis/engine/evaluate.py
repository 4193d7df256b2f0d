"""COCO evaluation of a detector over a loader, on one process or many."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from detrellis.data.annotations import Annotations
from detrellis.data.loader import Batch, DetectionDataset, Loader, build_loader
from detrellis.data.sampler import EvalSampler
from detrellis.data.transforms import eval_transform
from detrellis.detector import Detector
from detrellis.engine.coco_eval import CocoEvaluator, EvalResult
from detrellis.engine.distributed import World, gather
from detrellis.recipes.config import DataConfig


def eval_loader(annotations: Annotations, config: DataConfig, batch_size: int, workers: int, world: World) -> Loader:
    """Every image once over all processes, resized as the recipe says."""
    transform = eval_transform(config.size, **config.resizing())
    sampler = EvalSampler(len(annotations), batch_size, rank=world.rank, world_size=world.size)
    pin = world.device.type == "cuda"
    return build_loader(DetectionDataset(annotations, transform), sampler, workers=workers, pin_memory=pin)


@torch.no_grad()
def collect(
    detector: Detector, batches: Iterable[Batch], annotations: Annotations, device: torch.device
) -> CocoEvaluator:
    """Run the detector over the batches; in every process the evaluator holds the detections of all."""
    was_training = detector.training
    detector.eval()
    evaluator = CocoEvaluator(annotations, top_k=detector.top_k)
    for batch in batches:
        batch = batch.to(device, non_blocking=True)
        evaluator.update(batch.image_ids, detector.detect(batch.images, batch.sizes))
    detector.train(was_training)
    others = gather(evaluator.arrays())
    if len(others) > 1:
        evaluator.merge(*others)
    return evaluator


def evaluate(
    detector: Detector, batches: Iterable[Batch], annotations: Annotations, device: torch.device
) -> EvalResult:
    """The twelve COCO statistics and each class's AP."""
    return collect(detector, batches, annotations, device).compute()
