"""Large-scale jitter against detectron2's and Co-DETR's, and Co-DETR's copy-paste."""

from __future__ import annotations

import numpy as np
import torch

from detrellis.data.lsj import kept_extent, resized_extent, shared_offset
from detrellis.data.operations import crop
from detrellis.data.paste import Cutouts, paste
from detrellis.data.patches import Patch, boxes_around, whole

from .arrays import Arrays


def _rows(a: Arrays) -> list[dict[str, float]]:
    columns = [str(c) for c in a.data["columns"]]
    return [dict(zip(columns, row, strict=True)) for row in a.data["rows"].tolist()]


def check_detectron2(a: Arrays) -> None:
    """Sizes, corners and padding of each row's draws."""
    for row in _rows(a):
        h, w, side = (int(row[name]) for name in ("h", "w", "target"))
        resized = resized_extent(h, w, side, 0.1 + 1.9 * row["u_scale"], "detectron2")
        assert resized == (row["resized_h"], row["resized_w"])
        assert shared_offset(resized, side, row["u_offset"]) == (row["crop_y"], row["crop_x"])
        kept = kept_extent(resized, side)
        assert kept == (row["kept_h"], row["kept_w"])
        assert (side - kept[0], side - kept[1]) == (row["pad_bottom"], row["pad_right"])


def check_mmdet(a: Arrays) -> None:
    """Sizes of each row; masks and boxes through the crops of some."""
    for case, row in enumerate(_rows(a)):
        h, w, side = (int(row[name]) for name in ("h", "w", "target"))
        resized = resized_extent(h, w, side, row["ratio"], "mmdet")
        assert resized == (row["resized_h"], row["resized_w"])
        kept = kept_extent(resized, side)
        assert kept == (row["kept_h"], row["kept_w"])
        if f"c{case}_masks" in a:
            corner = (int(row["crop_y"]), int(row["crop_x"]))
            bitmaps = _bits(a.data[f"c{case}_masks"], resized[1])
            boxes, labels = a[f"c{case}_boxes"].float(), torch.arange(len(bitmaps))
            window = torch.from_numpy(np.ascontiguousarray(bitmaps))[:, corner[0] :, corner[1] :]
            drawn = window[:, : kept[0], : kept[1]]
            _, _, left = crop(torch.zeros(3, *resized), boxes, labels, (*corner, *kept))
            left = left[drawn[left].flatten(1).any(dim=1)]
            assert torch.equal(left, a[f"c{case}_out_labels"])
            assert torch.equal(
                drawn[left], torch.from_numpy(_bits(a.data[f"c{case}_out_masks"], kept[1]))
            )
            assert torch.equal(
                boxes_around(patches_of(drawn[left])), a[f"c{case}_out_boxes"].float()
            )


def check_copy_paste(a: Arrays) -> None:
    """Given objects on a picture.
    Those that the reference keeps though nothing of them is seen are not compared.
    """
    for case in range(a.count(r"c\d+_chosen")):
        chosen = a[f"c{case}_chosen"]
        result = paste(_picture(a, f"c{case}_dst_"), _picture(a, f"c{case}_src_").take(chosen))
        expected = _picture(a, f"c{case}_")
        expected = expected.take(
            torch.tensor([row for row, patch in enumerate(expected.patches) if patch.inside.any()])
        )
        for ours, theirs in zip(result[:3], expected[:3], strict=True):
            assert torch.equal(ours, theirs)
        size = (result.image.shape[1], result.image.shape[2])
        assert torch.equal(whole(result.patches, size), whole(expected.patches, size))


def _picture(a: Arrays, prefix: str) -> Cutouts:
    image = torch.from_numpy(a.data[f"{prefix}image"].copy()).permute(2, 0, 1)
    patches = patches_of(torch.from_numpy(_bits(a.data[f"{prefix}masks"], image.shape[2])))
    return Cutouts(image, a[f"{prefix}boxes"].float().view(-1, 4), a[f"{prefix}labels"], patches)


def patches_of(bitmaps: torch.Tensor) -> list[Patch]:
    """Masks `(n, H, W)`, those without a pixel whole."""
    masks = [Patch(mask, 0, 0) for mask in bitmaps.numpy()]
    return [mask.trimmed() or mask for mask in masks]


def _bits(packed: np.ndarray, width: int) -> np.ndarray:
    return np.unpackbits(packed, axis=-1)[..., :width].astype(bool)
