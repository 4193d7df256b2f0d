"""Checks of Mask DINO: whole models with their proposals,
denoising, costs, losses at recorded points, gradients.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from detrellis.detector import Detector
from detrellis.interop.links import Link, link_up, missing, to_ours
from detrellis.interop.maskdino import names, sizes, turned
from detrellis.mask_points import Points, Sampling
from detrellis.matching import Hungarian
from detrellis.nn.masks import MaskBranch, level_map
from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.build import build_supervision
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.maskdino import mask_dino_r50, maskdino_detector
from detrellis.recipes.network import build_detector, build_neck
from detrellis.recipes.overrides import merged
from detrellis.schemes.base import QueryBlock, Step
from detrellis.schemes.denoising import denoising_block, lay_out
from detrellis.schemes.dn import Denoising, Noise
from detrellis.set_loss import SetLoss
from detrellis.supervision import Supervision, supervise
from detrellis.types import DecoderOutput, ImageBatch, Segment, Targets

from ..small import resized
from .arrays import Arrays, close
from .mask2former import EXACT, GRADIENT, Maps, in_order, mask_logits, recorded, truth_of

GIOU = 1e-5  # of costs, which have no eps here: see the folder's README


def detector_of(
    a: Arrays, weights: dict[str, Tensor]
) -> tuple[Detector, DetectorConfig, list[Link]]:
    """The file's network behind its backbone, with its weights, whose levels are in our order."""
    cfg = a.json("cfg")
    first = cfg["order"] == "low2high"
    found = merged(
        maskdino_detector(BackboneConfig(name="resnet18", pretrained=False)).model_dump(),
        sizes(weights, ""),
    )
    config = resized(
        DetectorConfig.checked(found),
        encoder={"heads": cfg["heads"]},
        decoder={"heads": cfg["heads"]},
        queries={
            "count": cfg["queries"],
            "boxes_from_masks": None if cfg["init"] == "no" else cfg["init"],
        },
    )
    assert config.queries.smallest_on == ("coarsest" if first else "finest")  # type: ignore[union-attr]
    model = build_detector(config, cfg["classes"])
    maps = [a[f"feature_res{i}"] for i in (2, 3, 4, 5)]
    channels = [m.shape[1] for m in maps]
    model.backbone, model.neck = Maps(maps), build_neck(config, channels[1:])  # type: ignore[assignment]
    model.masks = MaskBranch(channels[0], config.memory_width, cfg["mask_dim"])
    model = model.double()
    state = model.state_dict()
    links = link_up(state, names(config, "", finest_first=first), config.decoder.layers)
    assert not missing(state, links)
    own = to_ours(
        turned(weights, config, finest_first=first), links, {k: v.shape for k, v in state.items()}
    )
    model.load_state_dict(own)
    return model, config, links


