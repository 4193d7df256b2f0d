"""Access to one golden file."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detrellis.types import Targets


class Arrays:
    """Float arrays become float64 tensors; strings are JSON."""

    def __init__(self, data: Any) -> None:
        self.data = {k: data[k] for k in data.files}

    def __contains__(self, key: str) -> bool:
        return key in self.data

    def __getitem__(self, key: str) -> Tensor:
        array = self.data[key]
        tensor = torch.from_numpy(np.asarray(array).copy())
        return tensor.double() if tensor.is_floating_point() else tensor

    def variable(self, key: str) -> Tensor:
        return self[key].requires_grad_()

    def json(self, key: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(str(self.data[key]))
        return loaded

    def number(self, key: str) -> int:
        return int(self.data[key])

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All arrays under `prefix`, without it."""
        return {k.removeprefix(prefix): self[k] for k in self.data if k.startswith(prefix)}

    def count(self, pattern: str) -> int:
        """How many arrays are called so, such as `mask` and a number."""
        return sum(re.fullmatch(pattern, k) is not None for k in self.data)

    def shapes(self, key: str = "spatial_shapes") -> tuple[tuple[int, int], ...]:
        return tuple((int(h), int(w)) for h, w in self.data[key])

    def targets(self) -> Targets:
        """`gt_labels{b}` and `gt_boxes{b}` of all images, packed."""
        count = sum(k.startswith("gt_labels") for k in self.data)
        labels = [self[f"gt_labels{b}"].long() for b in range(count)]
        boxes = torch.cat([self[f"gt_boxes{b}"].view(-1, 4) for b in range(count)])
        return Targets(torch.cat(labels), boxes, tuple(len(x) for x in labels))


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Equal up to `tolerance`, and to what is left of float64 in sums over many large numbers."""
    torch.testing.assert_close(
        actual.detach(),
        expected.to(actual.dtype),
        atol=tolerance,
        rtol=1e-9,
        msg=lambda m: f"{what}: {m}",
    )
