"""Counts where a host would wait for its device, without a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Methods that read a tensor; on a CPU they dispatch nothing. Not `numpy`, which of a GPU's tensor is
# an error and no wait.
COPIES = ("cpu", "tolist")
# What sends numbers to the device that is named, and waits until they are there
SENDS = ("tensor", "as_tensor")
# Operations that read a number, or whose results have as many rows as the values say
READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "nms",
    "equal",
)
INDEXED = ("index", "index_put", "index_put_")


class _Operations(TorchDispatchMode):
    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        masked = name in INDEXED and any(i is not None and i.dtype is torch.bool for i in args[1])
        repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in READS or masked or repeats:
            self.waits.append(name)
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(
        self, func: Callable[..., object], types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = getattr(func, "__name__", "")
        kwargs = kwargs or {}
        # By name: the device of another tensor, which here is the CPU too, is no copy to the host
        named = any(isinstance(x, str) and x == "cpu" for x in (*args[1:], *kwargs.values()))
        sent = name == "new_tensor" or (name in SENDS and kwargs.get("device") is not None)
        if name in COPIES or (name == "to" and named) or sent:
            self.waits.append(name)
        return func(*args, **kwargs)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks whether a tensor is at hand is told that it is not."""
    for module in ("distinct", "kernels.roi"):
        monkeypatch.setattr(f"detrellis.nn.{module}.at_hand", lambda _: False)


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """The names of what within the block would wait for a GPU, in their order. Other kernels
    of a GPU count as those of the CPU do, and other ways as `as_on_a_gpu` sees to it."""
    waits: list[str] = []
    with _Operations(waits), _Methods(waits):
        yield waits
