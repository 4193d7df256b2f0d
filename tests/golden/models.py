"""Checks of whole tiny models: values and gradients, which prove the detach rules too."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from detrellis.nn.decoder import Decoder
from detrellis.nn.neck import MultiScaleNeck
from detrellis.nn.position import SineMap
from detrellis.nn.queries import LearnedQueries, ProposalQueries, select
from detrellis.recipes.config import BackboneConfig, DetectorConfig
from detrellis.recipes.dino import dino_detector
from detrellis.recipes.network import build_decoder, build_detector, build_encoder, build_queries
from detrellis.schemes.cdn import ContrastiveDenoising, group_count
from detrellis.schemes.denoising import lay_out
from detrellis.types import DecoderOutput, Memory, Queries, Segment

from .arrays import Arrays, close
from .base import recorded_noise

Rename = list[tuple[str, str]]


def rename(name: str, rules: Rename) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def load(model: nn.Module, weights: dict[str, Tensor], rules: Rename, fixed: dict[str, Tensor] | None = None) -> None:
    """Load renamed weights; every parameter of the model must be met."""
    own = {rename(k, rules): v for k, v in weights.items()} | (fixed or {})
    missing = set(model.state_dict()) - set(own)
    assert not missing, missing
    model.load_state_dict({k: own[k] for k in model.state_dict()})


REFERENCE: Rename = [
    (r"\.(self_attn)\.in_proj_(weight|bias)", r".self_attention.projections.\2"),
    (r"decoder(\.layers\.\d+)\.self_attn\.out_proj", r"decoder\1.self_attention.output"),
    (r"encoder(\.layers\.\d+)\.self_attn", r"encoder\1.attention"),
    (r"cross_attn", "cross_attention"),
    (r"(value|output)_proj\.", r"\1_projection."),
    (r"encoder(\.layers\.\d+)\.norm1", r"encoder\1.norm"),
    (r"encoder(\.layers\.\d+)\.norm2", r"encoder\1.feed_forward.norm"),
    (r"decoder(\.layers\.\d+)\.norm1", r"decoder\1.norm_cross"),
    (r"decoder(\.layers\.\d+)\.norm2", r"decoder\1.norm_self"),
    (r"decoder(\.layers\.\d+)\.norm3", r"decoder\1.feed_forward.norm"),
    (r"\.linear1", ".feed_forward.inner"),
    (r"\.linear2", ".feed_forward.outer"),
    (r"^transformer\.", ""),
]
DINO: Rename = [
    *REFERENCE,
    (r"^decoder\.norm\.", "decoder.final_norm."),
    (r"^decoder\.ref_point_head", "decoder.position.mlp"),
    (r"^tgt_embed\.weight", "queries.content"),
    (r"^enc_output\.", "queries.head.projection."),
    (r"^enc_output_norm\.", "queries.head.norm."),
    (r"^enc_out_class_embed\.", "queries.head.classify."),
    (r"^enc_out_bbox_embed\.", "queries.head.move."),
    (r"^class_embed\.", "decoder.heads.classes.0."),
    (r"^bbox_embed\.", "decoder.heads.boxes.0."),
]


class Transformer(nn.Module):
    """What the reference calls the transformer: everything behind the neck."""

    def __init__(self, c: dict[str, int], levels: int) -> None:
        super().__init__()
        config = dino_detector(levels=levels).model_copy(
            update={
                "width": c["d_model"],
                "heads": c["nheads"],
                "hidden": c["ffn"],
                "points": c["n_points"],
                "encoder_layers": c["enc_layers"],
                "decoder_layers": c["dec_layers"],
                "query_count": c["num_queries"],
                "eps": c["inverse_sigmoid_eps"],
            }
        )
        self.encoder = build_encoder(config)
        self.decoder = build_decoder(config, c["num_classes"])
        self.queries = build_queries(config, c["num_classes"])


def dino_memory(a: Arrays, levels: int, embed: Tensor) -> Memory:
    """The reference's inputs as a memory before the encoder; the level embedding is part of its transformer."""
    maps, masks = [a[f"src{i}"] for i in range(levels)], [a[f"mask{i}"].bool() for i in range(levels)]
    position = torch.cat([a[f"pos{i}"].flatten(2).transpose(1, 2) + embed[i] for i in range(levels)], 1)
    ratios = [torch.stack([(~m[:, 0]).double().mean(1), (~m[:, :, 0]).double().mean(1)], -1) for m in masks]
    return Memory(
        torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1),
        position,
        a.shapes(),
        torch.cat([m.flatten(1) for m in masks], 1),
        torch.stack(ratios, 1),
    )


