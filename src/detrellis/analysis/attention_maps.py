"""What a detector's queries attend to, whatever kind of cross-attention it has.

Nothing in the network is changed or slowed for it: the inputs of the cross-attentions are kept
while the decoder runs, and weights and points are read off a second run of each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from detrellis.detector import Detector
from detrellis.errors import UserError
from detrellis.types import DecoderOutput, Memory, Segment

# The arguments that a cross-attention was called with: queries, a `Spatial`, a `Memory`
Call = tuple[Any, ...]


@contextlib.contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[Call]]:
    """The arguments of these modules' calls,
    in the order of the calls, while the context is open.
    """
    calls: list[Call] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
        for module in modules
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


class RecordedAttention(NamedTuple):
    """A decoder layer's cross-attention, and what it was called with."""

    attention: nn.Module
    call: Call


def decode_recorded(
    detector: Detector, memory: Memory
) -> tuple[DecoderOutput, list[RecordedAttention]]:
    """Every layer's output for the main queries, and every layer's cross-attention."""
    queries, _ = detector.propose(memory)
    attentions = [layer.get_submodule("cross_attention") for layer in detector.decoder.layers]
    with recorded(attentions) as calls:
        output = detector.decode(memory, {Segment("main", queries.content.shape[1]): queries})[
            "main"
        ]
    return output, [RecordedAttention(*pair) for pair in zip(attentions, calls, strict=True)]


def token_weights(attention: nn.Module, call: Call, chosen: Tensor) -> Tensor:
    """The attention weight of every token, summed over the `chosen (B, N)` queries (0 or 1):
    `(B, S)`.

    Mean over heads: the sum over tokens is the number of chosen queries, less what deformable
    attention samples outside the image. Raises `UserError` for an attention that none of the rules
    here knows.
    """
    weights = head_weights(attention, call, chosen)
    if weights is None:
        raise UserError(
            f"what {type(attention).__name__} attends to cannot be read off it",
            "Compare the encoders: --of encoder.",
        )
    return weights.mean(1)


def head_weights(attention: nn.Module, call: Call, chosen: Tensor) -> Tensor | None:
    """As `token_weights`, for each head: `(B, M, S)`.
    What reads one level gives the tokens of others 0.
    """
    if hasattr(attention, "attentions"):
        return _weights_over_levels(attention, call, chosen)
    reader, (x, where, memory) = _reader(attention, call)
    if hasattr(reader, "sampling_offsets"):
        return _sampled_weights(reader, (x, where, memory), chosen)
    with torch.no_grad():
        if hasattr(reader, "aligner"):
            _, weights = reader.attend(reader.aligner(x, where.references, memory), memory)
        elif where.priors is not None:
            weights = torch.cat(reader.attend(x, where, memory)[1], dim=-1)
        else:
            weights = _softmax_weights(reader, (x, where, memory))
    if weights is None:
        return None
    summed = torch.einsum("bmns,bn->bms", weights, chosen.to(weights))
    sizes = [height * width for height, width in call[2].shapes]
    before = sum(sizes[: getattr(attention, "level", 0)])
    return F.pad(summed, (before, sum(sizes) - before - summed.shape[-1]))


def head_points(attention: nn.Module, call: Call) -> Tensor | None:
    """Where each head of each query samples the image:
    `(B, N, M, P, 2)` as fractions of the unpadded image.

    One point for heads of aligned queries, one for each level and sample of deformable attention;
    None for attention that reads everything.
    """
    reader, (x, where, memory) = _reader(attention, call)
    with torch.no_grad():
        if hasattr(reader, "aligner"):
            points: Tensor = reader.aligner(x, where.references, memory).points
            return points.unsqueeze(3)
        return (
            _sampled_points(reader, (x, where, memory))
            if hasattr(reader, "sampling_offsets")
            else None
        )


def _reader(attention: Any, call: Call) -> tuple[Any, Call]:
    """The attention within one that reads one level of several,
    and its call with that level alone.
    """
    if not hasattr(attention, "level"):
        return attention, call
    with torch.no_grad(), recorded([attention.attention]) as calls:
        attention(*call)
    return attention.attention, calls[0]


def _weights_over_levels(attention: Any, call: Call, chosen: Tensor) -> Tensor | None:
    """Of an attention for each level, times what the query gives that level."""
    with torch.no_grad(), recorded(list(attention.attentions)) as calls:
        attention(*call)
        of_levels = attention.weigh(call[0]).softmax(-1).unbind(-1)
    parts = [
        head_weights(reader, part, chosen * weight)
        for reader, part, weight in zip(attention.attentions, calls, of_levels, strict=True)
    ]
    known = [part for part in parts if part is not None]
    return torch.cat(known, dim=-1) if len(known) == len(parts) else None


def _sampled_points(attention: Any, call: Call) -> Tensor:
    x, where, memory = call
    offsets = attention.sampling_offsets(x + where.position)
    offsets = offsets.unflatten(-1, (attention.heads, attention.levels, attention.points, 2))
    ratios = x.new_ones(1, 1, 2) if memory.valid_ratios is None else memory.valid_ratios
    references = where.references[:, :, None]
    padded = references * ratios[:, None].repeat(1, 1, 1, references.shape[-1] // 2)
    sampled = ratios if ratios.shape[1] == 1 else ratios[:, attention.order]
    points: Tensor = attention.locations(offsets, padded, memory) / sampled[:, None, None, :, None]
    return points.flatten(3, 4)


def _sampled_weights(attention: Any, call: Call, chosen: Tensor) -> Tensor:
    """Deformable: the result is linear in the tokens' values, so a token's weight is the derivative
    with respect to its value. That is the transpose of bilinear sampling: each point's weight,
    given to the four tokens around it."""
    kept: list[Tensor] = []

    def keep_values(_: nn.Module, inputs: Any, values: Tensor) -> Tensor:
        kept.append(values.detach().requires_grad_())
        return kept[0]

    hooks = [
        attention.value_projection.register_forward_hook(keep_values),
        attention.output_projection.register_forward_pre_hook(
            lambda _, inputs: kept.append(inputs[0])
        ),
    ]
    try:
        with torch.enable_grad():
            attention(*call)
            values, sampled = kept
            # (B, N, M): all have the same weights
            channel = sampled.unflatten(-1, (attention.heads, -1))[..., 0]
            (weights,) = torch.autograd.grad((channel * chosen[..., None]).sum(), values)
    finally:
        for hook in hooks:
            hook.remove()
    by_head: Tensor = weights.unflatten(-1, (attention.heads, -1))[..., 0]
    return by_head.transpose(1, 2)


def _softmax_weights(attention: nn.Module, call: Call) -> Tensor | None:
    """Of dense attention to every token, `(B, M, N, S)`;
    None where the module computes no such attention.
    """
    with _Softmaxes() as softmaxes:
        attention(*call)
    for q, k, mask in softmaxes.calls:
        if k.shape[2] == call[2].tokens.shape[1]:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            if mask is not None:
                scores = (
                    scores.masked_fill(~mask, -torch.inf)
                    if mask.dtype == torch.bool
                    else scores + mask
                )
            weights: Tensor = scores.softmax(-1)
            return weights
    return None


class _Softmaxes(TorchFunctionMode):
    """Keeps queries `(B, M, N, d)`,
    keys `(B, M, S, d)` and mask of every scaled dot product attention within it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls.append((args[0], args[1], kwargs.get("attn_mask")))
        return func(*args, **kwargs)
