"""Means of named values that live on a device:
collecting them never waits for it, reading them does so once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Value = Tensor | float


class Sums:
    """Sums and counts of named values on the host."""

    def __init__(self) -> None:
        self._losses: dict[str, tuple[float, float]] = {}
        self._metrics: dict[str, tuple[float, float]] = {}

    def put(
        self, losses: Mapping[str, tuple[float, float]], metrics: Mapping[str, tuple[float, float]]
    ) -> None:
        """Adds (sum, count) pairs."""
        for sums, added in ((self._losses, losses), (self._metrics, metrics)):
            for name, (value, count) in added.items():
                old = sums.get(name, (0.0, 0.0))
                sums[name] = (old[0] + value, old[1] + count)

    def add(self, other: Sums) -> None:
        """Adds all sums and counts of `other`."""
        self.put(other._losses, other._metrics)

    def means(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means of losses and metrics; NaN where nothing was counted."""
        return _divided(self._losses), _divided(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and containers."""
        return {"losses": dict(self._losses), "metrics": dict(self._metrics)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._losses, self._metrics = dict(state["losses"]), dict(state["metrics"])


class Means:
    """Collects a step's values on their device; `take` is the one place that waits for it.

    A loss that is NaN must show, and makes the mean NaN; a metric that is NaN means that there was
    nothing to measure, and is not counted.
    """

    def __init__(self) -> None:
        self._sums = Sums()
        self._names: tuple[tuple[str, ...], int] = ((), 0)
        self._values: Tensor | None = None  # (2, names) sum and count

    @torch.no_grad()
    def add(self, losses: Mapping[str, Value], metrics: Mapping[str, Value]) -> None:
        """Adds the values of one step."""
        given = [*losses.items(), *metrics.items()]
        device = next((v.device for _, v in given if isinstance(v, Tensor)), torch.device("cpu"))
        names = (tuple(n for n, _ in given), len(losses))
        if names != self._names:
            self._flush()
            self._names = names
        # Filling a tensor on the device queues the number; torch.tensor(v, device=...) would wait
        # for a copy.
        row = torch.stack([_scalar(v, device) for _, v in given])
        counted = torch.ones_like(row)
        counted[len(losses) :] = (~row[len(losses) :].isnan()).to(row.dtype)
        row[len(losses) :] = row[len(losses) :].nan_to_num(nan=0.0)
        both = torch.stack([row, counted])
        self._values = both if self._values is None else self._values.to(device) + both

    def take(self) -> Sums:
        """The sums since the last call."""
        self._flush()
        sums, self._sums = self._sums, Sums()
        return sums

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and containers.
        Nothing is added up for it, so later sums are the same bits.
        """
        return {"sums": self._sums.state_dict(), "names": self._names, "values": self._values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._sums.load_state_dict(state["sums"])
        self._names, self._values = state["names"], state["values"]

    def _flush(self) -> None:
        if self._values is None:
            return
        names, losses = self._names
        pairs: list[tuple[float, float]] = list(zip(*self._values.tolist(), strict=True))
        self._sums.put(
            dict(zip(names, pairs[:losses], strict=False)),
            dict(zip(names[losses:], pairs[losses:], strict=True)),
        )
        self._values = None


def mean_over_passes(passes: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each value over the passes of a step;
    a pass may lack some (no denoising without boxes).
    """
    names = dict.fromkeys(name for values in passes for name in values)
    return {
        name: torch.stack([v[name].detach() for v in passes if name in v]).mean() for name in names
    }


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None where there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _divided(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    return {name: value / count if count else math.nan for name, (value, count) in sums.items()}


def _scalar(value: Value, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((), float(value), device=device)
    if value.dtype is torch.float32 and value.device == device and not value.dim():
        return value  # the usual case, made cheap: there may be a hundred terms
    return value.to(device, torch.float32).reshape(())
