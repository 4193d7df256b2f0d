"""How fast a recipe runs here:
latency and throughput of inference, or of a training step, with random weights.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn

from detrellis.arguments import Classes, Runs, Threads, Warmup, checked
from detrellis.boxes import cxcywh_to_xyxy
from detrellis.data.masks import SIDE
from detrellis.distributed import pick_device
from detrellis.engine.measure import image_size
from detrellis.engine.optim import build_optimizer
from detrellis.errors import UserError
from detrellis.nn.compiled_layers import compile_layers, eager
from detrellis.nn.compiler import import_compiler
from detrellis.nn.deformable import DeformableAttention
from detrellis.nn.kernels.deformable_cpu import path_taken
from detrellis.precision import autocast, check_bfloat16, has_bfloat16
from detrellis.recipes.build import build
from detrellis.recipes.config import Recipe
from detrellis.training import TrainableDetector
from detrellis.types import ImageBatch, Targets

Task = Literal["inference", "half", "training step"]
BOXES = 7  # of each image in a training step: COCO's average
# Width to height of an image that only its short side describes, as the papers count
LANDSCAPE = 1333 / 800


@dataclass(frozen=True)
class Timing:
    """The wall-clock times of the whole pass at one batch size,
    and what follows from their median.
    """

    batch_size: int
    median_ms: float
    fastest_ms: float
    images_per_second: float  # at the median
    peak_mib: float | None  # GPU memory that tensors took at most; None on other devices
    # The median without torch.compile, taking turns with it, and how many times as fast compiling
    # makes the pass; None where nothing is compiled
    eager_ms: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class BenchResult:
    """What was timed, on which machine, and the times."""

    recipe: str
    task: str  # "inference" or "training step"
    image_size: tuple[int, int]  # height, width; no image is padded
    classes: int
    device: str
    threads: int
    compiled: bool
    bfloat16: bool  # whether products were computed in it
    attention: str | None  # how deformable attention was computed; None where there is none
    warmup: int
    runs: int
    timings: tuple[Timing, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON holds it."""
        return asdict(self)

    def about(self) -> str:
        """A line that says what was timed, and how."""
        height, width = self.image_size
        parts = [
            (
                f"{self.recipe}, {self.task}, {width}x{height} pixels, {self.device}, "
                f"{self.threads} CPU threads"
            )
        ]
        parts += ["compiled"] if self.compiled else []
        parts += ["products in bfloat16"] if self.bfloat16 else []
        parts.append(f"{self.runs} runs after {self.warmup} to warm up")
        parts += [] if self.attention is None else [f"deformable attention: {self.attention}"]
        return "; ".join(parts)

    def verdict(self) -> str | None:
        """A line where compiling makes it slower."""
        slower = [t.batch_size for t in self.timings if t.speedup is not None and t.speedup < 1]
        if not slower:
            return None
        batches = ", ".join(map(str, slower))
        return f"Compiled is slower than eager here (batch {batches}): leave --compile out."

    def table(self) -> Table:
        """A table of the times for a rich console."""
        memory = any(t.peak_mib is not None for t in self.timings)
        titles = ["batch", "median", "fastest", "images/s"]
        titles += ["eager", "speedup"] if self.compiled else []
        titles += ["peak memory"] if memory else []
        table = Table(*titles)
        for t in self.timings:
            row = [
                str(t.batch_size),
                f"{t.median_ms:.1f} ms",
                f"{t.fastest_ms:.1f} ms",
                f"{t.images_per_second:.2f}",
            ]
            row += [] if t.eager_ms is None else [f"{t.eager_ms:.1f} ms", f"{t.speedup:.2f}x"]
            row += [] if t.peak_mib is None else [f"{t.peak_mib:.0f} MiB"]
            table.add_row(*row)
        return table


def parse_size(text: str | int | tuple[int, int]) -> tuple[int, int]:
    """Height and width from `"640x480"` (height first),
    a pair, or the short side of the papers' landscape image.
    """
    if not isinstance(text, tuple):
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(text).strip().lower())
        if match is None:
            raise UserError(
                f"image size {text!r}",
                "Write a short side, or HEIGHTxWIDTH: --size 640, --size 640x480.",
            )
        short = int(match[1])
        text = (short, int(match[2]) if match[2] else round(short * LANDSCAPE))
    if min(text) < 32:
        raise UserError(
            f"image size {text[0]}x{text[1]}",
            "Take 32 pixels or more: that is one cell of the last map.",
        )
    return text


def parse_batch_sizes(text: str | int | Sequence[int]) -> list[int]:
    """Batch sizes from `"1,2"`, a number or numbers."""
    given = text.split(",") if isinstance(text, str) else [text] if isinstance(text, int) else text
    try:
        sizes = [int(part) for part in given]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UserError(
            f"batch sizes {text!r}", "Write positive numbers with commas: --batch-sizes 1,2."
        )
    return sizes