def check_dino(a: Arrays) -> None:
    config, levels = a.json("cfg"), len(a.shapes())
    model = Transformer(config, levels).double()
    load(model, a.group("p/"), DINO)
    embed = a.variable("p/transformer.level_embed")
    memory = model.encoder(dino_memory(a, levels, embed))
    queries, proposals = model.queries(memory)
    scheme = None
    blocks = {Segment("main", config["num_queries"]): queries}
    if config["train"]:
        scheme = ContrastiveDenoising(
            config["d_model"], config["num_classes"], config["inverse_sigmoid_eps"], number=config["dn_number"]
        ).double()
        scheme.label_embed.load_state_dict({"weight": a["p/label_enc.weight"]})
        targets = a.targets()
        layout = lay_out(targets, group_count(config["dn_number"], max(targets.sizes)), 2)
        cdn = scheme.queries(targets, layout, recorded_noise(a, 0.25))
        if layout.slots:
            blocks = {Segment("cdn", layout.slots, layout.groups, ("main",)): cdn, **blocks}
    output = decode(model.decoder, blocks, memory)
    interm = [select(t, proposals.best) for t in proposals[:2]]
    close(output.logits, a["all_logits"], 1e-5, "logits")
    close(output.boxes, a["all_boxes"], 1e-5, "boxes")
    close(interm[0], a["interm_logits"], 1e-5, "proposal logits")
    close(interm[1], a["interm_boxes"], 1e-5, "proposal boxes")
    scalar = (output.logits * a["w_logits"]).sum() + (output.boxes * a["w_boxes"]).sum()
    scalar = scalar + (interm[0] * a["w_interm_logits"]).sum() + (interm[1] * a["w_interm_boxes"]).sum()
    extra = {"level_embed": embed} | ({} if scheme is None else {"label_enc.weight": scheme.label_embed.weight})
    check_gradients(
        a, scalar, lambda: own_gradients(model) | {k: p.grad for k, p in extra.items() if p.grad is not None}, DINO
    )


def decode(decoder: Decoder, blocks: dict[Segment, Queries], memory: Memory) -> DecoderOutput:
    parts = list(blocks.values())
    joined = Queries(
        torch.cat([q.content for q in parts], 1), boxes=torch.cat([q.boxes for q in parts if q.boxes is not None], 1)
    )
    output: DecoderOutput = decoder(joined, memory, tuple(blocks), every_layer=True)
    return output


def check_gradients(a: Arrays, scalar: Tensor, gradients: Callable[[], dict[str, Tensor]], rules: Rename) -> None:
    """Every recorded gradient norm and gradient, to 1e-4 relative to its largest entry."""
    close(scalar, a["scalar"], 1e-4, "scalar")
    scalar.backward()
    ours = gradients()
    recorded = {str(n): norm for n, norm in zip(a.data["grad_norm_names"], a["grad_norms"], strict=True)}
    for name, norm in recorded.items():
        if "backbone" not in name:  # the recorded backbone is not built: its maps are the input
            found = ours[rename(name, rules)].norm()
            close(found, norm, 1e-4 * max(1.0, norm.item()), f"gradient norm of {name}")
    for name, expected in a.group("grad/").items():
        tolerance = 1e-4 * max(1.0, expected.abs().max().item())
        close(ours[rename(name, rules)], expected, tolerance, f"gradient of {name}")


