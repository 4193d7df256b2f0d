"""Semantic attention (SAM-DETR) under Gaussian priors (SMCA):
what a decoder layer keeps and saves; on one thread.

    python benchmarks/semantic.py

One image of 800x1333 pixels, 300 queries, 256 channels, 8 heads. The plain forms that it is
compared with stand below: priors as two numbers for each cell of each head and query, keys expanded
to the heads, and RoIAlign twice.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch
from common import Row, arguments, best, describe, finish, interleaved, saved_bytes, storages_of
from torch import Tensor
from torchvision.ops import roi_align

from detrellis.boxes import cxcywh_to_xyxy
from detrellis.nn import semantic as semantic_module
from detrellis.nn.accelerate import accelerate
from detrellis.nn.attention import split_heads
from detrellis.nn.conditional import ConditionalSelfAttention
from detrellis.nn.decoder import DecoderLayer
from detrellis.nn.mlp import FeedForward
from detrellis.nn.prior import map_attention
from detrellis.nn.semantic import CELLS, SemanticAligner, SemanticCrossAttention
from detrellis.types import Memory, Prior, Segment, Spatial

WIDTH, HEADS, QUERIES = 256, 8, 300
MAPS = {8: (100, 167), 32: (25, 42)}  # by stride: SAM-DETR++'s finest, and SAM-DETR's


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Memory,
    prior: Prior | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`map_attention`, as one writes it down:
    for keys `(B, 1, S, e)` that all heads share, without dropout.
    """
    logits = q @ k.repeat(1, q.shape[1], 1, 1).transpose(2, 3) * q.shape[-1] ** -0.5
    if prior is not None:
        height, width = memory.shapes[0]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        cells = torch.stack([x, y], dim=-1).flatten(0, 1) + prior.first  # (S, 2)
        centre, scale = (t.transpose(1, 2).unsqueeze(3) for t in prior[:2])  # (B, M, N, 1, 2)
        logits = logits - (((cells - centre) * scale) ** 2).sum(-1) / 8
    weights = logits.softmax(-1)
    return weights @ v, weights


def twice(features: Tensor, boxes: Tensor, ratio: Tensor) -> Tensor:
    """`region_features` by torchvision, once for the points and once for the contents."""
    height, width = features.shape[-2:]
    corners = list(cxcywh_to_xyxy(boxes) * torch.tensor([width, height, width, height]))
    points, contents = (roi_align(features, corners, CELLS, aligned=True) for _ in range(2))
    return (points + contents) / 2


def make_layer(*, prior: bool) -> DecoderLayer:
    """One of SAM-DETR's."""
    attention = SemanticCrossAttention(WIDTH, HEADS, SemanticAligner(WIDTH, HEADS, prior=prior))
    layer = DecoderLayer(
        ConditionalSelfAttention(WIDTH, HEADS), attention, FeedForward(WIDTH, 2048), WIDTH
    )
    accelerate(layer)
    return layer


def inputs(shape: tuple[int, int]) -> tuple[Tensor, Spatial, Memory]:
    """Queries with boxes as they are initialised, and a memory of one map."""
    tokens = shape[0] * shape[1]
    memory = Memory(
        torch.randn(1, tokens, WIDTH, requires_grad=True), torch.randn(1, tokens, WIDTH), (shape,)
    )
    where = Spatial(torch.randn(1, QUERIES, WIDTH), torch.randn(1, QUERIES, 4).sigmoid())
    return torch.randn(1, QUERIES, WIDTH, requires_grad=True), where, memory


def peak_bytes(forward: Callable[[], object]) -> int:
    """The most memory that a pass holds at one time beyond what was there before."""
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as found:
        forward()
    results = found.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in results if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def compare_memory() -> list[Row]:
    """A layer under priors at stride 8: saved for backward, and the peak of its forward pass."""
    layer = make_layer(prior=True)
    x, where, memory = inputs(MAPS[8])
    ignore = storages_of(x, *where[:2], memory.tokens, memory.position, *layer.parameters())

    def forward() -> Tensor:
        out: Tensor = layer(x, where, memory, (Segment("main", QUERIES),))[0]
        return out

    ours = forward().detach(), saved_bytes(forward, ignore), peak_bytes(forward)
    with patch.object(semantic_module, "map_attention", plain_attention):
        plain = forward().detach(), saved_bytes(forward, ignore), peak_bytes(forward)
    torch.testing.assert_close(ours[0], plain[0], atol=1e-4, rtol=1e-4)
    rows = []
    for i, what in ((1, "saved for backward"), (2, "peak of a forward pass")):
        print(f"{what}: {ours[i] / 2**20:.0f} MiB, plain {plain[i] / 2**20:.0f} MiB")
        rows.append(Row(f"layer with priors at stride 8, {what}", ours[i] / plain[i], 0.33, "x"))
    return rows


def layer_steps(shape: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """Forward and backward of a layer without priors, with RoIAlign once and twice."""
    layer, (x, where, memory) = make_layer(prior=False), inputs(shape)

    def once() -> None:
        layer(x, where, memory, (Segment("main", QUERIES),))[0].sum().backward()

    def released() -> None:
        with patch.object(semantic_module, "region_features", twice):
            once()

    return {"layer": once, "RoIAlign twice": released}


def compare_layers(rounds: int) -> list[Row]:
    """Times of a layer at both strides."""
    rows = []
    for stride, shape in MAPS.items():
        seconds = interleaved(layer_steps(shape), rounds, warmup=1)
        print(f"stride {stride}")
        for name, values in seconds.items():
            print(describe(name, values))
        once, released = (best(values) for values in seconds.values())
        rows.append(
            Row(
                f"layer at stride {stride} against torchvision's RoIAlign twice",
                once / released,
                0.4,
                "x",
            )
        )
    return rows


def compare_keys(rounds: int) -> list[Row]:
    """Attention alone at stride 8,
    with keys that the heads share and with keys expanded to them.
    """
    memory = inputs(MAPS[8])[2]
    q = torch.randn(1, HEADS, QUERIES, WIDTH, requires_grad=True)
    k, v = memory.tokens.unsqueeze(1), split_heads(memory.tokens, HEADS)
    forms = {"shared keys": map_attention, "expanded keys": plain_attention}
    forward = {
        name: lambda attend=attend: attend(q, k, v, memory)[0] for name, attend in forms.items()
    }
    torch.testing.assert_close(*(run().detach() for run in forward.values()), atol=1e-4, rtol=1e-4)
    steps = {name: lambda run=run: run().sum().backward() for name, run in forward.items()}
    seconds = interleaved(steps, rounds)
    saved = {name: saved_bytes(run, storages_of(q, memory.tokens)) for name, run in forward.items()}
    for name, values in seconds.items():
        print(f"{describe(name, values)}, {saved[name] / 2**20:.0f} MiB saved")
    shared, expanded = (best(values) for values in seconds.values())
    return [
        Row("shared against expanded keys at stride 8", shared / expanded, 0.9, "x"),
        Row("the same, saved bytes", saved["shared keys"] / saved["expanded keys"], 0.6, "x"),
    ]


def main() -> None:
    """See the top of the file."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    finish([*compare_memory(), *compare_layers(args.rounds), *compare_keys(args.rounds)], args.json)


if __name__ == "__main__":
    main()
