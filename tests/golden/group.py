"""Checks of Group DETR: groups together equal groups alone,
matching and loss by group, denoising beside them.
"""

from __future__ import annotations

import torch
from torch import nn

from detrellis.boxes import inverse_sigmoid
from detrellis.detector import concatenate
from detrellis.interop.links import Pair, link_up, to_ours, to_theirs
from detrellis.interop.reference_names import table
from detrellis.nn.attention import SelfAttention
from detrellis.nn.proposals import ProposalHead
from detrellis.recipes.conditional import conditional_detr_r50
from detrellis.recipes.dino import dino_detector
from detrellis.recipes.network import build_decoder
from detrellis.schemes.base import Step
from detrellis.schemes.config import GroupConfig
from detrellis.schemes.distances import matched_distance, position_distance
from detrellis.schemes.group import Group
from detrellis.supervision import Supervision, match, supervise
from detrellis.types import DecoderOutput, Memory, Queries, Segment

from ..small import resized
from .arrays import Arrays, close
from .models import Transformer, own_gradients


def check_conditional(a: Arrays) -> None:
    """The joint pass, each group alone, matching, losses and gradients."""
    cfg, targets = a.json("cfg"), a.targets()
    groups, count = cfg["K"], cfg["num_queries"]
    sizes = {"heads": cfg["nheads"], "hidden": cfg["ffn"]}
    network = resized(
        conditional_detr_r50().detector,
        width=cfg["d_model"],
        encoder={**sizes, "layers": cfg["enc_layers"]},
        queries={"count": count},
        decoder={**sizes, "layers": cfg["dec_layers"]},
        dropout=0.0,
    )
    model = Transformer(network, cfg["num_classes"]).double()
    group = Group(GroupConfig(k=groups), model.queries).double()
    links = link_up(model.state_dict(), table(network, detrex=False), network.decoder.layers)
    weights = a.group("p/")
    first, further = weights["query_embed.weight"].split([count, (groups - 1) * count])
    weights["query_embed.weight"] = first
    model.load_state_dict(
        to_ours(weights, links, {k: v.shape for k, v in model.state_dict().items()})
    )
    group.table.load_state_dict({"position": further})

    position = a["pos"].flatten(2).transpose(1, 2)
    memory = Memory(
        a["src"].flatten(2).transpose(1, 2),
        position,
        (tuple(a["src"].shape[2:]),),
        a["mask"].flatten(1),
    )  # type: ignore[arg-type]
    memory = model.encoder(memory)
    queries, _ = model.queries(memory)
    boxes = torch.tensor(float(len(targets.labels)), dtype=torch.float64)
    supervision = Supervision(weights={"class": 2.0, "box": 5.0, "giou": 2.0})
    step = Step(model, memory, queries, None, targets, supervision, boxes, boxes)  # type: ignore[arg-type]
    (block,) = group.extend(step).blocks
    every = concatenate([queries, block.queries])
    assert every.boxes is not None
    close(every.boxes, a["reference_points"], 1e-5, "reference points")
    segments = (Segment("main", count), block.segment)
    output: DecoderOutput = model.decoder(every, memory, segments, every_layer=True)
    close(output.logits, a["train_logits"], 1e-5, "logits")
    close(output.boxes, a["train_boxes"], 1e-5, "boxes")
    close(output.states, a["train_hs"], 1e-5, "states")
    for k in range(groups):
        own = Queries(*(None if t is None else t[:, k * count : (k + 1) * count] for t in every))
        alone = model.decoder(own, memory, (), every_layer=True)
        close(alone.logits, a[f"alone{k}_logits"], 1e-5, f"group {k} alone")
        close(
            alone.logits,
            output.logits[:, :, k * count : (k + 1) * count],
            1e-9,
            f"group {k} in company",
        )
        close(alone.boxes, a[f"alone{k}_boxes"], 1e-5, f"group {k} alone")

    parts = [output.map(lambda t: t[:, :, :count]), output.map(lambda t: t[:, :, count:])]
    assert block.normaliser is not None
    tasks = [
        supervision.task("main", parts[0], targets, boxes.clamp(min=1), weight=group.main_weight),
        supervision.task(
            "group", parts[1], targets, block.normaliser, copies=block.copies, weight=block.weight
        ),
    ]
    found = match(tasks)
    for layer in range(network.decoder.layers):
        for image in range(len(targets.sizes)):
            rows = [(f.layer == layer) & (f.image == image) for f in found]
            query = torch.cat(
                [f.query[r] + i * count for i, (f, r) in enumerate(zip(found, rows, strict=True))]
            )
            target = (
                torch.cat([f.target[r] for f, r in zip(found, rows, strict=True)])
                - targets.offsets[image]
            )
            assert torch.equal(torch.stack([query, target]), a[f"match_l{layer}_b{image}"])
    losses, _ = supervise(tasks, found)
    for layer in range(network.decoder.layers):
        for term, name in (("class", "ce"), ("box", "bbox"), ("giou", "giou")):
            suffix = "" if layer == network.decoder.layers - 1 else f"_{layer}"
            together = losses[f"main/{term}/{layer}"] + losses[f"group/{term}/{layer}"]
            close(
                together / supervision.weights[term],
                a[f"loss/loss_{name}{suffix}"],
                1e-5,
                f"{name} {layer}",
            )
    last = len(output.logits) - 1
    alone, _ = supervise([supervision.task("eval", parts[0], targets, boxes.clamp(min=1))])
    for term, name in (("class", "ce"), ("box", "bbox"), ("giou", "giou")):
        close(
            alone[f"eval/{term}/{last}"] / supervision.weights[term],
            a[f"evalloss/loss_{name}"],
            1e-5,
            name,
        )

    total = torch.stack(list(losses.values())).sum()
    close(total, a["loss_total"], 1e-4, "total")
    gradients = torch.autograd.grad(total, [output.logits, output.boxes], retain_graph=True)
    close(gradients[0], a["grad_logits"], 1e-5, "logits' gradient")
    close(gradients[1], a["grad_boxes"], 1e-5, "boxes' gradient")
    total.backward()
    found_gradients = to_theirs(own_gradients(model), links)
    found_gradients["query_embed.weight"] = torch.cat(
        [found_gradients["query_embed.weight"], group.table["position"].grad]  # type: ignore[list-item]
    )
    for name, expected in a.group("grad/").items():
        tolerance = 1e-4 * max(1.0, expected.abs().max().item())
        close(found_gradients[name], expected, tolerance, f"gradient of {name}")


