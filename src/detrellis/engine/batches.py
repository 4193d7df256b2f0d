"""The batches of a run: how many images a process takes at a time,
in which order, and how much of them is padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from detrellis.data.batch import Batch, Normalise
from detrellis.data.loader import Loader, build_loader
from detrellis.data.sampler import BatchSampler
from detrellis.distributed import World
from detrellis.engine.samples import image_factors, training_dataset
from detrellis.engine.state import TrainJob
from detrellis.errors import UserError
from detrellis.recipes.config import Recipe

# In a run: what its loader could not read, where that does not stop it
UNREADABLE = "unreadable.txt"


def padded_fraction(batch: Batch) -> torch.Tensor:
    """Fraction of a batch's pixels that are padding:
    work done for nothing, which `data.group_by_aspect` lowers.
    """
    padding = batch.images.padding
    return batch.images.pixels.new_zeros(()) if padding is None else padding.float().mean()


def batch_per_process(recipe: Recipe, world: World) -> int:
    """Images a process takes at a time, so that all of them make the recipe's batch."""
    parts = world.size * recipe.optim.accumulate
    if recipe.optim.batch_size % parts:
        raise UserError(
            f"a batch of {recipe.optim.batch_size} images cannot be shared by {world.size} "
            f"processes with {recipe.optim.accumulate} accumulated passes",
            f"Take a multiple of {parts}: -o "
            f"optim.batch_size={max(parts, recipe.optim.batch_size // parts * parts)}.",
        )
    return recipe.optim.batch_size // parts


def unreadable_line(out: Path) -> str:
    """How many pictures could not be read so far, and the first of them;
    nothing where all could.
    """
    file = out / UNREADABLE
    lines = list(dict.fromkeys(file.read_text().splitlines())) if file.is_file() else []
    if not lines:
        return ""
    pictures = "1 picture" if len(lines) == 1 else f"{len(lines)} pictures"
    return f"{pictures} could not be read, and others were seen instead: {lines[0]}. All: {file}"


def train_loader(job: TrainJob, world: World) -> tuple[Loader, int]:
    """The loader, and the number of optimizer steps in an epoch."""
    recipe, data = job.card.recipe, job.card.recipe.data
    sampler = BatchSampler(
        len(job.train),
        batch_per_process(recipe, world),
        seed=job.card.seed,
        rank=world.rank,
        world_size=world.size,
        group_by_aspect=job.train.sizes if data.group_by_aspect else None,
        factors=image_factors(job.train, recipe),
    )
    unreadable = job.out / UNREADABLE if data.unreadable == "replace" else None
    dataset = training_dataset(job.train, recipe, job.card.seed, unreadable=unreadable)
    options: Any = {"workers": job.workers, "pin_memory": world.device.type == "cuda"}
    loader = build_loader(dataset, sampler, normalise=Normalise.of(**data.statistics()), **options)
    return loader, -(-len(sampler) // recipe.optim.accumulate)
