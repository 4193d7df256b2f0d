"""Dense multi-head attention: of query blocks over themselves, and of anything over the memory.

Group DETR, H-DETR, denoising and Co-DETR all send extra queries through the decoder together with
the main ones. Each block attends within itself only; equal copies inside a block are folded into
the batch, so cost and memory are linear in their number and no mask over all queries exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from detrellis.precision import slow_in_bfloat16
from detrellis.types import Memory, Segment, Spatial

# What computes attention on a GPU. Not cuDNN, torch's first choice for bf16 on Hopper, whose
# backward pass gives gradients that are not numbers for some lengths (pytorch issue 196678).
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

Rows = tuple[Tensor, Tensor, Tensor]  # a segment's q, k, v, (B, M, N, d or e)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention `(B, M, N, e)`;
    with a mask only to where it is True, or with it added to logits.
    """
    if slow_in_bfloat16(q):
        with torch.autocast("cpu", enabled=False):
            q, k, v = (rows.float() for rows in (q, k, v))
            mask = mask.float() if mask is not None and mask.is_floating_point() else mask
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    with sdpa_kernel(BACKENDS):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def _fold(x: Tensor, copies: int) -> Tensor:
    """`(B, M, K*n, d)` to `(B*K, M, n, d)`: each copy becomes a batch entry of its own."""
    if copies == 1:
        return x
    batch, heads, length, width = x.shape
    x = x.view(batch, heads, copies, length // copies, width).transpose(1, 2)
    return x.reshape(batch * copies, heads, length // copies, width)


def _unfold(x: Tensor, copies: int) -> Tensor:
    """The inverse of `_fold`."""
    if copies == 1:
        return x
    batch, heads, length, width = x.shape
    x = x.view(batch // copies, copies, heads, length, width).transpose(1, 2)
    return x.reshape(batch // copies, heads, copies * length, width)


def _copy_mask(size: int, copies: int, seen: int, device: torch.device) -> Tensor:
    """`(size, size + seen)` bool, True where a query may look:
    its own copy, and everything seen.
    """
    copy = torch.arange(size, device=device) // (size // copies)
    same = copy[:, None] == copy[None, :]
    return torch.cat([same, same.new_ones(size, seen)], dim=1)


def _used_mask(unused: Tensor, size: int) -> Tensor:
    """`(B, 1, size, n)` bool, True where the first `size` of `n` queries may look, of which
    `unused (B, n)` are read by nobody but themselves: a softmax over nothing is NaN."""
    itself = torch.eye(size, unused.shape[1], dtype=torch.bool, device=unused.device)
    return ~unused[:, None, None] | itself


def _biased(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Both as one mask: the bias where there is one, and nothing where the mask is False."""
    if bias is None:
        return mask
    bias = bias.to(dtype)
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def segmented_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], dropout: float = 0.0
) -> Tensor:
    """Attention of each segment over itself, copy by copy, and over the segments that it `sees`.

    `q, k (B, M, N, d)`, `v (B, M, N, e)` with `M` heads, `N` the segments' sizes together. Returns
    `(B, M, N, e)`. A name in `sees` that is no segment's is passed over.
    """
    if len(segments) <= 1 and all(
        s.copies == 1 and s.unused is None and s.bias is None for s in segments
    ):
        return _attend(q, k, v, None, dropout)
    # The rows of each segment. Contiguous: the backward pass of one must not keep the projections
    # of all.
    sizes = [s.size for s in segments]
    split = (t.split(sizes, dim=2) for t in (q, k, v))
    rows: dict[str, Rows] = {}
    for s, q_rows, k_rows, v_rows in zip(segments, *split, strict=True):
        rows[s.name] = q_rows.contiguous(), k_rows.contiguous(), v_rows.contiguous()
    attended = []
    for s in segments:
        seen = [other for name in s.sees for other in segments if other.name == name]
        if seen:
            attended.append(_attend_seen(s, seen, rows, dropout))
        else:
            q, k, v = (_fold(t, s.copies) for t in rows[s.name])
            size = s.size // s.copies
            mask = None if s.unused is None else _used_mask(s.unused.reshape(-1, size), size)
            mask = _biased(mask, s.bias, q.dtype)
            attended.append(_unfold(_attend(q, k, v, mask, dropout), s.copies))
    return torch.cat(attended, dim=2)


def _attend_seen(
    segment: Segment, seen: Sequence[Segment], rows: Mapping[str, Rows], dropout: float
) -> Tensor:
    """Attention of a segment's copies over themselves and over what they see.

    Such a segment has few queries (denoising): one rectangular mask costs its own rows only.
    """
    q, size, parts = rows[segment.name][0], segment.size, [segment, *seen]
    keys, values = (torch.cat([rows[part.name][i] for part in parts], dim=2) for i in (1, 2))
    mask = None
    if segment.copies > 1:
        mask = _copy_mask(size, segment.copies, keys.shape[2] - size, q.device)
    if any(part.unused is not None for part in parts):
        none = torch.zeros(q.shape[0], keys.shape[2], dtype=torch.bool, device=q.device).split(
            [p.size for p in parts], 1
        )
        unused = [
            empty if p.unused is None else p.unused for p, empty in zip(parts, none, strict=True)
        ]
        used = _used_mask(torch.cat(unused, dim=1), size)
        mask = used if mask is None else mask & used
    return _attend(q, keys, values, _biased(mask, segment.bias, q.dtype), dropout)


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    dropout: float = 0.0,
    readable: Tensor | None = None,
) -> Tensor:
    """Attention to all tokens that are not padding: `q (B, M, N, d)`, `k (B, M, S, d)`,
    `v (B, M, S, e)`, `padding (B, S)`, to `(B, M, N, e)`. Where each query reads tokens of its own,
    `readable (B, N, S)` says which."""
    if readable is not None:
        return _attend(q, k, v, readable.unsqueeze(1), dropout)
    mask = None if padding is None else ~padding[:, None, None]
    return _attend(q, k, v, mask, dropout)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split the channels of `x (B, N, M * d)` into heads: `(B, M, N, d)`."""
    split: Tensor = x.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """The inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)


class PackedLinear(nn.Linear):
    """Several projections `(D, D)` as one matrix,
    one below the other, as `nn.MultiheadAttention` keeps q, k and v.
    """

    product: ClassVar[Callable[..., Tensor]] = staticmethod(F.linear)

    def parts(self, inputs: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """What the next `count` projections, side by side,
        make of each of `inputs (..., D)`: `(..., count * D)`.
        """
        rows = [count * self.in_features for count in counts]
        layers = zip(inputs, self.weight.split(rows), self.bias.split(rows), strict=True)
        return [self.product(x, weight, bias) for x, weight, bias in layers]


def _packed_projections(width: int) -> tuple[PackedLinear, nn.Linear]:
    """Projections to queries, keys and values,
    in this order and initialised together, and of the output.
    """
    projections, output = PackedLinear(width, 3 * width), nn.Linear(width, width)
    for layer in (projections, output):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return projections, output


def project(
    projections: PackedLinear, x: Tensor, where: Spatial, memory: Memory, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `(B, M, N, d)` from `x (B, N, D)`, keys and values `(B, M, S, d)` from the memory;
    positions are added to what becomes queries and keys."""
    inputs = (x + where.position, memory.tokens + memory.position, memory.tokens)
    q, k, v = (split_heads(t, heads) for t in projections.parts(inputs, (1, 1, 1)))
    return q, k, v


class SelfAttention(nn.Module):
    """Multi-head self-attention of query blocks,
    the position added to queries and keys, not to values.
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.projections, self.output = _packed_projections(width)

    def forward(self, x: Tensor, position: Tensor, segments: Sequence[Segment]) -> Tensor:
        """What `x (B, N, D)` at its `position (B, N, D)` reads,
        `(B, N, D)`, without residual and norm.
        """
        qk, v = self.projections.parts((x + position, x), (2, 1))
        q, k = qk.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        v = split_heads(v, self.heads)
        attended = segmented_attention(q, k, v, segments, self.dropout if self.training else 0.0)
        out: Tensor = self.output(merge_heads(attended))
        return out


class DenseAttention(nn.Module):
    """Multi-head attention to every token of the memory,
    with positions added to queries and keys (DETR).

    In the encoder the queries are the memory's own tokens.
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.projections, self.output = _packed_projections(width)

    def forward(self, x: Tensor, where: Spatial, memory: Memory) -> Tensor:
        """What `x (B, N, D)` reads from the memory, `(B, N, D)`, without residual and norm."""
        q, k, v = project(self.projections, x, where, memory, self.heads)
        dropout = self.dropout if self.training else 0.0
        attended = memory_attention(q, k, v, memory.padding, dropout, where.readable)
        out: Tensor = self.output(merge_heads(attended))
        return out
