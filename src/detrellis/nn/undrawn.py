"""Building a network whose weights come from elsewhere, without drawing random ones first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DRAWING = (
    Tensor.normal_,
    Tensor.uniform_,
    Tensor.erfinv_,  # of uniform numbers: a truncated normal distribution
    torch.nn.init.kaiming_uniform_,
)


class Undrawn(TorchFunctionMode):
    """Within it tensors that random numbers would fill keep what is in their memory.

    For networks that are counted, or filled with trained weights: drawing takes most of the time of
    building a large one.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The call as it is, unless it only draws numbers into its first argument."""
        kwargs = kwargs or {}
        if func in DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
