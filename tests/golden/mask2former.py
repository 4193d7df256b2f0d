"""Checks of Mask2Former and of Group DETR on it:
whole models, matching, losses at recorded points, gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from detrellis.detector import Detector
from detrellis.interop.links import Link, link_up, missing, to_ours, to_theirs, unused
from detrellis.interop.mask2former import as_convolutions, as_linear, huggingface, turned
from detrellis.mask_points import Draw, MaskCost, Points, Sampling
from detrellis.nn.masks import MaskBranch, level_map
from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.build import build_supervision
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.mask2former import mask2former_detector, mask2former_r50
from detrellis.recipes.network import build_detector, build_neck
from detrellis.schemes.base import Step
from detrellis.schemes.config import GroupConfig
from detrellis.schemes.group import Group
from detrellis.supervision import match, supervise
from detrellis.types import DecoderOutput, ImageBatch, MaskFeatures, Segment, Targets

from ..small import resized
from .arrays import Arrays, close

EXACT = 1e-9
GRADIENT = 1e-8


def truth_of(a: Arrays) -> Targets:
    """Labels and bitmaps; the boxes are nobody's business here."""
    width = a.json("cfg")["size"][1] if "cfg" in a else int(a["gt_hw"][1])
    bitmaps = torch.from_numpy(np.unpackbits(a.data["gt_masks"], axis=-1)[..., :width]).bool()
    labels = a["gt_labels"].long()
    boxes = torch.full((len(labels), 4), 0.5, dtype=torch.float64)
    return Targets(labels, boxes, tuple(a["gt_counts"].tolist()), bitmaps=bitmaps)


def recorded(a: Arrays, tags: Sequence[str], rows: Sequence[Sequence[int]]) -> Draw:
    """The points of a file in place of random ones. `rows` are the places, in the file's draws of
    all masks of a layer, of the masks that are drawn for: of each image."""

    def draw(purpose: tuple[str | int, ...], shape: Sequence[int], like: Tensor) -> Tensor:
        what, layer, *place = purpose
        tag = tags[int(layer)]
        if what == "match":
            points = a[f"match_points{tag}"]
        else:
            image, start = map(int, place)
            assert start == 0, "more masks than are computed together"
            points = a[f"{'candidate' if what == 'candidates' else 'random'}_points{tag}"][
                list(rows[image])
            ]
        assert points.shape == (*shape, 2), (purpose, points.shape, shape)
        return points

    return draw


def in_order(counts: Sequence[int]) -> list[list[int]]:
    """Rows of each image, one image after the other."""
    ends = np.cumsum([0, *counts]).tolist()
    return [list(range(start, end)) for start, end in itertools.pairwise(ends)]


