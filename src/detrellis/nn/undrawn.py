"""Building a network whose weights come from elsewhere, without drawing random ones first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode


class Undrawn(TorchFunctionMode):
    """Within it no random numbers are drawn for weights:
    normal distributions give their mean, uniform ones their lower end.

    For networks that are counted, or filled with trained weights: drawing takes most of the time of
    building a large one. A tensor is not left as it is, since truncated distributions are drawn
    again until no number is rejected; these two never are. On torch's meta device there is nothing
    to fill, and it is.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The call as it is, unless it draws numbers into a tensor."""
        kwargs = kwargs or {}
        if func is Tensor.erfinv_:  # of uniform numbers, to make them normal; it takes longest
            return args[0]
        if func in FILLING and args[0].is_meta:
            return args[0]
        if func not in FIRST:
            return func(*args, **kwargs)
        tensor, *numbers = [*args] if args else [kwargs["tensor"]]
        if tensor.is_meta:
            return tensor
        name = FIRST[func]
        first = 0.0 if name is None else numbers[0] if numbers else kwargs.get(name, 0.0)
        with torch.no_grad():
            return tensor.fill_(first)


# What draws numbers into a tensor, and its first parameter: the mean or the lower end; None where
# it is neither, and the mean is 0. All draw with the tensor's two methods. Those of `torch.nn.init`
# that tell a mode of themselves stand beside them, since it does not see their inside then.
FIRST: dict[Callable[..., Any], str | None] = {
    Tensor.normal_: "mean",
    Tensor.uniform_: "from",
    init.normal_: "mean",
    init.uniform_: "a",
    init.kaiming_uniform_: None,
}
# What the functions of `torch.nn.init` and timm's go on with, in place.
FILLING = {Tensor.add_, Tensor.clamp_, Tensor.fill_, Tensor.mul_, Tensor.zero_}
