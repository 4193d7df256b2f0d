"""Masks compared at sampled points (PointRend, Kirillov et al., 2020; Mask2Former, section 3.3):
what a match costs, and the losses. No mask of a query that is not matched ever exists.

In the matching one set of points serves all queries and targets of an image, and the features are
sampled there, not the masks. The losses look where a mask is least certain: of many candidates for
each matched mask those with the smallest logits are taken, and a few of anywhere. They are computed
anew in the backward pass, which keeps nothing.

Points are `(x, y)` in [0, 1] of the padded image. Bilinear samples of what is true are soft, and
outside there is 0.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from detrellis.types import Assignment, DecoderOutput, MaskFeatures, Targets, on_device

# Masks of a layer and image that are held as whole maps at a time, where the maps are large
PLACE = 64
TOGETHER = 2**19  # cells of their maps, or candidates of their points, that are held at a time
NEAR = 4  # pixels between the samples that the IoU of masks is counted on, along each axis


# What points are for, how many, and a tensor of their type and device, to points `(..., 2)` in [0,
# 1).
Draw = Callable[[tuple[str | int, ...], Sequence[int], Tensor], Tensor]


@dataclass(frozen=True)
class Seeded:
    """Uniform random points, a `Draw`. Each is a function of the seed and of what it is for, so
    that none depends on another, and the backward pass draws again what the forward pass drew."""

    seed: int = 0

    def __call__(
        self, purpose: tuple[str | int, ...], shape: Sequence[int], like: Tensor
    ) -> Tensor:
        """Points `(*shape, 2)`."""
        seed = zlib.crc32(f"{self.seed}/{purpose}".encode())
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.rand(*shape, 2, generator=generator, device=like.device, dtype=like.dtype)


@dataclass(frozen=True)
class Points:
    """Where masks are compared: at `count` points.

    The losses' are chosen from `oversample` times as many, the part `uncertain` of them by how
    uncertain the mask is. `inside`: none lies in the padding of a batch, where otherwise nothing is
    learned but background.
    """

    count: int = 12544
    oversample: float = 3.0
    uncertain: float = 0.75
    inside: bool = False

    @property
    def candidates(self) -> int:
        """Points that the uncertain ones are chosen from."""
        return int(self.oversample * self.count)

    @property
    def chosen(self) -> int:
        """How many are chosen."""
        return int(self.uncertain * self.count)

    def scale(self, masks: MaskFeatures) -> Tensor:
        """The part of the padded images that points may lie in: `(B, 2)` of width and height."""
        whole = masks.map.new_ones(len(masks.map), 2)
        if not self.inside or masks.padding is None:
            return whole
        inside = ~masks.padding
        return torch.stack(
            [inside[:, 0].to(whole).mean(1), inside[:, :, 0].to(whole).mean(1)], dim=1
        )


class Sampling(NamedTuple):
    """How the masks of a step are compared."""

    draw: Draw
    points: Points


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples `(B, C, P)` of `maps (B, C, h, w)` at `points (B, P, 2)`; 0 outside."""
    grid = 2 * points.unsqueeze(1) - 1
    return F.grid_sample(maps, grid.to(maps.dtype), align_corners=False).squeeze(2)


def sample_bitmaps(bitmaps: Tensor, rows: Tensor, points: Tensor) -> Tensor:
    """As `sample`, of the rows `rows (M,)` of `bitmaps (T, H, W)` bool:
    `(M, P)`; `points (M or 1, P, 2)`.

    Reads four pixels a point instead of turning all bitmaps into floating point.
    """
    height, width = bitmaps.shape[1:]
    size = on_device([width, height], points.device, points.dtype)
    x, y = (points * size - 0.5).unbind(-1)
    left, top = x.floor(), y.floor()
    flat, start = bitmaps.flatten(), rows.unsqueeze(1) * (height * width)
    out = torch.zeros(len(rows), points.shape[1], dtype=points.dtype, device=points.device)
    for column, across in ((left, left + 1 - x), (left + 1, x - left)):
        for row, down in ((top, top + 1 - y), (top + 1, y - top)):
            there = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = row.long().clamp(0, height - 1) * width + column.long().clamp(0, width - 1)
            out += flat[start + index] * (there * across * down)
    return out


