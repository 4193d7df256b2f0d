"""transformers' RT-DETR, of the size of `small` and on the same pretrained features, trained as
`small` is: the peer of docs/experiments/small.md.

    python benchmarks/peer_training.py DATA [--epochs 12] [--scratch] [--seed 0] [-o FIELD=VALUE]

Its network, losses, matching and denoising are transformers'. The images, their augmentation and
order, the optimizer, the schedule, the averaged weights and the evaluation are those that
`detrellis train small` has, so that only the detectors differ. It prints AP after every fourth
epoch and after the last.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
from torch import Tensor, nn

from detrellis.data.annotations import Annotations
from detrellis.data.batch import Batch, Normalise
from detrellis.data.layout import find_data
from detrellis.data.loader import build_loader
from detrellis.data.records import to_annotations
from detrellis.data.sampler import BatchSampler
from detrellis.detector import padded_to_multiple
from detrellis.distributed import World
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.ema import EMA
from detrellis.engine.evaluate import eval_loader
from detrellis.engine.optim import build_optimizer, schedule_factor, set_learning_rate
from detrellis.engine.samples import training_dataset
from detrellis.nn.backbone import TimmBackbone
from detrellis.postprocess import Postprocess
from detrellis.recipes import find_recipe
from detrellis.recipes.build_backbone import pretrained_source, starting_from
from detrellis.types import DecoderOutput, ImageBatch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import transformers

transformers.logging.set_verbosity_error()
SIZES: dict[str, Any] = {  # of `small`, where the two have something in common
    "d_model": 128,
    "encoder_hidden_dim": 128,
    "encoder_ffn_dim": 512,
    "encoder_in_channels": [40, 112, 320],
    "encoder_attention_heads": 8,
    "hidden_expansion": 0.5,
    "decoder_in_channels": [128, 128, 128],
    "decoder_layers": 3,
    "decoder_ffn_dim": 512,
    "decoder_attention_heads": 8,
    "num_queries": 100,
}
COARSEST_STRIDE = 32  # pixels; its encoder takes whole cells alone
POSTPROCESS = Postprocess(top_k=100)


class Peer(nn.Module):
    """RT-DETR on EfficientNet-Lite0, with the call of a detector for `evaluate`."""

    def __init__(self, classes: int, *, scratch: bool) -> None:
        super().__init__()
        config = find_recipe("small").detector.backbone
        backbone = transformers.TimmBackboneConfig(
            backbone=config.name, out_indices=[2, 3, 4], use_pretrained_backbone=False
        )
        self.network = transformers.RTDetrForObjectDetection(
            transformers.RTDetrConfig(
                backbone_config=backbone,
                freeze_backbone_batch_norms=False,
                num_labels=classes,
                **SIZES,
            )
        )
        if not scratch:
            ours = TimmBackbone(
                config.name, (8, 16, 32), pretrained=pretrained_source(config), norm="batch"
            )
            (holder,) = (m for m in self.network.modules() if hasattr(m, "_backbone"))
            holder._backbone.load_state_dict(ours.model.state_dict())

    def losses(self, batch: Batch) -> Tensor:
        """The training loss. It knows no padding,
        so that its boxes are relative to the padded image.
        """
        images, targets = padded_to_multiple(batch.images, COARSEST_STRIDE), batch.targets
        scaled = targets.boxes * valid_part(images)[targets.image].repeat(1, 2)
        split = zip(targets.labels.split(targets.sizes), scaled.split(targets.sizes), strict=True)
        labels = [{"class_labels": classes, "boxes": boxes} for classes, boxes in split]
        loss: Tensor = self.network(pixel_values=images.pixels, labels=labels).loss
        return loss

    def detections(self, batch: Batch) -> Any:
        """The best detections of each image, as COCO counts them."""
        images = padded_to_multiple(batch.images, COARSEST_STRIDE)
        output = self.network(pixel_values=images.pixels)
        boxes = output.pred_boxes / valid_part(images)[:, None].repeat(1, 1, 2)
        states = boxes.new_zeros(1, *boxes.shape[:2], 0)  # nobody reads them
        return POSTPROCESS(DecoderOutput(output.logits[None], boxes[None], states), batch.sizes)


def valid_part(images: ImageBatch) -> Tensor:
    """(B, 2) fraction of the padded width and height that each image fills."""
    padding = images.padding
    if padding is None:
        return torch.ones(len(images.pixels), 2)
    return torch.stack([(~padding[:, 0]).float().mean(1), (~padding[:, :, 0]).float().mean(1)], 1)


def train(
    peer: Peer, train_set: Annotations, val_set: Annotations, args: argparse.Namespace
) -> None:
    """Train and evaluate it as a run of `small` would be."""
    changes = [f"schedule.epochs={args.epochs}", *args.override]
    recipe = starting_from(find_recipe("small").override(changes))[0]
    optim, schedule, data = recipe.optim, recipe.schedule, recipe.data
    # The same batches in the same order.
    sampler = BatchSampler(
        len(train_set), optim.batch_size, seed=args.seed, group_by_aspect=train_set.sizes
    )
    normalise = Normalise.of(**data.statistics())
    loader = build_loader(
        training_dataset(train_set, recipe, args.seed), sampler, normalise=normalise
    )
    val = eval_loader(val_set, data, 4, 0, World(0, 1, torch.device("cpu")))
    optimizer, average = build_optimizer(peer, optim), EMA(peer, optim.ema)
    started, step, steps = time.monotonic(), 0, len(sampler) * schedule.epochs
    for epoch in range(schedule.epochs):
        peer.train()
        sampler.set_position(epoch)
        for batch in loader:
            set_learning_rate(optimizer, optim.lr * schedule_factor(step, steps, schedule))
            torch.manual_seed(step)
            optimizer.zero_grad(set_to_none=True)
            peer.losses(batch).backward()
            nn.utils.clip_grad_norm_(peer.parameters(), optim.clip)
            optimizer.step()
            step += 1
            average.update(peer, step)
        if (epoch + 1) % 4 == 0 or epoch + 1 == schedule.epochs:
            stats = evaluate(average.detector, val, val_set)
            minutes = (time.monotonic() - started) / 60
            print(
                (
                    f"epoch {epoch + 1}  AP {stats['AP']:.3f}  AP50 {stats['AP50']:.3f}  "
                    f"{minutes:.1f} min"
                ),
                flush=True,
            )


@torch.inference_mode()
def evaluate(peer: Any, val: Any, val_set: Annotations) -> Any:
    """COCO's statistics of the averaged network."""
    evaluator = CocoEvaluator(val_set, top_k=POSTPROCESS.top_k)
    for batch in val:
        evaluator.update(batch.image_ids, peer.detections(batch))
    return evaluator.compute().stats


def main() -> None:
    """Read the data set, build the peer, and train it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", action="store_true", help="random weights")
    parser.add_argument(
        "-o", dest="override", action="append", default=[], help="a field of the recipe `small`"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    source = find_data(args.data)
    train_set, val_set = (to_annotations(source.load(split)) for split in ("train", "val"))
    peer = Peer(len(train_set.classes.names), scratch=args.scratch)
    trained = sum(p.numel() for p in peer.parameters() if p.requires_grad)
    print(f"{trained:,} trained parameters, {len(train_set)} images, {args}", flush=True)
    train(peer, train_set, val_set, args)


if __name__ == "__main__":
    main()