def check_loss(a: Arrays) -> None:
    """Costs, matches, losses and gradients of one output, whose masks are given whole."""
    logits, maps, targets = a.variable("class_logits"), a.variable("mask_logits"), truth_of(a)
    batch, queries = logits.shape[:2]
    embeds = torch.eye(queries, dtype=torch.float64).expand(1, batch, -1, -1)
    features = MaskFeatures(maps, tuple(a["gt_hw"].tolist()))
    output = DecoderOutput(
        logits[None],
        logits.new_zeros(1, batch, queries, 0),
        logits[None],
        mask_embeds=embeds,
        masks=features,
    )
    points = Points(a.number("points"), float(a["oversample"]), float(a["importance"]))
    counts = [min(size, queries) for size in targets.sizes]
    sampling = Sampling(recorded(a, [""], in_order(counts)), points)
    supervision = build_supervision(mask2former_r50())
    for name, cost in {"mask": MaskCost(1.0, 0.0), "dice": MaskCost(0.0, 1.0)}.items():
        if any(targets.sizes):
            found = cost(output, targets, sampling, 1)
            for image, size in enumerate(targets.sizes):
                close(found[0, image, 0, :, :size], a[f"cost_{name}{image}"], EXACT, f"cost {name}")
    count = torch.tensor(float(len(targets.labels)), dtype=torch.float64).clamp(min=1)
    task = supervision.task("main", output, targets, count, sampling=sampling)
    (positives,) = match([task])
    for image, (size, first) in enumerate(zip(targets.sizes, targets.offsets, strict=True)):
        if size:
            of_image = positives.image == image
            found = torch.stack([positives.query[of_image], positives.target[of_image] - first])
            assert torch.equal(found, a[f"match{image}"]), f"match of image {image}"
    losses, _ = supervise([task])
    names = {"class": "ce", "mask": "mask", "dice": "dice"}
    for ours, theirs in names.items():
        value = losses[f"main/{ours}/0"] / supervision.weights[ours]
        close(value, a[f"loss_{theirs}"], EXACT, theirs)
        leaf, name = (logits, "class") if ours == "class" else (maps, "mask")
        (gradient,) = torch.autograd.grad(
            value, leaf, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        expected = f"grad_{name}_logits_{theirs}"
        close(
            gradient,
            a[expected] if expected in a else torch.zeros_like(gradient),
            GRADIENT,
            expected,
        )
    close(torch.stack(list(losses.values())).sum(), a["loss_total"], EXACT, "total")


def detector_of(a: Arrays) -> tuple[Detector, DetectorConfig, list[Link]]:
    """The file's network behind its backbone, with its weights."""
    cfg = a.json("cfg")
    config = resized(
        mask2former_detector(BackboneConfig(name="resnet18", pretrained=False)),
        width=cfg["d"],
        encoder={
            "width": cfg["feature_size"],
            "heads": cfg["heads"],
            "hidden": cfg["encoder_ffn"],
            "layers": cfg["encoder_layers"],
        },
        queries={"count": cfg.get("queries", cfg.get("N"))},
        decoder={"heads": cfg["heads"], "hidden": cfg["ffn"], "layers": cfg["decoder_layers"] - 1},
        masks={"width": cfg["mask_dim"]},
    )
    model = build_detector(config, cfg["classes"])
    maps = [a[f"feature{i}"] for i in range(4)]
    channels = [m.shape[1] for m in maps]
    model.backbone, model.neck = Maps(maps), build_neck(config, channels[1:])  # type: ignore[assignment]
    model.masks = MaskBranch(channels[0], config.memory_width, cfg["mask_dim"])
    model = model.double()
    links = link_up(model.state_dict(), huggingface(config), config.decoder.layers)
    assert not missing(model.state_dict(), links)
    return model, config, links


class Maps(nn.Module):
    """The recorded maps of another backbone."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.maps


def load(
    model: Detector, config: DetectorConfig, links: list[Link], weights: dict[str, Tensor]
) -> None:
    assert all("encoder.swin" in k or "hidden_states_norms" in k for k in unused(weights, links))
    found = to_ours(as_linear(weights), links, {k: v.shape for k, v in model.state_dict().items()})
    model.load_state_dict(turned(found, config))


def gradients(model: nn.Module, config: DetectorConfig, links: list[Link]) -> dict[str, Tensor]:
    """Under their names."""
    own = {
        k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()
    }
    return as_convolutions(to_theirs(turned(own, config), links))


def mask_logits(output: DecoderOutput) -> Tensor:
    """Every mask of every output: what is never computed outside of this test."""
    assert output.masks is not None
    assert output.mask_embeds is not None
    return torch.einsum("lbnd,bdhw->lbnhw", output.mask_embeds, output.masks.map)


def images_of(a: Arrays) -> ImageBatch:
    height, width = a.json("cfg")["size"]
    return ImageBatch(torch.zeros(len(a["feature0"]), 3, height, width, dtype=torch.float64))


def check_model(a: Arrays) -> None:
    """A whole model from the backbone's maps on:
    maps, outputs, what each query may read, loss and gradients.
    """
    model, config, links = detector_of(a)
    load(model, config, links, a.group("p/"))
    memory = model.encode(images_of(a))
    assert memory.masks is not None
    levels = len(memory.shapes)
    for i in range(levels):
        close(level_map(memory, levels - 1 - i), a[f"pixel{i}"], EXACT, f"map {i}")
    close(memory.masks.map, a["mask_features"], EXACT, "mask features")
    queries, _ = model.propose(memory)
    read: list[Tensor] = []
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[1].readable))
    output = model.decode(memory, {Segment("main", queries.content.shape[1]): queries})["main"]
    close(output.logits, a["class_logits"], EXACT, "classes")
    close(mask_logits(output), a["mask_logits"], EXACT, "masks")
    assert len(read) == len(output.logits) - 1
    for i, readable in enumerate(read):
        blocked = a[f"blocked{i}"] & ~a["all_blocked"][i].unsqueeze(-1)
        assert torch.equal(readable, ~blocked), f"what layer {i} reads"

    targets = truth_of(a)
    count = torch.tensor(float(len(targets.labels)), dtype=torch.float64)
    draw = recorded(a, [f"_l{i}" for i in range(len(output.logits))], in_order(targets.sizes))
    sampling = Sampling(draw, Points(a.json("cfg")["points"]))
    supervision = build_supervision(mask2former_r50())
    losses, _ = supervise([supervision.task("main", output, targets, count, sampling=sampling)])
    total = torch.stack(list(losses.values())).sum()
    close(total, a["loss"], 1e-8, "loss")
    total.backward()
    found = gradients(model, config, links)
    for name, expected in a.group("grad/").items():
        close(
            found[name],
            expected,
            GRADIENT * max(1.0, expected.abs().max().item()),
            f"gradient of {name}",
        )


def check_groups(a: Arrays) -> None:
    """Groups in company equal each alone, in outputs; the matches, losses and gradients of all."""
    cfg, targets = a.json("cfg"), truth_of(a)
    model, config, links = detector_of(a)
    groups, count = cfg["K"], cfg["N"]
    weights, tables = a.group("p/"), {}
    for ours, theirs in {"position": "queries_embedder", "content": "queries_features"}.items():
        name = f"model.transformer_module.{theirs}.weight"
        weights[name], tables[ours] = weights[name].split([count, (groups - 1) * count])
    load(model, config, links, weights)
    group = Group(GroupConfig(k=groups), model.queries).double()
    group.table.load_state_dict(tables)

    memory = model.encode(images_of(a))
    queries, _ = model.propose(memory)
    masks = torch.tensor(float(len(targets.labels)), dtype=torch.float64)
    supervision = build_supervision(mask2former_r50())
    step = Step(model, memory, queries, None, targets, supervision, masks, masks)
    (block,) = group.extend(step).blocks
    outputs = model.decode(memory, {Segment("main", count): queries, block.segment: block.queries})
    for k in range(groups):
        of_block, first = ("main", 0) if k == 0 else ("group", (k - 1) * count)
        own = outputs[of_block].map(lambda t, first=first: t[:, :, first : first + count])
        close(own.logits, a[f"alone{k}_class_logits"], EXACT, f"classes of group {k}")
        close(mask_logits(own), a[f"alone{k}_mask_logits"], EXACT, f"masks of group {k}")
        close(
            own.logits,
            a["train_class_logits"][:, :, k * count : (k + 1) * count],
            EXACT,
            "in company",
        )

    # The file's rows are in the order of queries over all groups: the first group's are the main
    # block's.
    tags = [f"_l{i}" for i in range(len(outputs["main"].logits))]
    sizes = targets.sizes
    each = in_order([groups * min(size, count) for size in sizes])
    main = [rows[: min(size, count)] for rows, size in zip(each, sizes, strict=True)]
    further = [rows[min(size, count) :] for rows, size in zip(each, sizes, strict=True)]
    points = Points(cfg["points"])
    assert block.normaliser is not None
    tasks = [
        supervision.task(
            "main",
            outputs["main"],
            targets,
            masks,
            1,
            group.main_weight,
            Sampling(recorded(a, tags, main), points),
        ),
        supervision.task(
            "group",
            outputs["group"],
            targets,
            block.normaliser,
            block.copies,
            block.weight,
            Sampling(recorded(a, tags, further), points),
        ),
    ]
    found = match(tasks)
    for layer in range(len(tags)):
        rows = [
            torch.stack([p.image, p.query + shift, p.target])[:, p.layer == layer]
            for p, shift in zip(found, (0, count), strict=True)
        ]
        together = torch.cat(rows, dim=1)
        together = together[:, (together[0] * groups * count + together[1]).argsort()]
        assert torch.equal(together, a[f"match_l{layer}"]), f"match of layer {layer}"
    losses, _ = supervise(tasks, found)
    for layer in range(len(tags)):
        for ours, theirs in {"class": "ce", "mask": "mask", "dice": "dice"}.items():
            value = losses[f"main/{ours}/{layer}"] + losses[f"group/{ours}/{layer}"]
            close(
                value / supervision.weights[ours],
                a[f"loss_{theirs}_l{layer}"],
                EXACT,
                f"{theirs} of layer {layer}",
            )
    total = torch.stack(list(losses.values())).sum()
    close(total, a["loss_total"], 1e-8, "loss")
    total.backward()
    own = gradients(model, config, links)
    for ours, theirs in {"position": "queries_embedder", "content": "queries_features"}.items():
        gradient = torch.cat(
            [own[f"model.transformer_module.{theirs}.weight"], group.table[ours].grad]
        )
        close(gradient, a[f"grad/{theirs}"], GRADIENT, f"gradient of {theirs}")
    close(
        own["model.transformer_module.level_embed.weight"],
        a["grad/level_embed"],
        GRADIENT,
        "gradient of the levels",
    )
