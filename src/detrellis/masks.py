"""Masks of detected objects: from a detector's features to run lengths of the original image.

They are drawn a few at a time and packed at once, as COCO packs them (column by column; hotcoco
does it): the bitmaps of 100 detections in a photograph of 12 megapixels would be 1.2 GB.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detrellis.rle import Size, encode
from detrellis.types import MaskFeatures

AT_ONCE = 2**24  # pixels of masks that are drawn at a time


class DrawnMasks(NamedTuple):
    """The masks of `n` embeddings in one image."""

    runs: tuple[bytes, ...]  # compressed run lengths of each
    scores: Tensor  # (n,) mean probability of a mask's pixels; 0 of an empty one
    boxes: Tensor  # (n, 4) pixel xyxy just around each; 0 of an empty one


def draw_masks(
    embeds: Tensor, features: Tensor, padded: Size, frame: Size, size: Size
) -> DrawnMasks:
    """The masks of `embeds (n, Dm)` in an image of `size`,
    of `features (Dm, h, w)` of its batch's `padded` size.

    Logits are enlarged to the padded size, cut to the image's `frame` in it, and resized to the
    original: bilinear both times (Mask2Former). A pixel is in a mask where its logit is above 0.
    """
    dtype = torch.promote_types(embeds.dtype, torch.float32)
    embeds, features = embeds.to(dtype), features.to(dtype)
    pixels = max(padded[0] * padded[1], size[0] * size[1])
    parts = []
    for some in embeds.split(max(AT_ONCE // pixels, 1)):
        logits = torch.einsum("nd,dhw->nhw", some, features)
        enlarged = _resized(logits, padded)[:, : frame[0], : frame[1]]
        parts.append(_packed(_resized(enlarged, size)))
    if not parts:
        return DrawnMasks((), embeds.new_zeros(0), embeds.new_zeros(0, 4))
    runs, scores, boxes = zip(*parts, strict=True)
    return DrawnMasks(
        tuple(run for part in runs for run in part), torch.cat(scores), torch.cat(boxes)
    )


def _resized(maps: Tensor, to: Size) -> Tensor:
    """`(n, height, width)` to another size, or as they are."""
    if maps.shape[1:] == to:
        return maps
    return F.interpolate(maps.unsqueeze(1), to, mode="bilinear", align_corners=False).squeeze(1)


def _packed(logits: Tensor) -> DrawnMasks:
    """Masks of logits `(n, height, width)`."""
    inside = logits > 0
    area = inside.sum(dim=(1, 2))
    scores = (logits.sigmoid() * inside).sum(dim=(1, 2)) / (area + 1e-6)
    boxes = tight_boxes(inside).to(logits.dtype)
    return DrawnMasks(tuple(encode(mask) for mask in inside.cpu().numpy()), scores, boxes)


def tight_boxes(masks: Tensor) -> Tensor:
    """Pixel xyxy `(n, 4)` int64 just around bool masks `(n, height, width)`:
    the last column and row are in it. 0 where a mask is empty."""
    ends = []
    for line in (masks.any(dim=1), masks.any(dim=2)):  # (n, width), (n, height)
        marked = line.int()
        last = line.shape[1] - marked.flip(1).argmax(dim=1)
        ends.append((marked.argmax(dim=1), last))
    (x1, x2), (y1, y2) = ends
    boxes = torch.stack([x1, y1, x2, y2], dim=1)
    return boxes.where(masks.flatten(1).any(dim=1, keepdim=True), 0)


def frames(features: MaskFeatures, images: int) -> list[Size]:
    """Height and width of each image without its padding."""
    height, width = features.size
    if features.padding is None:
        return [(height, width)] * images
    rows, columns = (~features.padding[:, :, 0]).sum(dim=1), (~features.padding[:, 0]).sum(dim=1)
    return [(int(h), int(w)) for h, w in torch.stack([rows, columns], dim=1).tolist()]
