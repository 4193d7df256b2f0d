"""Self-attention of groups of queries:
folded into the batch, against one mask over all queries; on one thread.

    python benchmarks/groups.py

Two images, 256 channels, 8 heads, forward and backward pass with the projections, as in
performance.md's table. The masked form is the readable reference that tests/nn/test_attention.py
compares with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Row, arguments, best, describe, finish, interleaved, saved_bytes, storages_of
from torch import Tensor

from detrellis.nn.accelerate import accelerate
from detrellis.nn.attention import SelfAttention, merge_heads, split_heads
from detrellis.types import Segment

BATCH, WIDTH, HEADS = 2, 256, 8


def masked(attention: SelfAttention, x: Tensor, position: Tensor, groups: int) -> Tensor:
    """One attention over all queries, with a mask that keeps the groups apart."""
    group = torch.arange(x.shape[1]) // (x.shape[1] // groups)
    q, k, v = attention.projections.weight.chunk(3)
    biases = attention.projections.bias.chunk(3)
    inputs = zip((x + position, x + position, x), (q, k, v), biases, strict=True)
    parts = [split_heads(F.linear(*part), HEADS) for part in inputs]
    out: Tensor = F.scaled_dot_product_attention(*parts, attn_mask=group[:, None] == group[None])
    return F.linear(merge_heads(out), attention.output.weight, attention.output.bias)


def compare(rounds: int) -> list[Row]:
    """Times and saved bytes for the sizes of the papers."""
    torch.manual_seed(0)
    attention = SelfAttention(WIDTH, HEADS)
    accelerate(attention)
    steps, saved = {}, {}
    for groups, count, form in (
        (1, 300, "folded"),
        (11, 300, "folded"),
        (11, 300, "masked"),
        (3, 900, "folded"),
    ):
        x = torch.randn(BATCH, groups * count, WIDTH, requires_grad=True)
        position = torch.randn(BATCH, groups * count, WIDTH)
        first = Segment("main", count)
        segments = (
            (first, Segment("group", (groups - 1) * count, groups - 1)) if groups > 1 else (first,)
        )

        def forward(x=x, position=position, segments=segments, groups=groups, form=form) -> Tensor:
            if form == "masked":
                return masked(attention, x, position, groups)
            return attention(x, position, segments)

        name = f"{groups} x {count} {form}"
        steps[name] = lambda forward=forward: forward().sum().backward()
        saved[name] = saved_bytes(forward, storages_of(x, position, *attention.parameters()))
    reference = masked(attention, x, position, 3)
    torch.testing.assert_close(attention(x, position, segments), reference, atol=1e-4, rtol=1e-4)
    seconds = interleaved(steps, rounds)
    for name, values in seconds.items():
        print(f"{describe(name, values)}, {saved[name] / 2**20:.0f} MiB saved")
    fastest = {name: best(values) for name, values in seconds.items()}
    one, many = "1 x 300 folded", "11 x 300 folded"
    return [
        Row("11 groups against one, per group", fastest[many] / fastest[one] / 11, 1.3, "x"),
        Row(
            "11 groups against one, saved bytes per group", saved[many] / saved[one] / 11, 1.3, "x"
        ),
        Row(
            "masked against folded, 11 x 300",
            fastest["11 x 300 masked"] / fastest[many],
            5.0,
            "x",
            at_least=True,
        ),
    ]


def main() -> None:
    """See the top of the file."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    finish(compare(args.rounds), args.json)


if __name__ == "__main__":
    main()
