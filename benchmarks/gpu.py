"""What only a GPU can tell, at the papers' sizes:
deformable attention, and whole steps with and without a scheme.

    python benchmarks/gpu.py [--rounds N] [--short 800] [--compile]

One process, variants interleaved, median of the clock after the device has finished; ratios to the
first line of each table. Pictures are `--short` pixels high and 5/3 as wide (800x1333 has the area
that COCO's recipes see most); two a batch, 80 classes, ten boxes an image, bf16 as in training,
random weights. Memory is what one model's step takes at most: its weights and AdamW's averages, and
all that a step allocates. With --compile the layers of encoder and decoder are compiled, as with
`-o optim.compile=true`. Operations are what a host has to launch, whatever their size; the kernels
of compiled layers, which are none of torch's operations, are counted on a CPU alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch._inductor.config as inductor
from common import interleaved
from deformable import HEADS, WIDTH
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.utils._python_dispatch import TorchDispatchMode

from detrellis.nn.compiled_layers import compile_layers
from detrellis.nn.kernels.deformable import ms_deform_attn
from schemes import PLUS, SHARED, Stepper, Variant

STRIDES, POINTS, WARMUP = (8, 16, 32, 64), 4, 3
KERNEL = "graph_"  # how the profiler calls those that inductor writes for a CPU
PATHS = {"grid_sample": "reference", "Triton": ""}
STEPS = {
    "dino-r50": [Variant("align=4"), Variant("stable"), Variant("hybrid"), Variant("group=3")],
    PLUS: [Variant("co=atss"), Variant("co=rcnn+atss")],
    "conditional-detr-r50": [Variant("group=3"), Variant("group=11")],
    "tiny": [
        Variant("align=4"),
        Variant("group=11"),
        Variant("group=11", (SHARED,)),
        Variant("co=rcnn+atss"),
    ],
}


def attention(
    name: str, dtype: torch.dtype, size: tuple[int, int], rounds: int, device: str
) -> None:
    """One layer's attention, forward, and forward with backward, on either path;
    results compared first.
    """
    shapes = [(-(-size[0] // s), -(-size[1] // s)) for s in STRIDES]
    tokens = sum(h * w for h, w in shapes)
    queries = tokens if name == "encoder" else 900
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(2, tokens, HEADS, WIDTH, generator=generator).to(device, dtype)
    places = torch.rand(2, queries, 1, 1, 1, 2, generator=generator)
    places = places + 0.06 * torch.randn(
        2, queries, HEADS, len(shapes), POINTS, 2, generator=generator
    )
    shares = torch.randn(2, queries, HEADS, len(shapes) * POINTS, generator=generator).softmax(-1)
    inputs = (parts, places.to(device), shares.unflatten(-1, (len(shapes), POINTS)).to(device))
    variables = [t.clone().requires_grad_() for t in inputs]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [ms_deform_attn(inputs[0], shapes, *inputs[1:])]

    def both() -> list[Tensor]:
        out = ms_deform_attn(variables[0], shapes, *variables[1:])
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), variables)]

    def on(path: str, run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            os.environ["DETRELLIS_MSDA"] = path
            return run()

        return call

    for run in (forward, both):
        found = {label: on(path, run) for label, path in PATHS.items()}
        for ours, theirs in zip(*(call() for call in found.values()), strict=True):
            error = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
            print(f"{name} {dtype} {run.__name__}: relative difference {error:.1e}")
        report(f"{name} layer, {dtype}, {run.__name__}", interleaved(found, rounds, WARMUP, device))
    os.environ["DETRELLIS_MSDA"] = ""


def report(
    what: str, seconds: dict[str, list[float]], memory: dict[str, float] | None = None
) -> None:
    """A table, each line relative to the first."""
    print(what)
    first = statistics.median(next(iter(seconds.values())))
    least = next(iter(memory.values())) if memory else 1.0
    for name, timed in seconds.items():
        median = statistics.median(timed)
        held = f"  {memory[name] / 2**20:7.0f} MiB {memory[name] / least:6.3f}x" if memory else ""
        print(f"  {name:42} {median * 1e3:9.2f} ms {median / first:6.3f}x{held}", flush=True)


class Counted(TorchDispatchMode):
    """Counts the operations that are dispatched within it, also by what is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled layers run as they are, and not operation by operation for this mode."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


def operations(step: Callable[[], object]) -> int:
    """The operations of one step and, on a CPU, the kernels that compiled layers call."""
    with Counted() as counted:
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        step()
    # Those within an operation of ours belong to it.
    kernels = [e for e in profiled.events() if e.name.startswith(KERNEL) and not _within(e)]
    return counted.operations + len(kernels)


def _within(event: FunctionEvent) -> bool:
    while (event := event.cpu_parent) is not None:
        if event.name.startswith("detrellis::"):
            return True
    return False


def steps(
    recipe: str, size: tuple[int, int], rounds: int, device: str, *, compiled: bool = False
) -> None:
    """Whole training steps of a recipe, without and with schemes."""
    named = {" ".join((v.scheme, *v.override)): v for v in STEPS[recipe]}
    variants = {
        name: Stepper(recipe, v, size, device) for name, v in [("without", None), *named.items()]
    }
    if compiled:
        inductor.cpp.enable_kernel_profile = True
        for stepper in variants.values():
            compile_layers(stepper.model, torch.device(device))
    memory = {name: peak(stepper, device) for name, stepper in variants.items()}
    for name, stepper in variants.items():
        print(f"{recipe} {name}: {operations(partial(stepper, 0))} operations a step", flush=True)
    calls = {name: partial(stepper, 0) for name, stepper in variants.items()}
    seconds = interleaved(calls, rounds, WARMUP, device)
    report(
        f"{recipe}, {size[1]}x{size[0]}, training step",
        seconds,
        memory if device == "cuda" else None,
    )


def peak(stepper: Stepper, device: str) -> float:
    """Bytes that a step takes at most, the model's own weights and averages included."""
    stepper(0)  # makes the averages, compiles
    if device != "cuda":
        return 0.0
    own = sum(t.nbytes for t in (*stepper.model.parameters(), *stepper.model.buffers()))
    own += sum(
        t.nbytes
        for s in stepper.optimizer.state.values()
        for t in s.values()
        if isinstance(t, Tensor)
    )
    stepper.optimizer.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stepper(0)
    found = own + torch.cuda.max_memory_allocated() - before
    stepper.optimizer.zero_grad(set_to_none=True)
    return found


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--short", type=int, default=800)
    parser.add_argument("--recipe", choices=STEPS, action="append")
    parser.add_argument("--compile", action="store_true", help="compile encoder and decoder layers")
    parser.add_argument("--device", default="cuda", help="cpu only tries the script")
    args = parser.parse_args()
    size = (args.short, round(args.short * 5 / 3))
    print(
        torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch",
        torch.__version__,
    )
    for name in ("encoder", "decoder"):
        for dtype in (torch.float32, torch.bfloat16):
            attention(name, dtype, size, args.rounds, args.device)
    for recipe in args.recipe or STEPS:
        area = (192, 256) if recipe == "tiny" else size
        steps(recipe, area, args.rounds, args.device, compiled=args.compile)


if __name__ == "__main__":
    main()