def check(a: Arrays) -> None:
    cfg, weights = a.json("cfg"), a.group("p/")
    first = cfg["order"] == "low2high"
    model, config, links = detector_of(a, weights)
    height, width = cfg["size"]
    memory = model.encode(
        ImageBatch(torch.zeros(len(a["feature_res2"]), 3, height, width, dtype=torch.float64))
    )
    assert memory.masks is not None
    levels = len(memory.shapes)
    for i in range(levels):
        close(level_map(memory, i if first else levels - 1 - i), a[f"pixel{i}"], EXACT, f"map {i}")
    close(memory.masks.map, a["mask_features"], EXACT, "mask features")
    queries, found = model.propose(memory)
    assert found is not None
    proposals = model.queries.training_output(found)._replace(masks=memory.masks)
    close(proposals.logits[0], a["proposal_logits"], EXACT, "classes of proposals")
    close(proposals.boxes[0], a["proposal_boxes"], EXACT, "boxes of proposals")
    close(mask_logits(proposals)[0], a["proposal_masks"], EXACT, "masks of proposals")
    main = Segment("main", cfg["queries"])
    output = model.decode(memory, {main: queries})["main"]
    close(output.logits, a["logits"], EXACT, "classes")
    close(output.boxes, a["boxes"], EXACT, "boxes")
    for place, layer in enumerate(a["mask_layers"].tolist()):
        close(mask_logits(output)[layer], a["masks"][place], EXACT, f"masks of output {layer}")

    # Denoising, and all losses.
    targets = truth_of(a)._replace(boxes=a["gt_boxes"])
    count = torch.tensor(float(len(targets.labels)), dtype=torch.float64)
    recipe = mask_dino_r50()
    assert recipe.schemes.dn is not None
    supervision = build_supervision(recipe)
    assert isinstance(supervision.rule, SetLoss)
    supervision = replace(supervision, rule=replace(supervision.rule, iou_eps=1e-6))
    step = Step(model, memory, queries, found, targets, supervision, count, count)
    config_dn = recipe.schemes.dn.replace(total=cfg["dn"])
    scheme = Denoising(config_dn, config.width, cfg["classes"], config.eps).double()
    scheme.label_embed.load_state_dict({"weight": weights["predictor.label_enc.weight"]})
    layout = lay_out(targets, max(1, cfg["dn"] // max(targets.sizes)), 1)
    assert (layout.groups, layout.slots) == (a.number("dn_groups"), a.number("dn_pad"))
    labels = torch.zeros(len(layout.slot), dtype=torch.int64)
    labels[a["dn_flip"] < config_dn.label_noise] = a["dn_label"]
    noise = Noise(a["dn_flip"], labels, 2 * a["dn_shift"] - 1)
    block = denoising_block("dn", scheme.queries(targets, layout, noise), layout, step, "main")
    together = model.decode(memory, {main: queries, block.segment: block.queries})
    close(together["main"].logits, a["logits"], EXACT, "classes in company")
    close(together["dn"].logits, a["dn_logits"], EXACT, "classes of denoising")
    close(together["dn"].boxes, a["dn_boxes"], EXACT, "boxes of denoising")
    check_losses(a, supervision, targets, block, {**together, "proposals": proposals})
    check_gradients(a, model, links, scheme)


def check_losses(
    a: Arrays,
    supervision: Supervision,
    targets: Targets,
    block: QueryBlock,
    outputs: dict[str, DecoderOutput],
) -> None:
    """Costs, losses and their sum, whose gradients it leaves in the parameters."""
    layers, size = len(outputs["main"].logits), targets.sizes
    points = Points(a.json("cfg")["points"])
    tags = {
        "main": [f"_l{i}" for i in range(layers)],
        "dn": [f"_dn_l{i}" for i in range(layers)],
        "proposals": ["_proposals"],
    }
    rows = {
        "main": in_order(size),
        "dn": in_order([block.copies * n for n in size]),
        "proposals": in_order(size),
    }
    sampling = {name: Sampling(recorded(a, tags[name], rows[name]), points) for name in tags}
    rules = {"main": supervision, "dn": block.supervision, "proposals": supervision.proposals()}
    count = torch.tensor(float(len(targets.labels)), dtype=torch.float64)
    normaliser = {"main": count, "dn": block.copies * count, "proposals": count}
    for name in ("main", "proposals"):
        assign, output = supervision.assign, outputs[name]
        assert isinstance(assign, Hungarian)
        assert assign.masks is not None
        of_masks = assign.masks(output, targets, sampling[name], 1)[:, :, 0]
        for image, first in enumerate(targets.offsets):
            mine = slice(first, first + size[image])
            truth = (targets.labels[mine].expand(len(output.logits), -1), targets.boxes[mine])
            found = assign.cost(output.logits[:, image], output.boxes[:, image], *truth)
            found = found + of_masks[:, image, :, : size[image]]
            for layer, tag in enumerate(tags[name]):
                close(found[layer], a[f"cost{tag}_b{image}"], GIOU, f"cost{tag} of image {image}")
    tasks = [
        rules[name].task(
            name,
            outputs[name],
            targets,
            normaliser[name],
            block.copies if name == "dn" else 1,
            sampling=sampling[name],
        )
        for name in tags
    ]
    losses, _ = supervise(tasks)
    theirs = {"class": "ce", "box": "bbox", "giou": "giou", "mask": "mask", "dice": "dice"}
    for name, value in losses.items():
        part, term, layer = name.split("/")
        suffix = {"main": "", "dn": "_dn", "proposals": "_interm"}[part]
        last = part == "proposals" or int(layer) == layers - 1
        expected = a[f"loss/loss_{theirs[term]}{suffix}{'' if last else f'_{layer}'}"]
        close(value / rules[part].weights[term], expected, EXACT, name)
    total = torch.stack(list(losses.values())).sum()
    close(total, a["loss_total"], EXACT, "total")
    total.backward()


def check_gradients(a: Arrays, model: Detector, links: list[Link], scheme: Denoising) -> None:
    """Under their names, where what we keep in several tensors is one."""
    own = {name: p.grad for name, p in model.named_parameters()}
    label = scheme.label_embed.weight.grad
    for name, expected in a.group("grad/").items():
        copies = [own[link.ours[0]] for link in links if name in link.theirs[0]]
        found = (
            label
            if name == "predictor.label_enc.weight"
            else sum(g for g in copies if g is not None)
        )
        assert isinstance(found, Tensor)
        if name.endswith("level_embed") and a.json("cfg")["order"] != "low2high":
            found = found.flip(0)
        close(
            found, expected, GRADIENT * max(1.0, expected.abs().max().item()), f"gradient of {name}"
        )
