"""Two-way tables of parameter names.

A table's `Pair` holds our name and theirs. In both, `*` stands for a layer's index, `@` for any
rest, and `{q,k,v}` for several tensors that the other side keeps in one, joined along `dim`. A pair
names a module (its weight, bias and statistics are meant) or one tensor in full. Where theirs has a
`*` that ours has not, they keep one copy a layer of what we share; `|` separates other copies,
under other names. Copies have to be equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from detrellis.errors import UserError

LEAVES = "weight|bias|running_mean|running_var"
# What other checkpoints hold and no detector needs at inference.
IDLE = re.compile(r"num_batches_tracked$|\.relative_position_index$|\.attn_mask$")


class Pair(NamedTuple):
    """A name of ours and theirs: one line of a table.
    `dim` is the one along which several are joined.
    """

    ours: str
    theirs: str
    dim: int = 0


class Link(NamedTuple):
    """The same numbers in both layouts:
    `ours` joined are `theirs` joined; one of the two is a single tensor.
    """

    ours: tuple[str, ...]
    theirs: tuple[tuple[str, ...], ...]  # of each joined tensor, all its copies
    dim: int


def expand(text: str) -> list[str]:
    """`a.{q,k}.b` to `a.q.b`, `a.k.b`."""
    braces = re.search(r"\{(.*?)\}", text)
    if braces is None:
        return [text]
    return [
        text[: braces.start()] + choice + text[braces.end() :] for choice in braces[1].split(",")
    ]


def link_up(keys: Iterable[str], table: Sequence[Pair], layers: int) -> list[Link]:
    """The links of all `keys` of our detector; `layers`:
    of the decoder, for copies that are one a layer.

    A key that no pair knows is left out: see `missing`.
    """
    links: dict[tuple[str, ...], Link] = {}
    patterns = [(re.compile(_pattern(name)), pair) for pair in table for name in expand(pair.ours)]
    for key in (k for k in keys if not IDLE.search(k)):
        for pattern, pair in patterns:
            if match := pattern.fullmatch(key):
                link = _link(pair, match, layers)
                links[link.ours] = link
                break
    return list(links.values())


def _pattern(name: str) -> str:
    text = re.escape(name).replace(r"\*", r"(?P<index>\d+)").replace("@", "(?P<rest>.+)")
    return text if "@" in name else rf"{text}(?:\.(?P<leaf>{LEAVES}))?"


def _link(pair: Pair, match: re.Match[str], layers: int) -> Link:
    groups = match.groupdict()
    leaf = f".{groups['leaf']}" if groups.get("leaf") else ""

    def filled(text: str) -> str:
        return (
            text.replace("*", groups.get("index") or "*").replace("@", groups.get("rest") or "@")
            + leaf
        )

    parts: list[list[str]] = []
    for alternative in pair.theirs.split("|"):
        for i, name in enumerate(filled(n.strip()) for n in expand(alternative)):
            names = (
                [name.replace("*", str(layer)) for layer in range(layers)]
                if "*" in name
                else [name]
            )
            if len(parts) <= i:
                parts.append([])
            parts[i] += names
    return Link(
        tuple(filled(n) for n in expand(pair.ours)), tuple(tuple(p) for p in parts), pair.dim
    )


def to_ours(
    weights: Mapping[str, Tensor], links: Sequence[Link], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Their weights in our layout.
    `UserError` where a tensor is missing, has another shape, or has unequal copies.
    """
    out: dict[str, Tensor] = {}
    for link in links:
        parts = [_one(weights, names) for names in link.theirs]
        if len(link.ours) == 1:
            pieces = [torch.cat(parts, link.dim) if len(parts) > 1 else parts[0]]
        else:
            pieces = list(
                parts[0].split([shapes[name][link.dim] for name in link.ours], dim=link.dim)
            )
        for name, piece in zip(link.ours, pieces, strict=True):
            if piece.shape != shapes[name]:
                raise UserError(
                    f"{link.theirs[0][0]} has the shape {tuple(piece.shape)}, expected "
                    f"{tuple(shapes[name])}",
                    "The weights do not belong to this configuration.",
                )
            out[name] = piece.contiguous()
    return out


def _one(weights: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    present = [n for n in names if n in weights]
    if not present:
        raise UserError(f"{names[0]} is missing", "The file is not complete, or of another model.")
    first = weights[present[0]]
    for other in present[1:]:
        if not torch.equal(first, weights[other]):
            raise UserError(
                f"{present[0]} and {other} differ, which in this configuration are one tensor",
                "The weights do not belong to this configuration.",
            )
    return first


def to_theirs(weights: Mapping[str, Tensor], links: Sequence[Link]) -> dict[str, Tensor]:
    """Our weights (or gradients) in their layout, every copy of them."""
    out: dict[str, Tensor] = {}
    for link in links:
        pieces = [weights[name] for name in link.ours]
        joined = torch.cat(pieces, link.dim) if len(pieces) > 1 else pieces[0]
        for names, part in zip(link.theirs, joined.chunk(len(link.theirs), link.dim), strict=True):
            out |= {name: part.clone() for name in names}
    return out


def missing(keys: Iterable[str], links: Sequence[Link]) -> list[str]:
    """Our keys that no link gives."""
    known = set(chain.from_iterable(link.ours for link in links))
    return [k for k in keys if k not in known and not IDLE.search(k)]


def unused(weights: Iterable[str], links: Sequence[Link]) -> list[str]:
    """Their tensors that no link reads."""
    known = set(chain.from_iterable(chain.from_iterable(link.theirs for link in links)))
    return [k for k in weights if k not in known and not IDLE.search(k)]
