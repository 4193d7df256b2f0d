"""Checks of whole tiny models: values and gradients, which prove the detach rules too."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from detrellis.detector import Detector, concatenate
from detrellis.interop.huggingface import recipe_of
from detrellis.interop.links import Link, link_up, missing, to_ours, to_theirs, unused
from detrellis.interop.names import huggingface
from detrellis.interop.reference_names import table
from detrellis.nn.decoder import Decoder
from detrellis.nn.proposals import select
from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.deformable import deformable_detr_r50_two_stage_plus
from detrellis.recipes.detector import DetectorConfig, MixedQueriesConfig, ProposalQueriesConfig
from detrellis.recipes.dino import dino_detector
from detrellis.recipes.network import (
    build_decoder,
    build_detector,
    build_encoder,
    build_neck,
    build_queries,
)
from detrellis.schemes.base import Step
from detrellis.schemes.cdn import ContrastiveDenoising, group_count
from detrellis.schemes.config import CDNConfig, HybridConfig
from detrellis.schemes.denoising import lay_out
from detrellis.schemes.hybrid import Hybrid
from detrellis.supervision import Supervision, supervise
from detrellis.types import DecoderOutput, Memory, Queries, Segment

from ..small import resized
from .arrays import Arrays, close
from .base import recorded_noise


class Transformer(nn.Module):
    """What the reference calls the transformer: everything behind the neck."""

    def __init__(self, config: DetectorConfig, classes: int) -> None:
        super().__init__()
        self.encoder = build_encoder(config)
        self.decoder = build_decoder(config, classes)
        self.queries = build_queries(config, classes)


def dino_config(c: dict[str, int], levels: int) -> DetectorConfig:
    """The file's sizes."""
    sizes = {"heads": c["nheads"], "hidden": c["ffn"]}
    return resized(
        dino_detector(levels=levels),
        width=c["d_model"],
        encoder={**sizes, "layers": c["enc_layers"], "points": c["n_points"]},
        queries={"count": c["num_queries"]},
        cross_attention={"points": c["n_points"]},
        decoder={**sizes, "layers": c["dec_layers"]},
        eps=c["inverse_sigmoid_eps"],
    )


def dino_memory(a: Arrays, levels: int, embed: Tensor) -> Memory:
    """The reference's inputs as a memory before the encoder;
    the level embedding is part of its transformer.
    """
    maps = [a[f"src{i}"] for i in range(levels)]
    masks = [a[f"mask{i}"].bool() for i in range(levels)]
    position = torch.cat(
        [a[f"pos{i}"].flatten(2).transpose(1, 2) + embed[i] for i in range(levels)], 1
    )
    ratios = [
        torch.stack([(~m[:, 0]).double().mean(1), (~m[:, :, 0]).double().mean(1)], -1)
        for m in masks
    ]
    return Memory(
        torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1),
        position,
        a.shapes(),
        torch.cat([m.flatten(1) for m in masks], 1),
        torch.stack(ratios, 1),
    )


def check_dino(a: Arrays) -> None:
    config, levels = a.json("cfg"), len(a.shapes())
    network = dino_config(config, levels)
    model = Transformer(network, config["num_classes"]).double()
    links = link_up(model.state_dict(), table(network, detrex=False), network.decoder.layers)
    # The file holds the heads, one for all layers, once.
    weights = {
        re.sub(r"^(class|bbox)_embed\.", r"\1_embed.0.", k): v for k, v in a.group("p/").items()
    }
    model.load_state_dict(
        to_ours(weights, links, {k: v.shape for k, v in model.state_dict().items()})
    )
    embed = a.variable("p/transformer.level_embed")
    memory = model.encoder(dino_memory(a, levels, embed))
    queries, proposals = model.queries(memory)
    scheme = None
    blocks = {Segment("main", config["num_queries"]): queries}
    if config["train"]:
        scheme = ContrastiveDenoising(
            CDNConfig(number=config["dn_number"]),
            config["d_model"],
            config["num_classes"],
            config["inverse_sigmoid_eps"],
        ).double()
        scheme.label_embed.load_state_dict({"weight": a["p/label_enc.weight"]})
        targets = a.targets()
        layout = lay_out(targets, group_count(config["dn_number"], max(targets.sizes)), 2)
        cdn = scheme.queries(
            targets, layout, recorded_noise(a, config.get("label_noise_ratio", 0.5) / 2)
        )
        if layout.slots:
            blocks = {Segment("cdn", layout.slots, layout.groups, ("main",)): cdn, **blocks}
    output = decode(model.decoder, blocks, memory)
    interm = [select(proposals.logits, proposals.best), proposals.boxes]
    close(output.logits, a["all_logits"], 1e-5, "logits")
    close(output.boxes, a["all_boxes"], 1e-5, "boxes")
    close(interm[0], a["interm_logits"], 1e-5, "proposal logits")
    close(interm[1], a["interm_boxes"], 1e-5, "proposal boxes")
    scalar = (output.logits * a["w_logits"]).sum() + (output.boxes * a["w_boxes"]).sum()
    scalar = (
        scalar + (interm[0] * a["w_interm_logits"]).sum() + (interm[1] * a["w_interm_boxes"]).sum()
    )

    def gradients() -> dict[str, Tensor]:
        found = {
            re.sub(r"_embed\.0\.", "_embed.", k): v
            for k, v in to_theirs(own_gradients(model), links).items()
        }
        extra = {"transformer.level_embed": embed} | (
            {} if scheme is None else {"label_enc.weight": scheme.label_embed.weight}
        )
        return found | {k: p.grad for k, p in extra.items() if p.grad is not None}

    check_gradients(a, scalar, gradients)


