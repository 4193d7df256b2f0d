"""From a data set to batches, by worker processes; what these could not read is raised here."""

from __future__ import annotations

import atexit
import gc
import signal
import weakref
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from detrellis.data.batch import IMAGENET, Batch, Collate, Normalise
from detrellis.data.dataset import DetectionDataset, Sample, WorkerError
from detrellis.data.sampler import BatchSampler, EvalSampler
from detrellis.errors import UserError


class Loader:
    """Iterates batches in the sampler's order and raises what the workers could not read as a
    `UserError`.
    """

    def __init__(self, batches: DataLoader[Sample], sampler: BatchSampler | EvalSampler) -> None:
        self.batches, self.sampler = batches, sampler
        _loaders.add(self)

    @property
    def dataset(self) -> DetectionDataset:
        """The images that are loaded."""
        dataset = self.batches.dataset
        assert isinstance(dataset, DetectionDataset)
        return dataset

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.batches)
        try:
            while (batch := _next(batches)) is not None:
                yield batch
        except (Exception, KeyboardInterrupt):
            self.close()
            raise

    def close(self) -> None:
        """Ends the workers. Where nobody calls it they end when the loader is collected, but a
        loader that hangs on an exception's traceback may be collected by one of its own threads,
        which then waits for itself."""
        iterator, self.batches._iterator = self.batches._iterator, None
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


_loaders = weakref.WeakSet[Loader]()


@atexit.register
def _close_all() -> None:
    """At the exit of the interpreter: end the workers of loaders that are still there, because the
    traceback of an error holds them. Python asks them by a signal, which they ignore, and waits."""
    for loader in list(_loaders):
        loader.close()


def _next(batches: Iterator[Batch | WorkerError]) -> Batch | None:
    """The next batch, None after the last."""
    try:
        batch = next(batches, None)
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
            raise
        raise _died(error) from error
    if isinstance(batch, WorkerError):
        raise UserError(batch.message, batch.remedy)
    return batch


def _died(error: RuntimeError) -> UserError:
    """The error of a dead worker, with the remedy that torch's message suggests."""
    message = f"{error} {error.__cause__ or ''}".lower()
    fewer = "use fewer workers (--workers 0: none) or smaller batches"
    if "bus error" in message:
        remedy = (
            f"The shared memory ran out: {fewer}; in a container, give it more (docker: "
            "--shm-size or --ipc=host)."
        )
    elif "killed by signal: killed" in message:
        remedy = f"It was killed from outside, mostly because the memory ran out: {fewer}."
    else:
        remedy = (
            "An image may have ended it: `detrellis check` decodes them all. Or memory was "
            f"short: {fewer}."
        )
    return UserError(f"a loader worker died: {str(error).splitlines()[0]}", remedy)


def _begin(worker: int) -> None:
    """What each worker does first.

    Ctrl-C and a batch system's SIGTERM reach every process of the group; the main one saves and
    ends the workers. And what they inherit is left alone by their garbage collection, which would
    write to it, and so have the memory copied that all of them share: 8 MB for each.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.freeze()


def build_loader(
    dataset: DetectionDataset,
    sampler: BatchSampler | EvalSampler,
    *,
    normalise: Normalise = IMAGENET,
    workers: int = 0,
    pin_memory: bool = False,
) -> Loader:
    """Loads the sampler's batches with `workers` processes, each of them two batches ahead.

    A worker computes with one thread, which torch sees to; with `workers=0` the caller's process
    does the work.
    """
    batches = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=Collate(dataset.augmentation.pad_to, normalise),
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        # Its own generator: without one every epoch takes a number from the global one, whose state
        # the model shares.
        generator=torch.Generator(),
        worker_init_fn=_begin,
    )
    return Loader(batches, sampler)