@checked
def bench_recipe(
    recipe: Recipe,
    classes: Classes,
    *,
    batch_sizes: str | int | Sequence[int] = 1,
    size: str | int | tuple[int, int] | None = None,
    threads: Threads | None = None,
    compiled: bool = False,
    task: Task = "inference",
    runs: Runs = 10,
    warmup: Warmup = 2,
    device: str | None = None,
) -> BenchResult:
    """As `detrellis.bench`, of a recipe that is chosen. Warming up also pays for what is compiled.

    Inference is `Detector.detect` of a fused detector: images to sorted boxes; `half` is the same
    with products in bfloat16. A training step is forward, losses on random targets, backward,
    clipping and the optimizer, with the recipe's schemes. Random weights change no time. What is
    compiled takes turns with the same as it was, in one process and on the same images.
    """
    target, pixels = pick_device(device), image_size(recipe) if size is None else parse_size(size)
    train, half = task == "training step", task == "half"
    if half:
        check_bfloat16(target)
    model = build(recipe.untrained(), classes).to(target).train(train)
    if not train:
        model.detector = model.detector.fused()
    if compiled:
        _compile(model, target, train)
    make = partial(step_on, recipe, classes) if train else partial(_inference, half)
    with threads_of(threads):
        used, timings = torch.get_num_threads(), []
        for batch in parse_batch_sizes(batch_sizes):
            images = ImageBatch(torch.randn(batch, 3, *pixels, device=target))
            timings.append(_time(make(model, images), batch, target, runs, warmup, compiled))
    name = torch.cuda.get_device_name(target) if target.type == "cuda" else target.type
    deformable = any(isinstance(module, DeformableAttention) for module in model.detector.modules())
    attention = path_taken() if deformable else None
    half |= train and recipe.optim.amp and has_bfloat16(target)
    timed = "training step" if train else "inference"
    about = (recipe.name, timed, pixels, classes, name, used, compiled, half, attention)
    return BenchResult(*about, warmup, runs, tuple(timings))


def _compile(model: TrainableDetector, device: torch.device, train: bool) -> None:
    """Compile the whole detector where it runs whole, and in training what `optim.compile` does."""
    if train:
        compile_layers(model, device)
    else:
        import_compiler()
        model.detector.compile()


def _inference(half: bool, model: TrainableDetector, images: ImageBatch) -> Callable[[], object]:
    height, width = images.pixels.shape[-2:]
    device = images.pixels.device
    sizes = torch.tensor([[height, width]] * len(images.pixels), device=device)

    def detect() -> object:
        with autocast(device, half):
            return model.detector.detect(images, sizes)

    return detect


def training_step(
    recipe: Recipe, classes: int, device: torch.device, boxes: int = BOXES
) -> Callable[[], object]:
    """A step of the recipe on one random batch of its own size and number of images, with `boxes`
    of each; call it to train a step with random weights."""
    images = ImageBatch(torch.randn(recipe.optim.batch_size, 3, *image_size(recipe), device=device))
    return step_on(
        recipe, classes, build(recipe.untrained(), classes).to(device).train(), images, boxes
    )


def step_on(
    recipe: Recipe,
    classes: int,
    model: TrainableDetector,
    images: ImageBatch,
    count: int = BOXES,
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[[], object]:
    """A step of the model on these images with `count` random boxes of each;
    call it to train. Without an `optimizer` it has one of its own."""
    batch, device = len(images.pixels), images.pixels.device
    boxes = torch.rand(batch * count, 4, device=device) * 0.3 + 0.2
    labels = torch.randint(classes, (batch * count,), device=device)
    masks = (
        torch.ones(len(boxes), SIDE, SIDE, dtype=torch.bool, device=device)
        if recipe.needs_masks
        else None
    )
    bitmaps = _rectangles(boxes, *images.pixels.shape[-2:]) if recipe.needs_bitmaps else None
    targets = Targets(labels, boxes, (count,) * batch, masks, bitmaps)
    optimizer = build_optimizer(model, recipe.optim) if optimizer is None else optimizer

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, recipe.optim.amp):
            losses, _ = model(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        if recipe.optim.clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip)
        optimizer.step()

    return step


def _rectangles(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes `(T, 4)` as bitmaps `(T, height, width)`."""
    left, top, right, bottom = cxcywh_to_xyxy(boxes).unsqueeze(-1).unbind(1)
    x, y = (torch.arange(side, device=boxes.device) / side for side in (width, height))
    return ((y >= top) & (y < bottom)).unsqueeze(2) & ((x >= left) & (x < right)).unsqueeze(1)


def _time(
    run: Callable[[], object],
    batch: int,
    device: torch.device,
    runs: int,
    warmup: int,
    compiled: bool,
) -> Timing:
    """What is compiled takes turns with the same as it was, so that what else the machine does
    slows both.
    """
    passes, without = [], []
    for _ in range(warmup + runs):
        if compiled:
            with eager():
                without.append(_pass(run, device)[0])
        passes.append(_pass(run, device))
    timed, peaks = zip(*passes[warmup:], strict=True)
    median = statistics.median(timed)
    timing = Timing(
        batch,
        round(median, 3),
        round(min(timed), 3),
        round(batch / median * 1000, 3),
        max((peak for peak in peaks if peak is not None), default=None),
    )
    if not compiled:
        return timing
    eager_ms = statistics.median(without[warmup:])
    return replace(timing, eager_ms=round(eager_ms, 3), speedup=round(eager_ms / median, 2))


def _pass(run: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Milliseconds, and MiB that it took of a GPU's memory at most."""
    if device.type != "cuda":
        return seconds_of(run, device) * 1000, None
    torch.cuda.reset_peak_memory_stats(device)
    milliseconds = seconds_of(run, device) * 1000
    return milliseconds, round(torch.cuda.max_memory_allocated(device) / 2**20, 1)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of a call. A GPU works on after the call has returned:
    it is waited for, before and after.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    """Compute with `count` CPU threads within the block; None leaves their number as it is."""
    if count is not None and count < 1:
        raise UserError(f"{count} threads", "Take 1 or more.")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
