"""What the benchmarks share: interleaved timing, saved activations, and rows that name a budget.

CPU time of the process is measured with one thread, because benchmarks run on shared machines:
another process slows the clock on the wall more than it slows this one. Variants take turns, so
that what disturbs one disturbs all. Read the ratios, not the milliseconds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from detrellis.nn.kernels.linear import linear

Seconds = list[float]
PRODUCT = (4096, 1024, 1024)  # rows, inputs, outputs of a matrix product at its full speed


@dataclass(frozen=True)
class Row:
    """One measurement with its budget."""

    what: str
    measured: float
    budget: float
    unit: str  # "x", "ms", ...
    at_least: bool = False  # whether the budget is the least or the most

    @property
    def ok(self) -> bool:
        """Whether it is met."""
        return self.measured >= self.budget if self.at_least else self.measured <= self.budget

    def text(self) -> str:
        """One line."""
        sign = ">=" if self.at_least else "<="
        verdict = "ok" if self.ok else "MISSED"
        return (
            f"{self.what}: {self.measured:.3g} {self.unit} (budget {sign} {self.budget:g} "
            f"{self.unit}) {verdict}"
        )


def arguments(about: str | None, *, bfloat16: bool = False) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes, and `--bfloat16` where two sides are compared."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the rows with budgets here")
    if bfloat16:
        about_it = "time both sides under autocast; they are equal in float32"
        parser.add_argument("--bfloat16", action="store_true", help=about_it)
    return parser


def autocast(bfloat16: bool) -> torch.autocast:
    """Where a side computes what is timed."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)


def finish(rows: list[Row], to: Path | None) -> None:
    """Print the rows with budgets, and write them where asked."""
    for row in rows:
        print(row.text())
    if to is not None:
        to.write_text(json.dumps([asdict(r) for r in rows]))


def clock(device: str) -> Callable[[], float]:
    """The process's CPU seconds;
    on a GPU those of the wall, once the device has done what it was given.
    """
    if device == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2, device: str = "cpu"
) -> dict[str, Seconds]:
    """Seconds of each call by the device's `clock`, variant after variant, round after round."""
    seconds: dict[str, Seconds] = {name: [] for name in variants}
    now = clock(device)
    for i in range(warmup + rounds):
        for name, run in variants.items():
            start = now()
            run()
            if i >= warmup:
                seconds[name].append(now() - start)
    return seconds


def best(seconds: Seconds) -> float:
    """The fastest: what the work costs when nothing disturbs it."""
    return min(seconds)


def describe(name: str, seconds: Seconds, per: str = "pass") -> str:
    """Fastest and median, in milliseconds."""
    return (
        f"{name:16} fastest {min(seconds) * 1e3:9.1f} ms, median "
        f"{statistics.median(seconds) * 1e3:9.1f} ms a {per}"
    )


def saved_bytes(forward: Callable[[], Any], ignore: set[int]) -> int:
    """Bytes of the distinct storages that a forward pass keeps for its backward pass.

    `ignore` holds `data_ptr()` of storages that exist anyway: parameters, buffers and inputs.
    """
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignore:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    total = sum(storages.values())
    del kept  # only now: a freed storage's address would be given to another
    return total


def storages_of(*tensors: torch.Tensor) -> set[int]:
    """For `saved_bytes(ignore=...)`."""
    return {t.untyped_storage().data_ptr() for t in tensors}


def least_seconds(run: Callable[[], object]) -> str:
    """What the convolutions and matrix products of one call alone would take, did all of them have
    the speed of a large product here. One call, and some products.
    """
    counted = {torch.ops.mkldnn._linear_pointwise: _linear_operations}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        run()
    work = counter.get_total_flops() / 1e9
    rows, inputs, outputs = PRODUCT
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    with torch.no_grad():
        seconds = best(interleaved({"product": lambda: linear(x, weight)}, 10)["product"])
    speed = 2 * math.prod(PRODUCT) / 1e9 / seconds
    return (
        f"{work:.0f} GFLOP in convolutions and matrix products: {work / speed * 1e3:.0f} ms at "
        f"{speed:.0f} GFLOP/s, as a large product has them"
    )


def _linear_operations(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of oneDNN's product, which torch does not count; both are shapes."""
    return 2 * math.prod(x) * weight[0]
