"""How many images fit into a training step:
tried in a process of its own, which then gives all its memory back.

`python -m detrellis.engine.trial` reads what `auto_batch` asks from the standard input and prints
the number. On a GPU steps are taken until one is out of memory. On a CPU, where the system would
end the process, the peaks of one image and of two say what each further one takes.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from detrellis.engine.auto_batch import MAX_IMAGES
from detrellis.engine.bench import step_on
from detrellis.engine.ema import EMA
from detrellis.engine.optim import build_optimizer
from detrellis.errors import UserError
from detrellis.recipes.build import build
from detrellis.recipes.config import Recipe
from detrellis.types import ImageBatch

USED = 0.8  # of the memory that is left; libraries, fragments and evaluations take some too
AHEAD = 2  # batches that each worker has ready
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")

Step = Callable[[int], object]  # a training step on so many images


def trial_step(
    recipe: Recipe, classes: int, worst: tuple[int, int, int], device: torch.device, processes: int
) -> Step:
    """A step of all that a run has in memory, with random weights:
    `worst` is height, width and boxes of each image.
    """
    height, width, boxes = worst
    model = build(recipe.untrained(), classes).to(device).train()
    if recipe.schedule.unfreeze_after:  # the worst is to come
        model.detector.backbone.hold(False)
    optimizer = build_optimizer(model, recipe.optim)
    average = EMA(model.detector, recipe.optim.ema) if recipe.optim.ema > 0 else None
    # DDP's
    buckets = [torch.ones_like(p) for p in model.parameters() if p.requires_grad and processes > 1]

    def step(count: int) -> object:
        padding = torch.zeros(count, height, width, dtype=torch.bool, device=device)
        padding[:, -1] = True
        images = ImageBatch(torch.randn(count, 3, height, width, device=device), padding)
        step_on(recipe, classes, model, images, boxes, optimizer)()
        return average, buckets

    return step


def fitting_on_gpu(step: Step, device: torch.device) -> int:
    """The most images with which a step is not out of memory."""
    free, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(USED * free / total, device)

    def fits(count: int) -> bool:
        try:
            for _ in range(2):  # the first one makes the optimizer's moments
                step(count)
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    return largest(fits, MAX_IMAGES)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, 0 where 1 does not:
    doubled while it does, then halved between.
    """
    good, bad = 0, 1
    while bad <= limit and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, limit + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def fitting_on_cpu(step: Step, room: float, loaded: int, peak: Callable[[], int]) -> int:
    """The most images whose step stays within `room` bytes,
    with `loaded` bytes of each image in the loader.

    `peak` is the most memory that this process has had. Where one image takes all the room, two are
    not tried.
    """
    for _ in range(2):  # the first one makes the optimizer's moments
        step(1)
    one = peak()
    if one + loaded > room:
        return 0
    step(2)
    each = max(peak() - one, loaded)
    return min(1 + int((room - one - loaded) / (each + loaded)), MAX_IMAGES)


def available() -> int:
    """Bytes that this machine, or the container, has left.
    `UserError` where the system does not say so.
    """
    try:
        left = _kib(MEMINFO, "MemAvailable")
    except (OSError, ValueError):
        raise UserError("this system does not say how much memory is left") from None
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        left = min(left, limit - used + int(stat["inactive_file"]))
    return left


def _kib(file: Path, name: str) -> int:
    """Bytes of a line of /proc, which counts in KiB."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(name)
    return int(match[1]) * 1024


def main(request: dict[str, Any]) -> int:
    """The number of images that fit."""
    recipe, device = Recipe.checked(request["recipe"]), torch.device(request["device"])
    height, width, boxes = request["worst"]
    status = Path("/proc/self/status")
    room = (
        0.0
        if device.type == "cuda"
        else USED * available() / request["here"] + _kib(status, "VmRSS")
    )
    step = trial_step(
        recipe, request["classes"], (height, width, boxes), device, request["processes"]
    )
    if device.type == "cuda":
        return fitting_on_gpu(step, device)
    loaded = (1 + AHEAD * request["workers"]) * 3 * height * width * 4
    return fitting_on_cpu(step, room, loaded, lambda: _kib(status, "VmHWM"))


if __name__ == "__main__":
    try:
        print(main(json.load(sys.stdin)))
    except UserError as error:
        sys.exit(error.message)
