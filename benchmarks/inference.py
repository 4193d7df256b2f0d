"""Inference side by side, one image of 640x640 pixels on one thread,
from pixels to logits and boxes.

    python benchmarks/inference.py [--bfloat16]

Deformable DETR of `transformers` (two-stage, box refinement, ResNet-50, six layers, 900 queries,
feed-forward 2048), the same network in Detrellis with the same weights, whose outputs must be equal
before anything is timed, and `dino-r50`, which has the same sizes; ours fused, as `predict` runs
them.
"""

from __future__ import annotations

import torch
from common import Row, arguments, autocast, describe, finish, interleaved, least_seconds
from peers import FULL, ours, theirs

from detrellis.recipes import find_recipe
from detrellis.recipes.network import build_detector
from detrellis.types import ImageBatch

CLASSES = 80


@torch.no_grad()
def compare(rounds: int, side: int, bfloat16: bool) -> list[Row]:
    """Times all three side by side and prints what they take."""
    peer = theirs("resnet50", FULL).eval()
    same = ours(peer)[0].eval().fused()
    dino = build_detector(find_recipe("dino-r50").untrained().detector, CLASSES).eval().fused()
    pixels = torch.randn(1, 3, side, side)
    mask = torch.ones(1, side, side, dtype=torch.long)
    variants = {
        "transformers": lambda: peer(pixel_values=pixels, pixel_mask=mask),
        "same network": lambda: same(ImageBatch(pixels)),
        "dino-r50": lambda: dino(ImageBatch(pixels)),
    }
    wanted, found = variants["transformers"](), variants["same network"]()
    # Proposals whose scores are equal to the last bits may be ranked either way: each query needs
    # its counterpart.
    rows = [
        torch.cat(pair, -1)[0]
        for pair in ((found.logits[0], found.boxes[0]), (wanted.logits, wanted.pred_boxes))
    ]
    apart = torch.cdist(*rows, p=torch.inf).amin(1)
    assert apart.max() < 1e-3, (
        f"{int((apart >= 1e-3).sum())} of {len(apart)} queries have no counterpart"
    )
    print(
        f"largest difference of a query's logits and box from its counterpart's: {apart.max():.1e}"
    )
    with autocast(bfloat16):
        seconds = interleaved(variants, rounds, warmup=1)
    for name, values in seconds.items():
        print(describe(name, values, "image"))
    if not bfloat16:
        print(least_seconds(variants["same network"]))
    medians = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    return [
        Row(
            f"{name} at {side} px against transformers",
            medians["transformers"] / medians[name],
            1.5,
            "x",
            at_least=True,
        )
        for name in ("dino-r50", "same network")
    ]


def main() -> None:
    """See the top of the file."""
    parser = arguments(__doc__, bfloat16=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=640)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    finish(compare(args.rounds, args.side, args.bfloat16), args.json)


if __name__ == "__main__":
    main()
