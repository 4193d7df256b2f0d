"""One process or many: the same command under `torchrun`."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from detrellis.errors import UserError

T = TypeVar("T")

# What torch can train on. Tests have run on the first two; its other "devices", such as meta, hold
# no numbers or belong to packages of their own.
DEVICES = ("cpu", "cuda", "mps", "xpu")

TIMEOUT = "DETRELLIS_TIMEOUT"  # in the environment: seconds that a process waits for the others


class World(NamedTuple):
    """The rank of this process, the number of processes, and this one's device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main_process(self) -> bool:
        """True in the one process that prints and writes files."""
        return self.rank == 0


def pick_device(name: str | None, local_rank: int = 0) -> torch.device:
    """The device asked for, else a GPU if there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in DEVICES:
        remedy = "Did you mean cuda?" if name.startswith("gpu") else "Try --device cpu."
        raise UserError(f"device {name!r} is none of {', '.join(DEVICES)}", remedy)
    if name == "cuda":  # of several, this process's own
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # Its first sentence; torch goes on with all its backends
        why = str(error).splitlines()[0].partition(". ")[0]
        raise UserError(f"device {name!r} cannot be used: {why}", "Try --device cpu.") from None
    return device


@contextmanager
def process_group(device: str | None = None) -> Iterator[World]:
    """Join the processes that `torchrun` started (NCCL on GPUs, gloo on CPUs), or be alone.

    Raises `UserError` where another process has ended, or does not answer within the timeout.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1 or dist.is_initialized():
        yield World(rank, size, chosen)
        return
    backend, limit = "nccl" if chosen.type == "cuda" else "gloo", _timeout()
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=limit)
    try:
        yield World(rank, size, chosen)
    except RuntimeError as error:
        if not _of_the_others(error):
            raise
        lost = (
            f"another process has ended, or has not answered for {limit.total_seconds():,.0f} "
            "seconds"
        )
        remedy = ["If it has ended, it says why.", *getattr(error, "__notes__", [])]
        raise UserError(f"process {rank} of {size}: {lost}", "\n  ".join(remedy)) from error
    finally:
        dist.destroy_process_group()


def _timeout() -> timedelta:
    """How long a process waits for the others:
    30 minutes, in which the first one may write to a slow disk.
    """
    text = os.environ.get(TIMEOUT, "1800")
    if not text.isdecimal() or not 1 <= int(text) <= 86_400:
        raise UserError(
            f"{TIMEOUT}={text}: no number of seconds from 1 to 86400", f"For example {TIMEOUT}=600."
        )
    return timedelta(seconds=int(text))


def _of_the_others(error: RuntimeError) -> bool:
    """Whether a collective has failed, and not what this process does by itself:
    gloo's errors have no class.
    """
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def parallel(model: nn.Module, world: World) -> nn.Module:
    """The model with its gradients averaged over all processes; itself where there is one."""
    if world.size == 1:
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    # Without its broadcast of buffers, of which BatchNorm's alone change: `same_statistics` sees to
    # them.
    wrapped = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
    if world.device.type == "cpu" and world.size > 2:
        # A lambda: of a hook's annotations DDP accepts no strings, which they are in this file.
        wrapped.register_comm_hook(None, lambda _, bucket: _mean_by_rank(bucket.buffer()))
    return wrapped


def _mean_by_rank(gradients: Tensor) -> Future[Tensor]:
    """The mean of the processes' gradients, one of DDP's buckets each,
    summed by rank wherever an element stands.

    Gloo's ring adds up in an order that follows the place, and DDP lays its buckets out anew after
    a process's first pass: of three processes or more, those that resume a run would round its next
    step in another way than it did.
    """
    size = dist.get_world_size()
    padded = nn.functional.pad(gradients, (0, -len(gradients) % size))
    parts = torch.empty_like(padded)
    dist.all_to_all_single(parts, padded)  # of every process, the part that this one adds up
    mean = functools.reduce(torch.add, parts.chunk(size)) / size
    dist.all_gather_into_tensor(padded, mean)
    future: Future[Tensor] = Future()
    future.set_result(padded[: len(gradients)])
    return future


def same_statistics(model: nn.Module) -> None:
    """Give all processes the first one's BatchNorm statistics, after each step: what averages or
    evaluates the model would otherwise have others in each process, of which a run saves the
    first's."""
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
    ]
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    if buffers:
        together = torch.cat(buffers)
        dist.broadcast(together, 0)
        for buffer, values in zip(buffers, together.split([len(b) for b in buffers]), strict=True):
            buffer.copy_(values)


def reduce_mean(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, each of which must call it;
    the tensor itself where there is one.
    """
    if dist.is_available() and dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def reduce_max(value: int, device: torch.device) -> int:
    """The largest of all processes' values, each of which must call it;
    the value itself where there is one.
    """
    return reduce_maxima([value], device)[0]


def reduce_maxima(values: Sequence[int], device: torch.device) -> list[int]:
    """As `reduce_max`, of several values at once: the host waits for the device once."""
    if not dist.is_initialized():
        return list(values)
    largest = torch.tensor(values).to(device, non_blocking=True)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return [int(value) for value in largest.tolist()]


def all_gather(value: T) -> list[T]:
    """Every process's value, in every process, by rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return [v for v in gathered if v is not None]
