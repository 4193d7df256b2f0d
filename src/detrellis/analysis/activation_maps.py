"""Where the heads look that share an encoder: class activation maps on the encoder's output.

`"gradcam"` (Selvaraju et al., 2017) weights the channels of a level by their mean gradient. Behind
a LayerNorm, much of a token is common to all of them, and that part may decide the sign of the
whole map. `"hirescam"` (Draelos and Carin, 2020) weights the channels of each token by the gradient
there.

Each head's map is of the sum of its scores for what it takes to be objects: the decoder's for the
main queries that are matched one-to-one in the last layer, a branch's for all its positives. Each
score is that of the target's class.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from detrellis.analysis.outputs import last_layer, one_to_one
from detrellis.analysis.pictures import levels, resized
from detrellis.analysis.schemes import DECODER, begin, branch_assignments, decode_main
from detrellis.data.batch import Batch
from detrellis.schemes.base import Step
from detrellis.schemes.collaborative.dense import gather_positives
from detrellis.schemes.collaborative.scene import BranchAssignment, Scene
from detrellis.schemes.collaborative.scheme import Collaborative
from detrellis.training import TrainableDetector
from detrellis.types import Memory

Cam = Literal["gradcam", "hirescam"]


def grad_cam(memory: Memory, gradient: Tensor, cam: Cam = "gradcam") -> Tensor:
    """Each token's activation `(B, S)`: the positive part of the sum of its channels, weighted by
    the gradient `(B, S, D)`: by its mean over the tokens of the level that are not padding, or by
    the token's own."""
    if cam == "hirescam":
        return (memory.tokens * gradient).sum(-1).relu()
    inside = (
        torch.ones_like(memory.tokens[..., :1])
        if memory.padding is None
        else ~memory.padding.unsqueeze(-1)
    )
    sizes = [height * width for height, width in memory.shapes]
    by_level = zip(*(t.split(sizes, dim=1) for t in (memory.tokens, gradient, inside)), strict=True)
    maps = []
    for tokens, gradients, counted in by_level:
        weights = (gradients * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(
            min=1
        )
        maps.append((tokens * weights).sum(-1).relu())
    return torch.cat(maps, dim=1)


def activation_map(tokens: Tensor, memory: Memory, image: int) -> Tensor:
    """One map `(h, w)` of an image's tokens `(S,)`: the mean of its levels, without padding, at the
    finest one's size; its maximum is 1, or it is 0 everywhere."""
    maps = levels(tokens, memory, image)
    height, width = maps[0].shape
    mean = torch.stack([resized(level, (height, width)) for level in maps]).double().mean(0)
    return mean / mean.max().clamp(min=torch.finfo(mean.dtype).tiny)


def decoder_score(step: Step) -> Tensor:
    """The sum of the matched queries' scores, of all images: `()`."""
    output = last_layer(decode_main(step))
    matched = one_to_one(step.supervision, output, step.targets)
    return (
        output.logits[0, matched.image, matched.query, step.targets.labels[matched.target]]
        .sigmoid()
        .sum()
    )


def branch_score(assigned: BranchAssignment, scene: Scene, softmax: bool) -> Tensor:
    """The sum of the positives' scores, of all images: `()`."""
    positives = gather_positives(scene, assigned.owner)
    logits = assigned.logits[positives.image, positives.anchor]
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    return scores.gather(1, positives.label.unsqueeze(1)).sum()


def activations(
    model: TrainableDetector, co: Collaborative, batch: Batch, cam: Cam = "gradcam"
) -> tuple[Memory, dict[str, Tensor]]:
    """The batch's memory, and each head's activation of its tokens, `(B, S)`.

    Images do not see each other, so that one gradient of the sum is each image's own.
    """
    with torch.no_grad():
        memory = model.detector.encode(batch.images)
    memory = memory._replace(tokens=memory.tokens.requires_grad_())
    step = begin(model, batch, memory)

    scene, assignments = branch_assignments(co, step)
    scores = {DECODER: decoder_score(step)}
    for head, branch in co.named.items():
        scores[head] = branch_score(assignments[head], scene, branch.softmax)

    cams = {}
    for head, score in scores.items():
        (gradient,) = torch.autograd.grad(score, memory.tokens, retain_graph=True)
        cams[head] = grad_cam(memory, gradient, cam).detach()
    return memory, cams