def own_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by our names, and where the references split or pack a tensor differently, by theirs too."""
    found = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}
    for name in [k for k in found if "self_attention.projections" in k]:
        for part, gradient in zip("qkv", found[name].chunk(3), strict=True):
            found[name.replace("self_attention.projections", f"self_attn.{part}_proj")] = gradient
    if "queries.position" in found:
        both = torch.cat([found["queries.position"], found["queries.content"]], 1)
        found["query_position_embeddings.weight"] = both
    return found


HF: Rename = [
    (r"^model\.", ""),
    (r"encoder(\.layers\.\d+)\.self_attn\.", r"encoder\1.attention."),
    (r"encoder(\.layers\.\d+)\.self_attn_layer_norm", r"encoder\1.norm"),
    (r"decoder(\.layers\.\d+)\.self_attn_layer_norm", r"decoder\1.norm_self"),
    (r"encoder_attn_layer_norm", "norm_cross"),
    (r"encoder_attn\.", "cross_attention."),
    (r"final_layer_norm", "feed_forward.norm"),
    (r"mlp\.fc1", "feed_forward.inner"),
    (r"mlp\.fc2", "feed_forward.outer"),
    (r"self_attn\.o_proj", "self_attention.output"),
    (r"(value|output)_proj\.", r"\1_projection."),
    (r"^level_embed", "neck.level_embed"),
    (r"^input_proj\.(\d)", r"neck.projections.\1"),
    (r"^reference_points", "queries.reference"),
    (r"^enc_output\.", "queries.head.projection."),
    (r"^enc_output_norm\.", "queries.head.norm."),
    (r"^pos_trans\.", "queries.derive.0."),
    (r"^pos_trans_norm\.", "queries.derive.1."),
    (r"^(?:decoder\.)?class_embed\.", "decoder.heads.classes."),
    (r"^(?:decoder\.)?bbox_embed\.", "decoder.heads.boxes."),
]


# What a file's `config_json` leaves out is the configuration class's default.
HF_DEFAULTS = {
    "num_labels": 2,
    "d_model": 256,
    "num_queries": 300,
    "num_feature_levels": 4,
    "two_stage": False,
    "two_stage_num_proposals": 300,
    "with_box_refine": False,
    **{f"{part}_layers": 6 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 8 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 1024 for part in ("encoder", "decoder")},
    **{f"{part}_n_points": 4 for part in ("encoder", "decoder")},
}


def hf_weights(a: Arrays, layers: int, maps: int) -> tuple[Rename, dict[str, Tensor]]:
    """Rename rules for these layer counts, and the weights that no renaming gives (packed or split tensors)."""
    raw = {rename(k, HF): v for k, v in a.group("p/").items()}
    rules = [
        *HF,
        (rf"^decoder\.heads\.classes\.{layers}\.", "queries.head.classify."),
        (rf"^decoder\.heads\.boxes\.{layers}\.", "queries.head.move."),
        *((rf"^neck\.projections\.{maps + i}\.", f"neck.extra.{i}.") for i in range(4)),
    ]
    fixed = {}
    for i in range(layers):
        at = f"decoder.layers.{i}"
        for kind in ("weight", "bias"):
            parts = [raw[f"{at}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            fixed[f"{at}.self_attention.projections.{kind}"] = torch.cat(parts)
    if "query_position_embeddings.weight" in raw:
        position, content = raw["query_position_embeddings.weight"].chunk(2, dim=1)
        fixed |= {"queries.position": position, "queries.content": content}
    return rules, fixed


def check_deformable(a: Arrays) -> None:
    config = HF_DEFAULTS | a.json("config_json")
    for part in ("attention_heads", "ffn_dim", "n_points"):
        assert config[f"encoder_{part}"] == config[f"decoder_{part}"], f"ours has one {part} for both stacks"
    two_stage, refine = config["two_stage"], config["with_box_refine"]
    layers, levels = config["decoder_layers"], config["num_feature_levels"]
    ours = DetectorConfig(
        backbone=BackboneConfig(name="resnet18", pretrained=False),
        width=config["d_model"],
        heads=config["encoder_attention_heads"],
        encoder_layers=config["encoder_layers"],
        decoder_layers=layers,
        levels=levels,
        points=config["encoder_n_points"],
        hidden=config["encoder_ffn_dim"],
        dropout=0.0,
        queries="proposals" if two_stage else "learned",
        query_count=config["two_stage_num_proposals"] if two_stage else config["num_queries"],
        refine="detached" if refine else "none",
    )
    maps = [a.variable(k) for k in sorted(k for k in a.data if re.fullmatch(r"feat\d", k))]
    model = build_detector(ours, config["num_labels"]).double()
    # The recorded backbone is another one: start from its maps.
    model.backbone = nn.Identity()
    position = SineMap(ours.width, temperature=10000.0, offset=-0.5)
    model.neck = MultiScaleNeck([m.shape[1] for m in maps], ours.width, levels, position).double()
    assert isinstance(model.queries, LearnedQueries | ProposalQueries)
    rules, fixed = hf_weights(a, layers, len(maps))
    load(model, a.group("p/"), rules, fixed)

    memory = model.encoder(neck_memory(model.neck, maps, a))
    assert memory.padding is not None
    # Padded tokens are nobody's keys; what their own rows hold is nobody's business.
    real = ~memory.padding.unsqueeze(-1)
    close(memory.tokens * real, a["encoder_last_hidden_state"] * real, 1e-5, "encoder")
    queries, proposals = model.propose(memory)
    assert queries.boxes is not None
    close(queries.boxes, a["init_reference_points"], 1e-5, "first references")
    output = model.decoder(queries, memory, (), every_layer=True)
    close(output.logits, a["all_logits"], 1e-5, "logits")
    close(output.boxes, a["all_boxes"], 1e-5, "boxes")
    scalar = (output.logits * a["w_logits"]).sum() + (output.boxes * a["w_boxes"]).sum()
    if proposals is not None:
        close(proposals.logits, a["enc_outputs_class"], 1e-5, "proposal logits")
        close(proposals.boxes, a["enc_outputs_coord_logits"].sigmoid(), 1e-5, "proposal boxes")
        scalar = scalar + (proposals.logits * a["w_enc_logits"]).sum() + (proposals.boxes * a["w_enc_boxes"]).sum()
    check_gradients(a, scalar, lambda: own_gradients(model), rules)


def neck_memory(neck: MultiScaleNeck, maps: list[Tensor], a: Arrays) -> Memory:
    padding = ~a["pixel_mask"].bool()
    memory = neck([m.double() for m in maps], padding)
    assert memory.padding is not None
    for i in range(len(maps)):
        start = sum(h * w for h, w in memory.shapes[:i])
        count = memory.shapes[i][0] * memory.shapes[i][1]
        assert torch.equal(~memory.padding[:, start : start + count], a[f"featmask{i}"].flatten(1).bool())
    return memory._replace(tokens=memory.tokens, position=memory.position.double())
