"""Counting the multiply-adds of a pass, real or on torch's meta device."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class MultiplyAdds(TorchDispatchMode):
    """Within it, `total` is the number of floating-point operations so far, without gradients: two
    for each multiply-add.

    It counts as torch's own counter does, which also keeps the modules apart. On the meta device
    torch takes a millisecond of Python to say what comes out of an addition; layers are alike, so
    the next one on tensors of the same shapes is not asked about.
    """

    total = 0

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layouts: dict[Hashable, Layout] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The call, counted if it multiplies."""
        kwargs = kwargs or {}
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            out = func(*args, **kwargs)
            self.total += count(*args, **kwargs, out_val=out)
            return out
        if torch.Tag.pointwise in func.tags and args and is_meta(args[0]):
            return self._pointwise(func, args, kwargs)
        return func(*args, **kwargs)

    def _pointwise(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What an elementwise operation on the meta device returns."""
        if func._schema.name.endswith("_"):  # in place, where nothing is computed
            return args[0]
        call = (func, *map(described, args), *((k, described(v)) for k, v in kwargs.items()))
        layout = self._layouts.get(call)
        if layout is None:
            out = func(*args, **kwargs)
            self._layouts[call] = (out.shape, out.stride(), out.dtype)
            return out
        shape, stride, dtype = layout
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


Layout = tuple[Sequence[int], Sequence[int], torch.dtype]


def is_meta(argument: object) -> bool:
    """Whether it is a tensor on the meta device."""
    return isinstance(argument, Tensor) and argument.is_meta


def described(argument: Any) -> Hashable:
    """What of an argument decides on the layout of a result."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    return type(argument), argument
