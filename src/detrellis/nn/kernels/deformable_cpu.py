"""The CPU path of multi-scale deformable attention:
which pieces of `deformable_bag` are compiled, and when.

Compiling makes forward and backward together 1.4 to 1.8 times as fast as the eager pieces. It costs
4 s in every process, half of it the import of `torch._dynamo`, and 17 s the first time on a
machine. So it is for training on inputs that fill the time: calls that need gradients and have
`COMPILE_FROM` samples or more. The rule looks at one call only, never at calls before it: a resumed
run then computes what the uninterrupted one did, bit for bit. Calls without gradients never start a
compile, and use one that is there: the compiled forward pass has the same bits as the eager one.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from detrellis.nn.compiler import import_compiler
from detrellis.nn.kernels import deformable_bag as bag

logger = logging.getLogger(__name__)

Shapes = Sequence[tuple[int, int]]
Pair = tuple[Tensor, Tensor]
Piece = Callable[..., Pair]

# About 45 ns a sample are won. With fewer samples than these (4.5 ms), it would take a thousand
# calls and more to win back the start, and the small models of tests would compile.
COMPILE_FROM = 100_000


def forced() -> str:
    """The path that `DETRELLIS_MSDA` asks for, or the empty string."""
    return os.environ.get("DETRELLIS_MSDA", "")


_paths: list[str] = []  # that were said to be taken, in this process


@cache
def say(message: str, level: int = logging.INFO) -> None:
    """Log once in a process which path is taken, and remember it."""
    _paths.append(message)
    logger.log(level, "deformable attention: %s", message)


def path_taken() -> str | None:
    """The path that deformable attention took to last in this process, in words;
    None where it took none yet.
    """
    return _paths[-1] if _paths else None


class Pieces:
    """The two pieces, compiled at the first use that pays for it;
    after any failure, eager for good.
    """

    def __init__(self) -> None:
        self.compiled: dict[Piece, Piece] = {}
        self.failed = False

    def use_compiled(self, samples: int, *, gradients: bool) -> bool:
        """Whether a call with so many samples uses compiled pieces."""
        if self.failed or forced() == "eager":
            return False
        if forced() != "compiled" and not (gradients and samples >= COMPILE_FROM):
            return bool(self.compiled) and not gradients
        if not self.compiled:
            self._start()
        return not self.failed

    def run(
        self, piece: Piece, eager: Piece, levels: Tensor, *others: Tensor, compiled: bool
    ) -> Pair:
        """The result of `piece` compiled, or of `eager`."""
        if not compiled or self.failed:
            return eager(levels, *others)
        try:
            for tensor in others:
                # Images differ in size: only the number of heads and of samples a head are
                # constants of the code.
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            # Compiled code is for one state of these switches, too.
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                return self.compiled[piece](levels, *others)
        except Exception as error:  # a compiler that does not work, ...
            self._give_up(error)
            return eager(levels, *others)

    def _start(self) -> None:
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        try:
            if sys.platform != "win32" and shutil.which(compiler) is None:
                raise FileNotFoundError(f"there is no C++ compiler {compiler}")
            import_compiler()
            self.compiled = {
                piece: torch.compile(piece, fullgraph=True)
                for piece in (bag.bags, bag.point_gradients)
            }
            say("bags with compiled pieces on the CPU, for training on large inputs")
        except Exception as error:  # no compiler, a cache directory that cannot be made, ...
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        reason = (str(error).strip().splitlines() or [""])[0]
        say(f"eager bags on the CPU (cannot compile: {type(error).__name__}: {reason})")


pieces = Pieces()


def _flat(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The table `(R, d)`, locations `(N, M, K, 2)` and weights `(N, M, K)`, as alike as can be from
    call to call: compiled code is for one memory layout, and for tensors that need gradients or do
    not."""
    table, locations, weights = (t.detach().contiguous() for t in (value, locations, weights))
    return (
        table.view(-1, value.shape[-1]),
        locations.flatten(3, 4).flatten(0, 1),
        weights.flatten(3).flatten(0, 1),
    )


def forward(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes, gradients: bool
) -> Tensor:
    """Sampled values `(B, N, M * d)`; `gradients`: whether a backward pass will follow."""
    batch, queries, heads = weights.shape[:3]
    if not weights.numel() or not value.numel():
        return value.new_zeros(batch, queries, heads * value.shape[-1])
    layout = bag.lay_out(value, shapes, weights)
    table, points, flat_weights = _flat(value, locations, weights)
    compiled = pieces.use_compiled(weights.numel(), gradients=gradients)
    if not compiled and not pieces.failed:
        say("eager bags on the CPU, until large inputs are trained on")
    ids, row_weights = pieces.run(
        bag.bags, bag.bags, *layout, points, flat_weights, compiled=compiled
    )
    return F.embedding_bag(ids, table, per_sample_weights=row_weights, mode="sum").view(
        batch, queries, -1
    )


def backward(
    gradient: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: Shapes,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights;
    the value's only if `needs[0]`, the others if `needs[1]`, else empty.

    Rows and their weights are computed anew: kept, they would take three times the memory of
    locations and weights.
    """
    inputs = ((value, needs[0]), (locations, needs[1]), (weights, needs[1]))
    empty = not weights.numel() or not value.numel()
    for_value, for_locations, for_weights = (
        t.new_zeros(t.shape if empty and needed else 0) for t, needed in inputs
    )
    if empty:
        return for_value, for_locations, for_weights
    layout = bag.lay_out(value, shapes, weights)
    table, points, flat_weights = _flat(value, locations, weights)
    gradient = gradient.detach().contiguous().view(-1, value.shape[-1])
    compiled = pieces.use_compiled(weights.numel(), gradients=True)
    ids, row_weights = pieces.run(
        bag.bags, bag.bags, *layout, points, flat_weights, compiled=compiled
    )
    if needs[0]:
        for_value = bag.scatter(gradient, ids, row_weights, len(table)).view(value.shape)
    if needs[1]:
        arguments = (layout.levels, ids, points, flat_weights, table, gradient)
        for_locations, for_weights = pieces.run(
            bag.point_gradients, bag.eager_point_gradients, *arguments, compiled=compiled
        )
        for_locations = for_locations.view(locations.shape)
        for_weights = for_weights.view(weights.shape)
    return for_value, for_locations, for_weights