def decode(decoder: Decoder, blocks: dict[Segment, Queries], memory: Memory) -> DecoderOutput:
    parts = list(blocks.values())
    joined = Queries(
        torch.cat([q.content for q in parts], 1),
        boxes=torch.cat([q.boxes for q in parts if q.boxes is not None], 1),
    )
    output: DecoderOutput = decoder(joined, memory, tuple(blocks), every_layer=True)
    return output


def check_gradients(
    a: Arrays,
    scalar: Tensor,
    gradients: Callable[[], dict[str, Tensor]],
    scalar_name: str = "scalar",
) -> None:
    """Every recorded gradient norm and gradient, to 1e-4 relative to its largest entry."""
    close(scalar, a[scalar_name], 1e-4, scalar_name)
    scalar.backward()
    ours = gradients()
    recorded = {
        str(n): norm for n, norm in zip(a.data["grad_norm_names"], a["grad_norms"], strict=True)
    }
    for name, norm in recorded.items():
        if "backbone" not in name:  # the recorded backbone is not built: its maps are the input
            found = ours[name].norm()
            close(found, norm, 1e-4 * max(1.0, norm.item()), f"gradient norm of {name}")
    for name, expected in a.group("grad/").items():
        tolerance = 1e-4 * max(1.0, expected.abs().max().item())
        close(ours[name], expected, tolerance, f"gradient of {name}")


def own_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()
    }


FAMILIES = {
    "conditional": "conditional_detr",
    "dab": "dab-detr",
    "detr": "detr",
    "deformable": "deformable_detr",
}


def check_hf(a: Arrays, kind: str) -> None:
    """A whole tiny model, loaded through the names that users' checkpoints are loaded by."""
    raw = a.json("config_json")
    config = recipe_of({"model_type": kind, **raw}).detector
    # The recorded backbone is another one: start from its maps.
    recorded = sorted(k for k in a.data if re.fullmatch(r"feat\d", k))
    strides = config.backbone.strides
    maps = [a.variable(k) for k in recorded[-len(strides) :]]
    config = config.model_copy(
        update={"backbone": BackboneConfig(pretrained=False, strides=strides)}
    )
    model = build_detector(config, a["logits"].shape[-1] - (config.scores == "softmax"))
    model.backbone = nn.Identity()
    model.neck = build_neck(config, [m.shape[1] for m in maps])
    model = model.double()
    links = link_up(model.state_dict(), huggingface(config), config.decoder.layers)
    assert not missing(model.state_dict(), links)
    weights = a.group("p/")
    assert all("backbone" in k for k in unused(weights, links))
    model.load_state_dict(
        to_ours(weights, links, {k: v.shape for k, v in model.state_dict().items()})
    )
    _check_outputs(a, model, maps, links)


def _check_outputs(a: Arrays, model: Detector, maps: list[Tensor], links: list[Link]) -> None:
    memory = model.encoder(neck_memory(model.neck, maps, a))
    assert memory.padding is not None
    # Padded tokens are nobody's keys; what their own rows hold is nobody's business.
    real = ~memory.padding.unsqueeze(-1)
    close(memory.tokens * real, a["encoder_last_hidden_state"] * real, 1e-5, "encoder")
    queries, proposals = model.propose(memory)
    for name in ("init_reference_points", "reference_points"):
        if name in a:
            assert queries.boxes is not None
            first = a[name][0] if a[name].dim() == 4 else a[name]
            close(queries.boxes, first, 1e-5, "first references")
    output = model.decoder(queries, memory, (), every_layer=True)
    close(output.logits, a["all_logits"], 1e-5, "logits")
    close(output.boxes, a["all_boxes"], 1e-5, "boxes")
    scalar = (output.logits * a["w_logits"]).sum() + (output.boxes * a["w_boxes"]).sum()
    if proposals is not None:
        close(proposals.logits, a["enc_outputs_class"], 1e-5, "proposal logits")
        boxes = model.get_submodule("queries.head").boxes(proposals)  # type: ignore[operator]
        close(boxes, a["enc_outputs_coord_logits"].sigmoid(), 1e-5, "proposal boxes")
        scalar = (
            scalar + (proposals.logits * a["w_enc_logits"]).sum() + (boxes * a["w_enc_boxes"]).sum()
        )

    check_gradients(a, scalar, lambda: to_theirs(own_gradients(model), links))


