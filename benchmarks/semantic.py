"""Semantic attention (SAM-DETR) under Gaussian priors (SMCA): what a decoder layer keeps, and what it saves; one thread.

    python benchmarks/semantic.py

One image of 800x1333 pixels, 300 queries, 256 channels, 8 heads. The plain forms that it is compared with stand below:
priors as two numbers for each cell of each head and query, keys expanded to the heads, RoIAlign twice, as released.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch
from common import Row, arguments, best, describe, finish, interleaved, saved_bytes, storages_of
from torch import Tensor

from detrellis.nn import semantic as semantic_module
from detrellis.nn.attention import split_heads
from detrellis.nn.conditional import ConditionalSelfAttention
from detrellis.nn.decoder import DecoderLayer
from detrellis.nn.mlp import FeedForward
from detrellis.nn.prior import map_attention
from detrellis.nn.semantic import SemanticAligner, SemanticCrossAttention, region_features
from detrellis.types import Memory, Prior, Segment, Spatial

WIDTH, HEADS, QUERIES = 256, 8, 300
MAPS = {8: (100, 167), 16: (50, 84), 32: (25, 42)}


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, memory: Memory, prior: Prior | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`map_attention`, as one writes it down: for keys `(B, 1, S, e)` that all heads share, without dropout."""
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
    """`region_features`, computed once for the points and once for the contents."""
    return (region_features(features, boxes, ratio) + region_features(features, boxes, ratio)) / 2


def make_layer(*, prior: bool) -> DecoderLayer:
    """One of SAM-DETR's."""
    attention = SemanticCrossAttention(WIDTH, HEADS, SemanticAligner(WIDTH, HEADS, prior=prior))
    return DecoderLayer(ConditionalSelfAttention(WIDTH, HEADS), attention, FeedForward(WIDTH, 2048), WIDTH)


def inputs(shape: tuple[int, int]) -> tuple[Tensor, Spatial, Memory]:
    """Queries with boxes as they are initialised, and a memory of one map."""
    tokens = shape[0] * shape[1]
    memory = Memory(torch.randn(1, tokens, WIDTH, requires_grad=True), torch.randn(1, tokens, WIDTH), (shape,))
    where = Spatial(torch.randn(1, QUERIES, WIDTH), torch.randn(1, QUERIES, 4).sigmoid())
    return torch.randn(1, QUERIES, WIDTH, requires_grad=True), where, memory


def peak_bytes(forward: Callable[[], object]) -> int:
    """The most memory that a pass holds at one time beyond what was there before."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as found:
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
        out: Tensor = layer(x, where, memory, (Segment("main", QUERIES),))
        return out

    ours = forward().detach(), saved_bytes(forward, ignore), peak_bytes(forward)
    with patch.object(semantic_module, "map_attention", plain_attention):
        plain = forward().detach(), saved_bytes(forward, ignore), peak_bytes(forward)
    torch.testing.assert_close(ours[0], plain[0], atol=1e-4, rtol=1e-4)
    rows = []
    for i, what in ((1, "saved for backward"), (2, "peak of a forward pass")):
        print(f"{what}: {ours[i] / 2**20:.0f} MiB, plain {plain[i] / 2**20:.0f} MiB")
        rows.append(Row(f"layer with priors at stride 8 against the plain form, {what}", ours[i] / plain[i], 1 / 3, "x"))
    return rows


def layer_steps(stride: int) -> dict[str, Callable[[], object]]:
    """Forward and backward of a layer, with RoIAlign once and twice."""
    layer, (x, where, memory) = make_layer(prior=False), inputs(MAPS[stride])

    def step() -> None:
        layer(x, where, memory, (Segment("main", QUERIES),)).sum().backward()

    def double() -> None:
        with patch.object(semantic_module, "region_features", twice):
            step()

    return {f"layer, stride {stride}": step, f"RoIAlign twice, {stride}": double}


def attention_steps(stride: int) -> dict[str, Callable[[], object]]:
    """Forward and backward of attention alone, with keys shared and expanded."""
    x, _, memory = inputs(MAPS[stride])
    q = torch.randn(1, HEADS, QUERIES, WIDTH, requires_grad=True)
    k = memory.tokens.unsqueeze(1)
    v = split_heads(memory.tokens, HEADS)
    forms = {"shared keys": map_attention, "expanded keys": plain_attention}
    return {
        f"{name}, {stride}": lambda attend=attend: attend(q, k, v, memory)[0].sum().backward()
        for name, attend in forms.items()
    }


def compare_times(rounds: int) -> list[Row]:
    """Ratios at the strides of the recipes."""
    rows = []
    for stride in MAPS:
        one, other = layer_steps(stride), attention_steps(stride)
        seconds = interleaved(one | other, rounds)
        for name, values in seconds.items():
            print(describe(name, values))
        layer, double, shared, expanded = (best(values) for values in seconds.values())
        rows.append(Row(f"layer at stride {stride} against RoIAlign twice", layer / double, 0.8, "x"))
        rows.append(Row(f"shared against expanded keys, stride {stride}", shared / expanded, 1.0, "x"))
    return rows


def main() -> None:
    """See the top of the file."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    finish([*compare_memory(), *compare_times(args.rounds)], args.json)


if __name__ == "__main__":
    main()
