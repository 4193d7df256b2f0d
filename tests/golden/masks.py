"""Instance masks: from logits to run lengths, and COCO's mask AP."""

from __future__ import annotations

import numpy as np
import torch

from detrellis.postprocess import Postprocess
from detrellis.types import DecoderOutput, MaskFeatures

from .arrays import Arrays, close


def check_instance_inference(a: Arrays) -> None:
    """The file's mask logits are the features, of which each query reads its own."""
    (height, width), (h, w) = a["padded_hw"].tolist(), a["image_hw"].tolist()
    padding = torch.ones(1, height, width, dtype=torch.bool)
    padding[:, :h, :w] = False
    logits, maps = a["class_logits"][None, None], a["mask_logits"][None]
    queries = logits.shape[2]
    embeds, boxes = torch.eye(queries, dtype=maps.dtype)[None, None], torch.zeros(1, 1, queries, 4, dtype=maps.dtype)
    output = DecoderOutput(logits, boxes, boxes, mask_embeds=embeds, masks=MaskFeatures(maps, (height, width), padding))
    postprocess = Postprocess(a.number("top_k"), softmax=True, boxes_of_masks=True)
    (found,) = postprocess(output, a["original_hw"][None])
    seen = a["area"] > 0
    close(found.scores, a["scores"][seen], 1e-9)
    assert torch.equal(found.labels, a["labels"][seen])
    assert found.queries is not None
    assert torch.equal(found.queries, a["query"][seen])
    close(found.boxes, a["boxes"][seen], 1e-9)
    assert found.masks is not None
    assert [runs.decode() for runs in found.masks] == np.asarray(a.data["rle"])[seen.numpy()].tolist()