def neck_memory(neck: nn.Module, maps: list[Tensor], a: Arrays) -> Memory:
    padding = ~a["pixel_mask"].bool()
    memory: Memory = neck([m.double() for m in maps], padding)
    assert memory.padding is not None
    names = sorted(k for k in a.data if re.fullmatch(r"featmask\d", k))[-len(maps) :]
    start = 0
    for name, (height, width) in zip(names, memory.shapes, strict=False):
        own = memory.padding[:, start : start + height * width]
        assert torch.equal(~own, a[name].flatten(1).bool())
        start += height * width
    return memory


def check_hdetr(a: Arrays) -> None:
    """The transformer with both branches, their matching and losses, and all gradients."""
    cfg, levels, targets = a.json("cfg"), len(a.shapes()), a.targets()
    base = deformable_detr_r50_two_stage_plus().detector
    kind = MixedQueriesConfig if cfg["mixed_selection"] else ProposalQueriesConfig
    sizes = {"heads": cfg["nheads"], "hidden": cfg["ffn"]}
    refine = "look_forward_twice" if cfg["look_forward_twice"] else "detached"
    network = resized(
        base.replace(queries=kind(count=cfg["num_queries_one2one"], empty_compete=True)),
        width=cfg["d_model"],
        encoder={**sizes, "layers": cfg["enc_layers"], "levels": levels, "points": cfg["n_points"]},
        cross_attention={"points": cfg["n_points"]},
        decoder={**sizes, "layers": cfg["dec_layers"], "refine": refine},
        eps=cfg["inverse_sigmoid_eps"],
    )
    model = Transformer(network, cfg["num_classes"]).double()
    config = HybridConfig(
        k=cfg["k_one2many"], queries=cfg["num_queries_one2many"], weight=cfg["lambda_one2many"]
    )
    hybrid = Hybrid(config, model.queries).double()
    links = link_up(model.state_dict(), table(network, detrex=False), network.decoder.layers)
    weights = a.group("p/")
    own, further = weights["query_embed.weight"].split([network.queries.count, hybrid.queries])
    weights["query_embed.weight"] = own
    model.load_state_dict(
        to_ours(weights, links, {k: v.shape for k, v in model.state_dict().items()})
    )
    if cfg["mixed_selection"]:
        hybrid.table.load_state_dict({"content": further})

    embed = a.variable("p/transformer.level_embed")
    memory = model.encoder(dino_memory(a, levels, embed))
    queries, proposals = model.queries(memory)
    count = torch.tensor(float(len(targets.labels)), dtype=torch.float64)
    supervision = Supervision(weights={"class": 2.0, "box": 5.0, "giou": 2.0})
    step = Step(model, memory, queries, proposals, targets, supervision, count, count)  # type: ignore[arg-type]
    (block,) = hybrid.extend(step).blocks
    first = torch.cat([q.boxes for q in (queries, block.queries) if q.boxes is not None], 1)
    close(first, a["init_reference"], 1e-5, "first references")
    segments = (Segment("main", network.queries.count), block.segment)
    output = model.decoder(
        concatenate([queries, block.queries]), memory, segments, every_layer=True
    )
    close(output.logits, a["all_logits"], 1e-5, "logits")
    close(output.boxes, a["all_boxes"], 1e-5, "boxes")
    close(proposals.logits, a["enc_logits"], 1e-5, "proposal logits")

    objectness = targets._replace(labels=torch.zeros_like(targets.labels))
    every = model.queries.head.training_output(proposals)
    size = network.queries.count
    assert block.normaliser is not None
    tasks = [
        supervision.task("o2o", output.map(lambda t: t[:, :, :size]), targets, count),
        block.supervision.task(
            "o2m",
            output.map(lambda t: t[:, :, size:]),
            targets,
            block.normaliser,
            weight=block.weight,
        ),
        supervision.proposals().task("enc", every, objectness, count),
    ]
    losses, _ = supervise(tasks)
    for key, value in losses.items():
        task, term, layer = key.split("/")
        name = {"class": "ce", "box": "bbox", "giou": "giou"}[term]
        recorded = f"loss/enc_loss_{name}" if task == "enc" else f"loss/{task}_loss_{name}_l{layer}"
        close(value / supervision.weights[term], a[recorded], 1e-5, key)
    check_gradients(
        a,
        torch.stack(list(losses.values())).sum(),
        lambda: _hdetr_gradients(model, hybrid, links, embed),
        scalar_name="loss_total",
    )


def _hdetr_gradients(
    model: nn.Module, hybrid: Hybrid, links: list[Link], embed: Tensor
) -> dict[str, Tensor]:
    found = to_theirs(own_gradients(model), links)
    # The decoder's second names
    found |= {f"transformer.decoder.{k}": v for k, v in found.items() if "_embed." in k}
    assert embed.grad is not None
    found["transformer.level_embed"] = embed.grad
    content = hybrid.table.get("content")
    if content is not None:
        found["query_embed.weight"] = torch.cat([found["query_embed.weight"], content.grad])
    return found
