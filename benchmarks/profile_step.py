"""Where the time of a training step goes:
the operators with the most self CPU time, and each part's share.

    python benchmarks/profile_step.py                          # the step of benchmarks/step.py
    python benchmarks/profile_step.py dino-r50 --size 320x320  # of a recipe, with its schemes

Random images and boxes, random weights, one thread. Operators inside a fused one (compiled pieces
of deformable attention) show up under the name of their kernel.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from detrellis.engine.bench import BOXES, parse_size
from detrellis.engine.measure import image_size
from detrellis.engine.optim import build_optimizer
from detrellis.recipes import find_recipe
from detrellis.recipes.build import build
from detrellis.recipes.config import OptimConfig
from detrellis.training import TrainableDetector
from detrellis.types import ImageBatch, Targets

CLASSES = 80


def recipe_step(
    args: argparse.Namespace,
) -> tuple[TrainableDetector, ImageBatch, Targets, OptimConfig]:
    """Model and batch of a recipe."""
    recipe = find_recipe(args.recipe).with_schemes(args.scheme).override(args.o)
    size = image_size(recipe) if args.size is None else parse_size(args.size)
    boxes = torch.rand(args.batch * BOXES, 4) * 0.3 + 0.2
    targets = Targets(torch.randint(CLASSES, (len(boxes),)), boxes, (BOXES,) * args.batch)
    model = build(recipe.untrained(), CLASSES).train()
    return model, ImageBatch(torch.randn(args.batch, 3, *size)), targets, recipe.optim


def peer_step() -> tuple[TrainableDetector, ImageBatch, Targets, OptimConfig]:
    """Model and batch of `benchmarks/step.py`."""
    from peers import SMALL, ours, theirs
    from step import OPTIM, batch, trainable

    pixels, targets = batch()
    return (
        trainable(ours(theirs("resnet18", SMALL))[0], proposals=False),
        ImageBatch(pixels),
        targets,
        OPTIM,
    )


class Parts:
    """CPU seconds of the forward pass of each part of the detector."""

    def __init__(self, model: TrainableDetector) -> None:
        self.seconds: dict[str, float] = {}
        self.started: dict[str, float] = {}
        for name in ("backbone", "neck", "encoder", "queries", "decoder"):
            part = getattr(model.detector, name)
            part.register_forward_pre_hook(
                lambda *_, name=name: self.started.update({name: time.process_time()})
            )
            part.register_forward_hook(lambda *_, name=name: self._stop(name))

    def _stop(self, name: str) -> None:
        self.seconds[name] = time.process_time() - self.started[name]


def stepper(
    model: TrainableDetector, images: ImageBatch, targets: Targets, optim: OptimConfig
) -> Callable[[], Tensor]:
    """One training step, with the seconds of its four stages."""
    optimizer = build_optimizer(model, optim)

    def step() -> Tensor:
        marks = [time.process_time()]
        optimizer.zero_grad(set_to_none=True)
        loss = torch.stack(list(model(images, targets).losses.values())).sum()
        marks.append(time.process_time())
        loss.backward()
        marks.append(time.process_time())
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip or float("inf"))
        marks.append(time.process_time())
        optimizer.step()
        marks.append(time.process_time())
        return torch.tensor(marks).diff()

    return step


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="default: the network of benchmarks/step.py")
    parser.add_argument("--size", help="short side, or HEIGHTxWIDTH (default: the recipe's)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--scheme", action="append", default=[])
    parser.add_argument("-o", action="append", default=[])
    parser.add_argument("--rows", type=int, default=25)
    parser.add_argument("--stack", action="store_true", help="group by the calling lines too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, images, targets, optim = peer_step() if args.recipe is None else recipe_step(args)
    step, parts = stepper(model, images, targets, optim), Parts(model)
    marks, forward = [], []
    for _ in range(5):
        marks.append(step())
        forward.append(torch.tensor(list(parts.seconds.values())))
    stages = torch.stack(marks[2:]).amin(0) * 1e3
    names = ("forward and losses", "backward", "clipping", "optimizer")
    print("ms: " + ", ".join(f"{n} {s:.0f}" for n, s in zip(names, stages.tolist(), strict=True)))
    shares = torch.stack(forward[2:]).amin(0) * 1e3
    print(
        "of the forward pass: "
        + ", ".join(f"{n} {s:.0f}" for n, s in zip(parts.seconds, shares, strict=True)),
        end="",
    )
    print(f", losses and the rest {float(stages[0] - shares.sum()):.0f}")
    with profile(
        activities=[ProfilerActivity.CPU], with_stack=args.stack, record_shapes=args.stack
    ) as found:
        step()
    averages = found.key_averages(
        group_by_stack_n=6 if args.stack else 0, group_by_input_shape=args.stack
    )
    print(
        averages.table(sort_by="self_cpu_time_total", row_limit=args.rows, max_name_column_width=60)
    )


if __name__ == "__main__":
    main()
