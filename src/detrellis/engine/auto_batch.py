"""`--auto-batch`: as many images at a time as fit into memory.

The images of an optimizer step, `optim.batch_size`, and with them the learning rate stay what the
recipe or the user says. What is chosen is `optim.accumulate`, in how many passes they are taken,
which the run's recipe then holds: who resumes or reproduces the run tries nothing. What has to fit
is the worst step that the data set and its augmentation can make, which `trial` takes in a process
of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from detrellis.data.annotations import Annotations
from detrellis.data.augmentation import PASTED, Augmentation, Mixing
from detrellis.data.lsj import LargeScaleJitter
from detrellis.data.transforms import DetrAugment, FixedAugment, Resize, Transform
from detrellis.distributed import World, reduce_max
from detrellis.engine.batches import batch_per_process
from detrellis.engine.samples import augmentation_of, counted_labels
from detrellis.errors import UserError
from detrellis.recipes.config import Recipe

MAX_IMAGES = 256  # images: more at a time are of no use
ACCUMULATE = "optim.accumulate"
BY_HAND = "Choose by hand: -o optim.accumulate=N, passes a step."


class WorstStep(NamedTuple):
    """The most that a training step can be given:
    height and width of its batch in pixels, and boxes of each image.
    """

    height: int
    width: int
    boxes: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height} pixels with {self.boxes} boxes"


def worst_step(annotations: Annotations, recipe: Recipe) -> WorstStep:
    """The largest batch that the augmentation can make of a data set,
    each image as full as the fullest can become.
    """
    augmentation, sizes = augmentation_of(recipe), np.unique(annotations.sizes, axis=0)
    extents = np.array([_extent(each, sizes) for each in (augmentation.calm, *augmentation.strong)])
    height, width = map(int, extents.max(axis=0))
    boxes = int(np.diff(counted_labels(annotations)[0]).max(initial=0))
    return WorstStep(height, width, max(_fullest(boxes, augmentation), 1))


def _extent(transform: Transform | Mixing, sizes: NDArray[np.int64]) -> tuple[int, int]:
    """Height and width of the largest batch of images of these sizes, `(I, 2)`:
    the tallest beside the widest.
    """
    if isinstance(transform, DetrAugment):
        # A crop may be as narrow, or as flat, as the ends of its range allow.
        aspect = max(
            transform.crop_range[1] / transform.crop_range[0],
            (sizes.max(axis=1) / sizes.min(axis=1)).max(),
        )
        long = min(transform.max_size, round(max(transform.sides) * aspect))
        return long, long
    if isinstance(transform, LargeScaleJitter):
        return transform.pad_to
    resize = transform.each.frame if isinstance(transform, Mixing) else transform
    resize = resize.resize if isinstance(resize, FixedAugment) else resize
    assert isinstance(resize, Resize)
    extents = np.array([_resized(resize, *size) for size in sizes.tolist()])
    return int(extents[:, 0].max()), int(extents[:, 1].max())


def _resized(resize: Resize, height: int, width: int) -> tuple[int, int]:
    size = resize.facing(height, width).size
    return resize.target(height, width) if isinstance(size, int) else size


def _fullest(boxes: int, augmentation: Augmentation) -> int:
    """Boxes that an image can have, where those of the data set have at most `boxes`."""
    pasted = augmentation.large_scale is not None and augmentation.large_scale.copy_paste > 0
    counts = [2 * boxes if pasted else boxes]
    for each in augmentation.strong:
        if isinstance(each, Mixing):
            strong = each.strong
            alone = boxes + (PASTED if strong.copy_paste else 0)
            counts.append((4 * boxes if strong.mosaic else alone) * (2 if strong.mixup else 1))
    return max(counts)


def with_auto_batch(
    recipe: Recipe, training: Annotations, world: World, workers: int
) -> tuple[Recipe, str]:
    """The recipe with as few passes a step as fit into memory, and what that became, in words.

    Every process has to call it; the first one tries for all. Raises `UserError` where not one
    image fits.
    """
    if recipe.optim.fully_shard and world.size > 1:
        raise UserError(
            "--auto-batch with optim.fully_shard: what a process holds depends on the others",
            BY_HAND,
        )
    share = batch_per_process(recipe.override(f"{ACCUMULATE}=1"), world)
    worst = worst_step(training, recipe)
    classes = len(training.classes)
    tried = images_that_fit(recipe, classes, worst, world, workers) if world.is_main_process else 0
    fit = reduce_max(tried, world.device)
    if fit < 1:
        raise UserError(
            f"--auto-batch: a step with one image of {worst} does not fit into the memory of "
            f"{world.device}",
            "Take -o optim.checkpointing=true, a smaller -o data.size or fewer --workers, or end "
            "other programs.",
        )
    each = max(count for count in range(1, min(fit, share) + 1) if share % count == 0)
    return recipe.override(f"{ACCUMULATE}={share // each}"), _describe(
        recipe, worst, fit, each, share // each, world
    )


def _describe(
    recipe: Recipe, worst: WorstStep, fit: int, each: int, passes: int, world: World
) -> str:
    processes = "" if world.size == 1 else f" in each of {world.size} processes"
    more = " or more" if fit == MAX_IMAGES else ""
    return (
        f"--auto-batch: {fit}{more} images of {worst} fit at a time. A step takes its "
        f"{recipe.optim.batch_size} images in {passes} {'pass' if passes == 1 else 'passes'} of "
        f"{each}{processes} ({ACCUMULATE}={passes}); the learning rate stays {recipe.optim.lr:g}"
    )


def refuse_both(settings: str | Sequence[str]) -> None:
    """Raises `UserError` where a user sets what `--auto-batch` is there to find."""
    for text in [settings] if isinstance(settings, str) else settings:
        if text.partition("=")[0].strip() == ACCUMULATE:
            raise UserError(
                f"--auto-batch and -o {text}: both say how many images are taken at a time",
                "Drop one.",
            )


def images_that_fit(
    recipe: Recipe, classes: int, worst: WorstStep, world: World, workers: int
) -> int:
    """How many images fit into a step, 0 where none does:
    what `trial` says in a process of its own.
    """
    request = {
        "recipe": recipe.model_dump(mode="json"),
        "classes": classes,
        "worst": worst,
        "device": str(world.device),
        "workers": workers,
        "processes": world.size,
        "here": int(os.environ.get("LOCAL_WORLD_SIZE", world.size)),
    }
    trial = [sys.executable, "-m", "detrellis.engine.trial"]
    done = subprocess.run(
        trial, input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return int(done.stdout.split()[-1])
    if done.returncode < 0:  # the system ends what takes all memory
        return 0
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    raise UserError(f"--auto-batch: the step that was tried failed: {lines[-1]}", BY_HAND)
