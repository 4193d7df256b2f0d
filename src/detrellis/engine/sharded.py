"""Sharded training: PyTorch's FSDP2 (`fully_shard`). Each process keeps a part of every parameter,
gradient, moment and averaged weight, and a layer is whole only while it computes.

What a run saves is whole, and the same as without it: any number of processes goes on with it,
sharded or not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from detrellis.detector import Detector
from detrellis.distributed import World
from detrellis.training import TrainableDetector

CONTAINERS = (nn.ModuleList, nn.Sequential)
SMALLEST = 100_000  # parameters of a layer that is gathered by itself


def shard(model: TrainableDetector, average: Detector | None, world: World) -> None:
    """Shard what is trained, and its average, over all processes;
    both are then on this process's device.

    The layers of backbone and encoder are gathered one at a time. All else is gathered for the
    whole step: schemes and heads reach into the decoder from outside.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in filter(None, (model, average)):
        module.to(memory_format=torch.contiguous_format)  # shards are rows
    for part in (model.detector.backbone, model.detector.encoder):
        for layer in list(layers(part)):
            fully_shard(layer, mesh=mesh)
    # The average never computes, so that one group will do
    for module in filter(None, (model, average)):
        fully_shard(module, mesh=mesh)


def layers(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of a network's lists and sequences that have `SMALLEST` parameters,
    from outside in.
    """
    for child in module.children():
        is_layer = isinstance(module, CONTAINERS) and not isinstance(child, CONTAINERS)
        if is_layer and sum(p.numel() for p in child.parameters()) >= SMALLEST:
            yield child
        else:
            yield from layers(child)


def whole(state: Any, *, everywhere: bool = False) -> Any:
    """A nest of dicts and lists whose shards are put together, on the host; each process has to
    call it, and unless it is wanted `everywhere` only the first gets the values."""
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if everywhere or dist.get_rank() == 0 else full.new_empty(0)
    if isinstance(state, Mapping):
        return {key: whole(value, everywhere=everywhere) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value, everywhere=everywhere) for value in state]
    return state


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, cut as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def parts_of(weights: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The shards of a whole state dict, as `module` keeps them."""
    now = module.state_dict()
    return {name: part_of(tensor, now.get(name, tensor)) for name, tensor in weights.items()}


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class WholeDetector:
    """A detector to evaluate with, without parameters of its own until it is filled: the sharded
    one cannot be called while it is trained without another exchange for each layer."""

    def __init__(self, detector: Detector) -> None:
        self._detector = copy.deepcopy(detector).eval().requires_grad_(False)
        self.empty()

    def empty(self) -> None:
        """Let go of the parameters."""
        for module in self._detector.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def filled(self, weights: Mapping[str, Tensor], device: torch.device) -> Detector:
        """The detector with these weights, on the device."""
        self._detector.load_state_dict(
            {name: t.to(device) for name, t in weights.items()}, assign=True
        )
        return self._detector.to(device)
