"""Matrix products of a linear layer in float32, torch's own against oneDNN's
(`nn/kernels/linear.py`), and a ResNet-50 with channels last or first. One thread, taking turns.

    python benchmarks/linear.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import arguments, interleaved
from torch import Tensor

from detrellis.nn.backbone import ResNet
from detrellis.nn.kernels.linear import onednn_linear

ROWS, INPUTS, OUTPUTS = 4250, 256, 1024  # two images of 320x320 through a feed-forward block


def products(layer: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
    """Forward, and both gradients: three products."""
    x = torch.randn(ROWS, INPUTS, requires_grad=True)
    weight = torch.randn(OUTPUTS, INPUTS, requires_grad=True)
    gradient = torch.randn(ROWS, OUTPUTS)
    return lambda: torch.autograd.grad(layer(x, weight), (x, weight), gradient)


def backbone(memory_format: torch.memory_format) -> Callable[[], object]:
    """Forward of one image of 640x640."""
    model = ResNet("resnet50", (8, 16, 32), pretrained=None, norm="frozen").to(
        memory_format=memory_format
    )
    pixels = torch.randn(1, 3, 640, 640).to(memory_format=memory_format)

    def run() -> Tensor:
        x = model.stem(pixels)
        for stage in model.stages.values():
            x = stage(x)
        return x

    return torch.no_grad()(run)


def main() -> None:
    """See the top of the file."""
    arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    work = 3 * 2 * ROWS * INPUTS * OUTPUTS / 1e9
    seconds = interleaved(
        {"torch": products(F.linear), "oneDNN": products(onednn_linear)}, 20, warmup=3
    )
    for name, values in seconds.items():
        print(f"{name:14} {work / min(values):6.0f} GFLOP/s in forward and backward")
    formats = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
    seconds = interleaved({name: backbone(kind) for name, kind in formats.items()}, 6, warmup=1)
    for name, values in seconds.items():
        print(f"{name:14} {min(values) * 1000:6.0f} ms for a ResNet-50 at 640x640")


if __name__ == "__main__":
    main()
