"""A trained detector in each form that it can be exported to, a picture at a time on one thread,
side by side.

    python benchmarks/exports.py RUN --size 192x256 [--folder FILES] [--no-int8] [--rounds 60]

The files are written first, which takes minutes; those that are in the folder are taken as they
are. Eight bits are calibrated on the run's own data. What is timed is the network, from pixels in
memory to logits and boxes: no decoding, no post-processing. The process keeps to one core, since
runtimes have threads of their own.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import arguments, interleaved

from detrellis.engine.bench import parse_size
from detrellis.exported import load_exported
from detrellis.exporting.graph import ExportGraph
from detrellis.exporting.run import export
from detrellis.loading import load_trained

# What to call each, and how it is exported; the suffix of its file
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ONNX Runtime, float32": (".onnx", {}),
    "ONNX Runtime, float16": (".onnx", {"fp16": True}),
    "OpenVINO, float32": (".xml", {"format": "openvino"}),
    "OpenVINO, float16": (".xml", {"format": "openvino", "fp16": True}),
    "OpenVINO, int8": (".xml", {"format": "openvino", "int8": True}),
}


def variants(
    run: Path, size: tuple[int, int], int8: bool, folder: Path
) -> dict[str, Callable[[], object]]:
    """Each form of the run's network, on the same picture."""
    pixels = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    model = load_trained(run, "cpu")
    called: dict[str, Callable[[], object]] = {}
    for name, detector in (("torch", model.detector), ("torch, fused", model.detector.fused())):
        network = ExportGraph(detector.eval(), model.normalise, None)
        called[name] = partial(network, pixels)
    for number, (name, (suffix, options)) in enumerate(FORMS.items()):
        if int8 or not options.get("int8"):
            out = folder / f"{number}{suffix}"
            if not out.exists():
                export(run, out, size=size, **options)
            network = load_exported(out)[0].network.run
            called[name] = partial(network, pixels.numpy())
    return called


@torch.no_grad()
def main() -> None:
    """See the top of the file."""
    parser = arguments(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--size", default="192x256", help="height x width of the picture")
    parser.add_argument("--no-int8", action="store_true", help="leave eight bits out")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("exports"), help="of the files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    called = variants(args.run, parse_size(args.size), not args.no_int8, args.folder)
    seconds = interleaved(called, args.rounds, warmup=5)
    base = statistics.median(seconds["torch, fused"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{name:22} median {median * 1e3:6.1f} ms, fastest {min(values) * 1e3:6.1f} ms; "
            f"{median / base:.2f} of fused torch"
        )


if __name__ == "__main__":
    main()
