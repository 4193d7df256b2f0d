"""AP of a run's best weights with images as they are, and padded to multiples of 32 pixels:
docs/experiments/small.md, "Whole cells".

    python benchmarks/whole_cells.py RUN DATA
"""

from __future__ import annotations

import argparse

import torch

import detrellis
from detrellis.data.layout import find_data
from detrellis.data.records import to_annotations
from detrellis.distributed import World
from detrellis.engine.evaluate import collect, eval_loader


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("data")
    args = parser.parse_args()
    model, device = detrellis.load(args.run, device="cpu"), torch.device("cpu")
    val = to_annotations(find_data(args.data).load("val"))
    loader = eval_loader(val, model.recipe.data, 4, 0, World(0, 1, device))
    for divisor in (1, 32):
        model.detector.size_divisor = divisor
        (evaluator,) = collect(model.detector, loader, val, device)
        stats = evaluator.compute().stats
        print(f"multiples of {divisor}: AP {stats['AP']:.3f}  AP50 {stats['AP50']:.3f}", flush=True)


if __name__ == "__main__":
    main()