@dataclass(frozen=True)
class MaskCost:
    """What masks add to a matching cost: cross-entropy and dice at the points, weighted."""

    mask: float = 5.0
    dice: float = 5.0

    def __call__(
        self, output: DecoderOutput, targets: Targets, sampling: Sampling, copies: int
    ) -> Tensor:
        """`(L, B, K, N / K, T)`, T the largest number of targets of an image;
        0 where an image has fewer.
        """
        masks, embeds, bitmaps = parts(output, targets)
        layers, images, queries = embeds.shape[:3]
        largest = max(targets.sizes)
        costs = embeds.new_zeros(layers, images, copies, queries // copies, largest)
        scale = sampling.points.scale(masks)
        rows = torch.arange(len(bitmaps), device=bitmaps.device).split(list(targets.sizes))
        for layer in range(layers):
            points = sampling.draw(
                ("match", layer), (images, sampling.points.count), masks.map
            ) * scale.unsqueeze(1)
            features = sample(masks.map, points)
            for image in (i for i, count in enumerate(targets.sizes) if count):
                truth = sample_bitmaps(bitmaps, rows[image], points[image, None])
                logits = (embed @ features[image] for embed in embeds[layer, image].chunk(copies))
                costs[layer, image, ..., : len(truth)] = torch.stack(
                    [self.pairs(x, truth) for x in logits]
                )
        return costs

    def pairs(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Of every query's `logits (N, P)` with every target's `truth (n, P)`: `(N, n)`."""
        cost = torch.zeros(len(logits), len(truth), dtype=logits.dtype, device=logits.device)
        if self.mask:
            entropy = F.softplus(logits).sum(1, keepdim=True) - logits @ truth.T
            cost += self.mask * entropy / logits.shape[1]
        if self.dice:
            inside = logits.sigmoid()
            areas = inside.sum(1, keepdim=True) + truth.sum(1)
            cost += self.dice * (1 - (2 * (inside @ truth.T) + 1) / (areas + 1))
        return cost


def mask_terms(
    output: DecoderOutput,
    targets: Targets,
    positives: Assignment,
    normaliser: Tensor,
    sampling: Sampling,
    counts: Sequence[Sequence[int]],
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """Terms `mask` and `dice` of the positives,
    each `(L,)`, summed and divided by the number of masks.

    `counts`: positives of each layer and image. `weight (M,)`: of each positive; None: 1.
    """
    masks, embeds, _ = parts(output, targets)
    # In the order of layers, images and queries, which those of denoising are not in.
    _, images, queries = embeds.shape[:3]
    order = ((positives.layer * images + positives.image) * queries + positives.query).argsort(
        stable=True
    )
    layer, image, query, target, _ = (part[order] for part in positives)
    embeds = embeds[layer, image, query]
    places = [
        _Place(layer, image, start, min(PLACE, count - start))
        for layer, of_images in enumerate(counts)
        for image, count in enumerate(of_images)
        for start in range(0, count, PLACE)
    ]
    features, scales = masks.map.unbind(), sampling.points.scale(masks).unbind()
    portions = _portions(
        places, TOGETHER // max(masks.map[0, 0].numel(), sampling.points.candidates)
    )
    sizes = [sum(place.masks for place in portion) for portion in portions]
    losses = [embeds.new_zeros(0, 2)]
    for portion, part, rows in zip(portions, embeds.split(sizes), target.split(sizes), strict=True):
        arguments = (part, features, targets, rows, sampling, scales, portion)
        losses.append(
            checkpoint(_losses, *arguments, use_reentrant=False, preserve_rng_state=False)
        )
    each = torch.cat(losses)
    if weight is not None:
        each = each * weight[order].to(each.dtype).unsqueeze(1)
    terms = each.new_zeros(len(counts), 2).index_add(0, layer, each)
    # Connected where nothing is matched: all parameters get a gradient in every step
    if not places:
        terms = terms + 0 * (embeds.sum() + masks.map.sum())
    mask, dice = (terms / normaliser).unbind(1)
    return {"mask": mask, "dice": dice}


class _Place(NamedTuple):
    """Masks of one layer and image, at most `PLACE`,
    which share what their points are drawn for.
    """

    layer: int
    image: int
    start: int
    masks: int


def _portions(places: Sequence[_Place], limit: int) -> list[list[_Place]]:
    """The places in their order, joined as long as they have not more than `most` masks."""
    portions: list[list[_Place]] = []
    for place in places:
        if not portions or sum(joined.masks for joined in portions[-1]) + place.masks > limit:
            portions.append([])
        portions[-1].append(place)
    return portions


def _losses(
    embeds: Tensor,
    features: Sequence[Tensor],
    targets: Targets,
    rows: Tensor,
    sampling: Sampling,
    scales: Sequence[Tensor],
    places: Sequence[_Place],
) -> Tensor:
    """Cross-entropy and dice loss of each mask, `(m, 2)`: of the embeddings `(m, Dm)` of some
    places, which learn the targets `rows (m,)`, in the `features (Dm, h, w)` and with the
    `scales (2,)` of their images."""
    assert targets.bitmaps is not None
    points = sampling.points

    def draw(purpose: str, count: int) -> Tensor:
        drawn = [
            sampling.draw((purpose, *place[:3]), (place.masks, count), features[0])
            * scales[place.image]
            for place in places
        ]
        return torch.cat(drawn)

    of_places = zip(embeds.split([place.masks for place in places]), places, strict=True)
    logits = torch.cat([embed @ features[place.image].flatten(1) for embed, place in of_places])
    logits = logits.view(-1, 1, *features[0].shape[1:])
    with torch.no_grad():
        candidates = draw("candidates", points.candidates)
        doubt = -sample(logits, candidates).squeeze(1).abs()
        chosen = doubt.topk(points.chosen, sorted=False).indices
        chosen = candidates.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2))
        spots = torch.cat([chosen, draw("anywhere", points.count - points.chosen)], dim=1)
        truth = sample_bitmaps(targets.bitmaps, rows, spots)
    predicted = sample(logits, spots).squeeze(1)
    entropy = F.binary_cross_entropy_with_logits(predicted, truth, reduction="none").mean(1)
    inside = predicted.sigmoid()
    dice = 1 - (2 * (inside * truth).sum(1) + 1) / (inside.sum(1) + truth.sum(1) + 1)
    return torch.stack([entropy, dice], dim=1)


def parts(output: DecoderOutput, targets: Targets) -> tuple[MaskFeatures, Tensor, Tensor]:
    """Features, embeddings `(L, B, N, Dm)` and the targets' bitmaps `(T, H, W)`,
    in the features' precision.
    """
    assert output.masks is not None, "the detector predicts no masks"
    assert output.mask_embeds is not None, "the detector predicts no masks"
    assert targets.bitmaps is not None, "the targets have no bitmaps"
    precise = torch.promote_types(output.masks.map.dtype, torch.float32)
    masks = output.masks._replace(map=output.masks.map.to(precise))
    return masks, output.mask_embeds.to(precise), targets.bitmaps


@torch.no_grad()
def mask_iou(
    output: DecoderOutput, targets: Targets, positives: Assignment, counts: Sequence[Sequence[int]]
) -> Tensor:
    """IoU `(M,)` of the last layer's positives with their targets,
    counted at the middles of the features' cells.
    """
    masks, embeds, bitmaps = parts(output, targets)
    layer, image, query, target, _ = (part[sum(map(sum, counts[:-1])) :] for part in positives)
    truth = bitmaps[:, NEAR // 2 :: NEAR, NEAR // 2 :: NEAR]
    features = masks.map[..., : truth.shape[1], : truth.shape[2]].flatten(2)
    of_images = zip(embeds[layer, image, query].split(list(counts[-1])), features, strict=True)
    inside = torch.cat([embed @ cells > 0 for embed, cells in of_images])
    covered = truth[target].flatten(1)
    return (inside & covered).sum(1) / (inside | covered).sum(1).clamp(min=1)