def check_distances(a: Arrays) -> None:
    positions = a["positions"]
    close(position_distance(positions), a["pd_pairs"], 1e-8, "PD")
    close(position_distance(positions[:2])[0], a["pd_pair01"], 1e-8, "PD of the first pair")
    close(position_distance(positions).mean(), a["pd_pair_mean"], 1e-8, "mean PD")
    matched = torch.stack([positions[k][a["match"][k].long()] for k in range(len(positions))])
    close(matched_distance(matched), a["md_pairs"], 1e-8, "MD")
    close(matched_distance(matched).mean(), a["md_pair_mean"], 1e-8, "mean MD")


def check_denoising_mask(a: Arrays) -> None:
    """[denoising | group 0 | the other groups] through our self-attention,
    which takes no such mask.
    """
    cases = sorted({k.split("_")[0] for k in a.data})
    for case in cases:
        params = a.json(f"{case}_params")
        count, groups, denoising = params["num_queries"], params["K"], params["dn_groups"]
        slots = 2 * params["single_pad"] * denoising
        sees = ("main",) if params["dn_sees"] == "first" else ("main", "group")
        segments = [Segment("main", count), Segment("group", (groups - 1) * count, groups - 1)]
        if slots:
            segments.insert(0, Segment("cdn", slots, denoising, sees))
        x = a[f"{case}_x"]
        attention = SelfAttention(x.shape[-1], params.get("nheads", 2)).double().eval()
        weights = a.group(f"{case}_p/")
        attention.projections.weight.data, attention.projections.bias.data = (
            weights["in_proj_weight"],
            weights["in_proj_bias"],
        )
        attention.output.weight.data = weights["out_proj.weight"]
        attention.output.bias.data = weights["out_proj.bias"]
        close(attention(x, torch.zeros_like(x), segments), a[f"{case}_out"], 1e-8, case)


