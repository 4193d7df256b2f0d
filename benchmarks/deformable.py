"""Multi-scale deformable attention side by side:
each path of ours, and the form that `transformers` uses.

    OMP_NUM_THREADS=1 python benchmarks/deformable.py

One process, one thread, variants interleaved; the least process time of each in milliseconds, and
its ratio to the peers' form (`grid_sample` for each level, stack, multiply, sum). `enc` is an
encoder layer on a 512x512 image, `dec` a decoder layer with 900 queries on two. Budgets for forward
and backward together: compiled 0.15 and 0.35, eager 0.6 and 0.95.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from detrellis.nn.kernels.deformable import Shapes, ms_deform_attn

LEVELS, HEADS, WIDTH, POINTS = ((64, 64), (32, 32), (16, 16), (8, 8)), 8, 32, 4
BUDGETS = {
    ("compiled", "enc"): 0.15,
    ("compiled", "dec"): 0.35,
    ("eager", "enc"): 0.6,
    ("eager", "dec"): 0.95,
}


def peers(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Every sample written to memory,
    as `transformers` and most ports do where there is no CUDA kernel.
    """
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    grids, samples = 2 * locations - 1, []
    for level, tokens in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        image = tokens.flatten(2).transpose(1, 2).reshape(batch * heads, width, *shapes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(
            F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        )
    shares = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    out = (
        (torch.stack(samples, dim=-2).flatten(-2) * shares)
        .sum(-1)
        .view(batch, heads * width, queries)
    )
    return out.transpose(1, 2).contiguous()


def workload(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations and weights."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(h * w for h, w in LEVELS)
    batch, queries = (1, tokens) if name == "enc" else (2, 900)
    noise = torch.randn(batch, queries, HEADS, len(LEVELS), POINTS, 2, generator=generator)
    if name == "enc":
        centres = [
            torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w)
            for h, w in LEVELS
        ]
        sizes = torch.tensor([(w, h) for h, w in LEVELS])[:, None]
        locations = torch.cat(centres).flip(-1)[None, :, None, None, None] + 2 * noise / sizes
    else:
        locations = torch.rand(batch, queries, 1, 1, 1, 2, generator=generator) + 0.06 * noise
    weights = torch.randn(batch, queries, HEADS, len(LEVELS) * POINTS, generator=generator).softmax(
        -1
    )
    value = torch.randn(batch, tokens, HEADS, WIDTH, generator=generator)
    return value, locations, weights.unflatten(-1, (len(LEVELS), POINTS))


def steps(path: str, tensors: tuple[Tensor, ...]) -> dict[str, Callable[[], list[Tensor]]]:
    """Forward alone, and with the three gradients."""
    function = peers if path == "peers" else ms_deform_attn
    variables = [t.clone().requires_grad_() for t in tensors]
    upstream = torch.randn(
        *tensors[1].shape[:2], HEADS * WIDTH, generator=torch.Generator().manual_seed(1)
    )

    def run(of: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
        os.environ["DETRELLIS_MSDA"] = path
        return function(of[0], LEVELS, of[1], of[2])

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [run(tensors)]

    def both() -> list[Tensor]:
        out = run(variables)
        return [out.detach(), *torch.autograd.grad(out, variables, upstream)]

    return {"forward": forward, "both": both}


def measure(name: str, repeats: int) -> None:
    """Compare the results, then the times of one workload."""
    tensors = workload(name)
    todo = {path: steps(path, tensors) for path in ("peers", "reference", "eager", "compiled")}
    expected = todo["peers"]["both"]()
    for path in ("reference", "eager", "compiled"):
        start = time.perf_counter()
        for ours, theirs in zip(todo[path]["both"](), expected, strict=True):
            assert (ours - theirs).abs().max() <= 3e-6 * max(1.0, theirs.abs().max().item()), path
        print(f"{name} {path}: first call {time.perf_counter() - start:.1f} s")
    best = {(path, what): float("inf") for path in todo for what in todo[path]}
    for _ in range(repeats):
        for path, what in best:
            start = time.process_time()
            todo[path][what]()
            best[path, what] = min(best[path, what], 1000 * (time.process_time() - start))
    print(f"{name}   {'forward':>18} {'and backward':>18}   budget")
    for path in todo:
        cells = [
            f"{best[path, w]:9.1f} ms {best[path, w] / best['peers', w]:5.3f}x"
            for w in ("forward", "both")
        ]
        print(f"{path:10}", *cells, f"  {BUDGETS.get((path, name), '-')}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=12)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    for name in ("enc", "dec"):
        measure(name, repeats)


if __name__ == "__main__":
    main()
