"""RT-DETR-R18 side by side with `transformers`:
inference and a training step at 640x640 pixels on one thread.

    python benchmarks/realtime.py [--rounds N] [--side PIXELS] [--bfloat16]

Both have the same random weights, which go through the converter that users have. Before anything
is timed, boxes and losses have to be equal. Inference is from pixels to logits and boxes, ours of
the fused detector, as `predict` runs it. A step is forward, losses on the same targets, and
backward, without denoising, whose noise the two draw differently; BatchNorm's statistics of the
backbone stand still in transformers and in ours. At the end it says what of a step the two have to
compute alike.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Row, arguments, autocast, describe, finish, interleaved, least_seconds
from peers import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from detrellis.interop.load import load_foreign
from detrellis.recipes.build import build
from detrellis.training import TrainableDetector
from detrellis.types import ImageBatch, Targets

CLASSES, BOXES = 80, 7
BUDGETS = {"inference": 1.3, "training step": 1.5}
ALIKE = {  # ends of the names of operators
    "convolutions": (
        "::mkldnn_convolution",
        "::convolution_backward",
        "::_slow_conv2d_forward",
        "::_slow_conv2d_backward",
    ),
    "matrix products": ("::_linear_pointwise", "::mm", "::addmm", "::bmm"),
}


def theirs() -> Any:
    """RT-DETR-R18 as published, with random weights."""
    backbone = transformers.RTDetrResNetConfig(
        layer_type="basic",
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[128, 256, 512],
        hidden_expansion=0.5,
        decoder_layers=3,
        num_denoising=0,
        num_labels=CLASSES,
    )
    torch.manual_seed(0)
    model = transformers.RTDetrForObjectDetection(config)
    with torch.no_grad():
        for part in model.modules():
            # As they are drawn, no picture reaches the encoder
            if isinstance(part, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(part.weight)
            elif isinstance(part, torch.nn.BatchNorm2d):
                torch.nn.init.ones_(part.weight)
        for name, parameter in model.named_parameters():
            if "backbone" not in name and "norm" not in name:
                parameter += 0.02 * torch.randn_like(parameter)
    return model


def ours(model: Any) -> TrainableDetector:
    """The same network with the same weights,
    trained as the converter's recipe says, without schemes.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = load_foreign(Path(folder))
    recipe = found.recipe.with_schemes(["none"]).override(
        [
            "detector.backbone.norm=frozen",
            "detector.decoder.refine=detached",
            "detector.queries.empty_compete=true",
        ]
    )
    trained = build(recipe, CLASSES)
    weights = {
        name: value
        for name, value in found.weights.items()
        if name in trained.detector.state_dict()
    }
    trained.detector.load_state_dict(weights)
    return trained


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest of a query's outputs from those of its counterpart:
    equal proposals may be ranked either way.
    """
    return float(torch.cdist(found, wanted, p=torch.inf).amin(1).max())


@torch.no_grad()
def inference(
    peer: Any, same: TrainableDetector, pixels: Tensor, rounds: int, bfloat16: bool
) -> Row:
    """One image."""
    peer.eval(), same.eval()
    fused = same.detector.fused()
    variants = {
        "transformers": lambda: peer(pixel_values=pixels[:1]),
        "ours, fused": lambda: fused(ImageBatch(pixels[:1])),
        "ours, as trained": lambda: same.detector(ImageBatch(pixels[:1])),
    }
    wanted, found = variants["transformers"](), variants["ours, fused"]()
    apart = difference(
        *(
            torch.cat(p, -1)[0]
            for p in ((found.logits[0], found.boxes[0]), (wanted.logits, wanted.pred_boxes))
        )
    )
    print(f"largest difference of a query's logits and box from its counterpart's: {apart:.1e}")
    assert apart < 1e-3
    with autocast(bfloat16):
        return timed("inference", variants, rounds)


def training(
    peer: Any, same: TrainableDetector, pixels: Tensor, rounds: int, bfloat16: bool
) -> Row:
    """A batch."""
    peer.train(), same.train()
    generator = torch.Generator().manual_seed(1)
    count = len(pixels) * BOXES
    classes = torch.randint(CLASSES, (count,), generator=generator)
    boxes = torch.rand(count, 4, generator=generator) * 0.3 + 0.2
    targets = Targets(classes, boxes, (BOXES,) * len(pixels))
    labels = [
        {"class_labels": c, "boxes": b}
        for c, b in zip(classes.split(BOXES), boxes.split(BOXES), strict=True)
    ]

    def their_step(bfloat16: bool = False) -> float:
        peer.zero_grad()
        with autocast(bfloat16):
            loss = peer(pixel_values=pixels, labels=labels).loss
        loss.backward()
        return float(loss.detach())

    def our_step(bfloat16: bool = False) -> float:
        same.zero_grad()
        with autocast(bfloat16):
            losses = same(ImageBatch(pixels), targets).losses
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        return float(total.detach())

    state = {k: v.clone() for k, v in same.detector.state_dict().items()}
    wanted, found = their_step(), our_step()
    same.detector.load_state_dict(state)
    print(f"loss {found:.6f}, of transformers {wanted:.6f}")
    assert abs(found - wanted) < 1e-3 * wanted
    steps = {"transformers": their_step, "ours": our_step}
    variants = {name: partial(step, bfloat16) for name, step in steps.items()}
    row = timed("training step", variants, rounds)
    for name, step in variants.items():
        print(f"{name:16} {shares(step)}")
    if not bfloat16:
        print(least_seconds(our_step))
    return row


def shares(step: Callable[[], object]) -> str:
    """Of one step, by the profiler: what both sides have to compute alike."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    total, parts = 0.0, Counter[str]()
    for operator in seen.key_averages():
        seconds = operator.self_cpu_time_total / 1e6
        total += seconds
        parts.update(
            {kind: seconds for kind, names in ALIKE.items() if operator.key.endswith(names)}
        )
    said = ", ".join(f"{kind} {seconds / total:.0%}" for kind, seconds in parts.items())
    return f"{total:.2f} s in operators: {said}"


def timed(what: str, variants: dict[str, Any], rounds: int) -> Row:
    """The ratio of the first two."""
    print(what)
    seconds = interleaved(variants, rounds, warmup=1)
    for name, values in seconds.items():
        print(describe(name, values, "pass"))
    first, second = (sorted(values)[len(values) // 2] for values in list(seconds.values())[:2])
    return Row(
        f"rtdetr-r18, {what}, against transformers",
        first / second,
        BUDGETS[what],
        "x",
        at_least=True,
    )


def main() -> None:
    """See the top of the file."""
    parser = arguments(__doc__, bfloat16=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=640)
    parser.add_argument("--batch", type=int, default=2, help="images of a training step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    peer = theirs()
    same = ours(peer)
    pixels = torch.rand(
        args.batch, 3, args.side, args.side, generator=torch.Generator().manual_seed(2)
    )
    rows = [part(peer, same, pixels, args.rounds, args.bfloat16) for part in (inference, training)]
    finish(rows, args.json)


if __name__ == "__main__":
    main()