def check_two_stage(a: Arrays) -> None:
    """Proposals by heads of each group, then all groups in one pass, and each alone.

    The file is LW-DETR's, which has no encoder and adds learned anchors to the proposals; they are
    added here. Its grid of proposals is float32, hence the tolerance.
    """
    cfg, shapes = a.json("cfg"), a.shapes()
    groups, count = cfg["K"], cfg["num_queries"]
    network = resized(
        dino_detector(levels=len(shapes)),
        width=cfg["d_model"],
        queries={"count": count, "empty_compete": True},
        cross_attention={"points": cfg["n_points"]},
        decoder={
            "heads": cfg["nheads"],
            "hidden": cfg["ffn"],
            "layers": cfg["dec_layers"],
            "refine": "detached",
        },
        eps=1e-12,  # it keeps boxes as logits, which nothing clamps
    )
    decoder = build_decoder(network, cfg["num_classes"]).double()
    heads = [
        ProposalHead(
            cfg["d_model"], cfg["num_classes"], count, rank_by="max", empty_compete=True
        ).double()
        for _ in range(groups)
    ]
    weights = a.group("p/")
    rows = [
        *(Pair(f"heads.{k}.projection", f"transformer.enc_output.{k}") for k in range(groups)),
        *(Pair(f"heads.{k}.norm", f"transformer.enc_output_norm.{k}") for k in range(groups)),
        *(
            Pair(f"heads.{k}.classify", f"transformer.enc_out_class_embed.{k}")
            for k in range(groups)
        ),
        *(
            Pair(f"heads.{k}.move.@", f"transformer.enc_out_bbox_embed.{k}.@")
            for k in range(groups)
        ),
        Pair("decoder.layers.*.norm_self", "transformer.decoder.layers.*.norm1"),
        Pair("decoder.layers.*.norm_cross", "transformer.decoder.layers.*.norm2"),
        Pair("decoder.heads.classes.0", "class_embed"),
        Pair("decoder.heads.boxes.0.@", "bbox_embed.@"),
        *table(network, detrex=False),
    ]
    model = nn.ModuleDict({"heads": nn.ModuleList(heads), "decoder": decoder})
    links = link_up(model.state_dict(), rows, network.decoder.layers)
    model.load_state_dict(
        to_ours(weights, links, {k: v.shape for k, v in model.state_dict().items()})
    )

    masks = [a[f"mask{i}"].bool() for i in range(len(shapes))]
    ratios = [
        torch.stack([(~m[:, 0]).double().mean(1), (~m[:, :, 0]).double().mean(1)], -1)
        for m in masks
    ]
    tokens = torch.cat([a[f"src{i}"].flatten(2).transpose(1, 2) for i in range(len(shapes))], 1)
    padding = torch.cat([m.flatten(1) for m in masks], 1)
    memory = Memory(tokens, torch.zeros_like(tokens), shapes, padding, torch.stack(ratios, 1))
    taught = [head.training_output(head(memory)) for head in heads]
    chosen = [torch.cat([t[i][0] for t in taught], dim=1) for i in (0, 1)]
    close(chosen[0], a["enc_logits"], 1e-5, "proposals' logits")
    close(chosen[1], a["enc_boxes"], 1e-5, "proposals")
    boxes = (inverse_sigmoid(chosen[1], 1e-12) + weights["refpoint_embed.weight"]).sigmoid()
    queries = Queries(weights["query_feat.weight"].expand(len(boxes), -1, -1), None, boxes)
    segments = (Segment("main", count), Segment("group", (groups - 1) * count, groups - 1))
    output = decoder(queries, memory, segments, every_layer=True)
    close(output.logits, a["train_logits"], 5e-5, "logits")
    close(output.boxes, a["train_boxes"], 1e-5, "boxes")
    for k in range(groups):
        part = Queries(*(None if t is None else t[:, k * count : (k + 1) * count] for t in queries))
        alone = decoder(part, memory, (), every_layer=True)
        close(alone.logits, a[f"alone{k}_logits"], 5e-5, f"group {k} alone")
        close(alone.boxes, a[f"alone{k}_boxes"], 5e-5, f"group {k} alone")
