"""SAM-DETR, SAM-DETR++ and SMCA-DETR."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from detrellis.matching import Hungarian, Match, assign
from detrellis.nn.attention import SelfAttention, merge_heads
from detrellis.nn.conditional import ConditionalSelfAttention
from detrellis.nn.decoder import DecoderLayer
from detrellis.nn.mlp import FeedForward
from detrellis.nn.neck import flatten
from detrellis.nn.position import SineMap, sine_embed
from detrellis.nn.prior import log_prior
from detrellis.nn.semantic import SemanticAligner, SemanticCrossAttention
from detrellis.nn.smca import ModulatedAttention, ModulatedPriors
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.network import build_decoder, build_encoder, build_neck, build_queries
from detrellis.recipes.sam import sam_detector, sam_plus_detector, smca_detr_r50
from detrellis.set_loss import SetLoss
from detrellis.types import DecoderOutput, Memory, Prior, Queries, Segment, Spatial, Targets

from ..small import resized
from .arrays import Arrays, close


def meta(a: Arrays) -> dict[str, int]:
    pairs = (word.split("=") for word in str(a.data["meta"]).split() if "=" in word)
    return {k: int(v) for k, v in pairs if v.isdigit()}


def memory_of(maps: Tensor, padding: Tensor, position: Tensor | None = None) -> Memory:
    """One map `(B, d, H, W)` as a memory, valid ratios as our neck counts them."""
    found = flatten(
        [maps], padding.bool(), SineMap(maps.shape[1], temperature=1e4, offset=-0.5, blank=True)
    )
    return (
        found if position is None else found._replace(position=position.flatten(2).transpose(1, 2))
    )


ALIGNER = {
    "kp_conv": "reduce",
    **{f"kp_mlp.{i}": f"find.{2 * i}" for i in range(4)},
    "rw_content": "content_gate",
    "rw_pos": "position_gate",
}
CROSS = {
    **{k: f"aligner.{v}" for k, v in ALIGNER.items()},
    "cross_q_content": "query",
    "cross_k_content": "key",
    "cross_v": "value",
    **{
        f"cross_{k}_pos.{i}": f"{v}_position.layers.{i}"
        for k, v in (("q", "query"), ("k", "key"))
        for i in (0, 1)
    },
    "cross_out": "output",
}
LAYER = {
    **{k: f"cross_attention.{v}" for k, v in CROSS.items()},
    "self_out": "self_attention.output",
    "norm_self": "norm_self",
    "norm_cross": "norm_cross",
    "ffn.0": "feed_forward.inner",
    "ffn.1": "feed_forward.outer",
    "norm_ffn": "feed_forward.norm",
}
PACKED = {
    "self_attention.content": ("self_q_content", "self_k_content", "self_v"),
    "self_attention.position": ("self_q_pos", "self_k_pos"),
}


def renamed(
    weights: dict[str, Tensor], names: dict[str, str], packed: dict[str, tuple[str, ...]]
) -> dict[str, Tensor]:
    found = {}
    for end in (".weight", ".bias"):
        found |= {ours + end: weights[theirs + end] for theirs, ours in names.items()}
        found |= {
            ours + end: torch.cat([weights[t + end] for t in theirs])
            for ours, theirs in packed.items()
        }
    return found


def same(actual: Tensor, expected: Tensor, what: str, tolerance: float = 5e-5) -> None:
    torch.testing.assert_close(
        actual.detach(), expected, atol=tolerance, rtol=1e-4, msg=lambda m: f"{what}: {m}"
    )


def check_gradients(a: Arrays, scalar: Tensor, variables: dict[str, Tensor]) -> None:
    torch.testing.assert_close(
        scalar.detach(), a["scalar"].to(scalar.dtype).view(()), rtol=1e-4, atol=1e-6
    )
    found = torch.autograd.grad(scalar, list(variables.values()), allow_unused=True)
    for (name, value), slope in zip(variables.items(), found, strict=True):
        expected = a[f"grad_{name}"]
        slope = torch.zeros_like(value) if slope is None else slope
        close(slope, expected, 1e-4 * float(expected.abs().max()) + 1e-6, f"gradient of {name}")


def log_gaussian(prior: Prior, shape: tuple[int, int]) -> Tensor:
    rows, columns = log_prior(prior, shape)
    return (rows + columns).flatten(3)


def check_aligner(a: Arrays) -> None:
    maps, boxes, x = (a.variable(k) for k in ("memory", "ref_boxes", "prev_queries"))
    smca = bool(meta(a)["smca"])
    aligner = SemanticAligner(maps.shape[1], meta(a)["M"], prior=smca).double()
    aligner.load_state_dict(renamed(a.group("w."), ALIGNER, {}))
    memory = memory_of(maps, a["pad_mask"])
    aligned = aligner(x, boxes, memory)
    same(aligned.points, a["keypoints"], "points")
    same(aligned.content, a["content_reweighted"], "contents")
    same(aligned.position, a["pos_reweighted"], "positions")
    same(sine_embed(aligned.points, x.shape[-1] // 2), a["pos_sine"], "sine embeddings")
    scalar = (aligned.content * a["G_content_reweighted"]).sum() + (
        aligned.position * a["G_pos_reweighted"]
    ).sum()
    if aligned.scale is not None:
        prior = attention_prior(aligned.points, aligned.scale, memory)
        gaussian = log_gaussian(prior, memory.shapes[0])
        same(gaussian, a["log_gauss"], "log Gaussian", 1e-4)
        scalar = scalar + (gaussian * a["G_log_gauss"]).sum()
    taught = ("kp_mlp.3", "kp_conv", "rw_content", "rw_pos")
    parameters = {f"w.{k}.bias": aligner.get_parameter(f"{ALIGNER[k]}.bias") for k in taught}
    check_gradients(
        a, scalar, {"memory": maps, "prev_queries": x, "ref_boxes": boxes, **parameters}
    )


def attention_prior(points: Tensor, scale: Tensor, memory: Memory) -> Prior:
    height, width = memory.shapes[0]
    assert memory.valid_ratios is not None
    return Prior(
        points * points.new_tensor([width, height]) * memory.valid_ratios.unsqueeze(2),
        scale,
        first=0.5,
    )


def make_layer(width: int, heads: int, hidden: int, *, smca: bool) -> DecoderLayer:
    aligner = SemanticAligner(width, heads, prior=smca)
    attention = SemanticCrossAttention(width, heads, aligner)
    return DecoderLayer(
        ConditionalSelfAttention(width, heads), attention, FeedForward(width, hidden), width
    )


def check_layer(a: Arrays) -> None:
    names = ("memory", "queries_in", "ref_boxes", "query_center_sine", "memory_pos")
    variables = {k: a.variable(k) for k in names}
    maps, x, boxes, sine, position = variables.values()
    sizes = meta(a)
    layer = make_layer(sizes["d"], sizes["M"], sizes["ffn"], smca=bool(sizes["smca"])).double()
    layer.load_state_dict(renamed(a.group("w."), LAYER, PACKED))
    memory = memory_of(maps, a["pad_mask"], position)
    where, segments = Spatial(sine, boxes), (Segment("main", x.shape[1]),)
    out, _ = layer(x, where, memory, segments)
    same(out, a["queries_out"], "queries")
    attention = layer.cross_attention
    assert isinstance(attention, SemanticCrossAttention)
    before = layer.norm_self(x + layer.self_attention(x, sine, segments))
    aligned = attention.aligner(before, boxes, memory)
    same(aligned.points, a["keypoints"], "points")
    attended, weights = attention.attend(aligned, memory)
    same(weights, a["cross_attn"], "attention")
    same(
        layer.norm_cross(before + attention.output(merge_heads(attended))),
        layer.norm_cross(before + attention(before, where, memory)),
        "attend",
    )
    scalar = (out * a["G_out"]).sum()
    check_gradients(a, scalar, variables)


def check_positions(a: Arrays) -> None:
    for i in range(sum(k.startswith("mask.") for k in a.data)):
        mask = a[f"mask.{i}"].bool()
        expected = a[f"grid_embed.{i}"].flatten(2).transpose(1, 2)
        found = SineMap(expected.shape[-1], temperature=1e4, offset=-0.5, blank=True)(
            (~mask).double()
        )
        same(found, expected, f"map {i}")
    for i in range(sum(k.startswith("points.") for k in a.data)):
        expected = a[f"point_embed.{i}"]
        same(sine_embed(a[f"points.{i}"], expected.shape[-1] // 2), expected, f"points {i}")


# Whole models


class Model(nn.Module):
    """Everything behind the backbone."""

    def __init__(self, config: DetectorConfig, channels: list[int], classes: int) -> None:
        super().__init__()
        self.neck = build_neck(config, channels)
        self.encoder = build_encoder(config)
        self.decoder = build_decoder(config, classes)
        self.queries = build_queries(config, classes)


MSDA = {
    f"msda.{t}": f"attention.{o}"
    for t, o in (
        ("sampling_offsets", "sampling_offsets"),
        ("attention_weights", "attention_weights"),
        ("value_proj", "value_projection"),
        ("output_proj", "output_projection"),
    )
}
DENSE = {"attn_in": "attention.projections", "attn_out": "attention.output"}
ENCODER = {
    "norm_attn": "norm",
    "ffn.0": "feed_forward.inner",
    "ffn.1": "feed_forward.outer",
    "norm_ffn": "feed_forward.norm",
}


def at(prefix: str, names: dict[str, str], to: str) -> dict[str, str]:
    return {f"{prefix}.{k}": f"{to}.{v}" for k, v in names.items()}


def heads(layers: int) -> dict[str, str]:
    found = {f"cls_head.{i}": f"decoder.heads.classes.{i}" for i in range(layers)}
    return found | {
        f"box_head.{i}.{j}": f"decoder.heads.boxes.{i}.layers.{j}"
        for i in range(layers)
        for j in range(3)
    }


def check_detector(a: Arrays) -> None:
    sizes, several = meta(a), bool(meta(a)["multiscale"])
    normed = {} if several else {"neck_norm": bool(sizes["groupnorm"])}
    config = resized(
        sam_plus_detector() if several else sam_detector(),
        width=sizes["d"],
        encoder={
            "heads": sizes["M"],
            "hidden": sizes["ffn_enc"],
            "layers": sizes["enc_layers"],
            **normed,
        },
        queries={"count": sizes["queries"]},
        cross_attention={"smca": bool(sizes["smca"])},
        decoder={"heads": sizes["M"], "hidden": sizes["ffn_dec"], "layers": sizes["dec_layers"]},
    )
    features = [a.variable(f"feat.{i}") for i in range(a.count(r"feat\.\d+"))]
    model = Model(config, [f.shape[1] for f in features], sizes["classes"]).double()
    weights = a.group("w.")
    names, packed = heads(config.decoder.layers), {}
    for i in range(len(features)):
        conv, norm = (
            (f"neck.projections.{i}.0", f"neck.projections.{i}.1")
            if several
            else ("neck.projection", "neck.norm")
        )
        names[f"in_proj.{i}.conv"] = conv
        if f"in_proj.{i}.gn.weight" in weights:
            names[f"in_proj.{i}.gn"] = norm
    for i in range(config.encoder.layers):
        names |= at(f"enc.{i}", ENCODER | (MSDA if several else DENSE), f"encoder.layers.{i}")
    for i in range(config.decoder.layers):
        layer = {
            k: v.replace("cross_attention.", "cross_attention.attention.") if several else v
            for k, v in LAYER.items()
        }
        names |= at(f"dec.{i}", layer, f"decoder.layers.{i}")
        packed |= {
            f"decoder.layers.{i}.{o}": tuple(f"dec.{i}.{t}" for t in theirs)
            for o, theirs in PACKED.items()
        }
    state = renamed(weights, names, packed)
    centres, size = weights["ref_box_logits"].split(2, dim=1)
    state |= {"queries.centres": centres, "queries.sizes": size}
    if several:
        state["neck.level_embed"] = weights["level_embed"]
    model.load_state_dict(state)

    memory = model.encoder(model.neck(features, a["image_pad_mask"].bool()))
    for i, part in enumerate(memory.tokens.split([h * w for h, w in memory.shapes], dim=1)):
        valid = ~a[f"pad_mask.{i}"].bool().flatten(1)
        same(part[valid], a[f"memory.{i}"].flatten(2).transpose(1, 2)[valid], f"memory {i}")
    queries, _ = model.queries(memory)
    output = model.decoder(queries, memory, (Segment("main", sizes["queries"]),), every_layer=True)
    same(output.states, a["hs"], "states")
    same(output.boxes, a["pred_boxes"], "boxes")
    same(output.logits, a["pred_logits"], "logits")
    scalar = (output.boxes * a["G_pred_boxes"]).sum() + (output.logits * a["G_pred_logits"]).sum()
    slopes = torch.autograd.grad(scalar, [*features, model.queries.centres, model.queries.sizes])
    torch.testing.assert_close(scalar.detach(), a["scalar"].view(()), rtol=1e-4, atol=1e-6)
    found = {f"feat.{i}": slope for i, slope in enumerate(slopes[:-2])}
    found["w.ref_box_logits"] = torch.cat(slopes[-2:], dim=1)
    for name, slope in found.items():
        expected = a[f"grad_{name}"]
        close(slope, expected, 1e-4 * float(expected.abs().max()) + 1e-6, f"gradient of {name}")


def check_criterion(a: Arrays) -> None:
    logits, boxes = a.variable("pred_logits"), a.variable("pred_boxes")
    count = sum(k.startswith("labels.") for k in a.data)
    labels = [a[f"labels.{b}"].long().view(-1) for b in range(count)]
    targets = Targets(
        torch.cat(labels),
        torch.cat([a[f"boxes.{b}"].view(-1, 4) for b in range(count)]),
        tuple(len(x) for x in labels),
    )
    output = DecoderOutput(logits, boxes, boxes)
    (found,) = assign([Match(output, targets, Hungarian())])
    for layer in range(len(logits)):
        for b, first in enumerate(targets.offsets):
            own = (found.layer == layer) & (found.image == b)
            pairs = torch.stack([found.query[own], found.target[own] - first])
            assert torch.equal(
                pairs[:, pairs[0].argsort()],
                a[f"match.{layer}.{b}"].long()[:, a[f"match.{layer}.{b}"][0].argsort()],
            )
    terms = SetLoss()(
        output, targets, found, torch.tensor(float(len(targets.labels)), dtype=torch.float64)
    )
    for ours, theirs in (("class", "ce"), ("box", "bbox"), ("giou", "giou")):
        for layer, value in enumerate(terms[ours]):
            torch.testing.assert_close(
                value.detach(), a[f"loss_{theirs}_{layer}"].view(()), rtol=1e-4, atol=1e-6
            )
    total = sum(w * terms[k].sum() for k, w in (("class", 2), ("box", 5), ("giou", 2)))
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total.detach(), a["total"].view(()), rtol=1e-4, atol=1e-6)
    for name, slope in zip(
        ("pred_logits", "pred_boxes"), torch.autograd.grad(total, [logits, boxes]), strict=True
    ):
        expected = a[f"grad_{name}"]
        close(slope, expected, 1e-4 * float(expected.abs().max()) + 1e-6, f"gradient of {name}")


# SMCA-DETR by itself


def smca_layer(layer: str) -> dict[str, str]:
    attention = {
        f"{k}_{t}": f"{k}{'_attention'}.{o}"
        for k in ("self", "cross")
        for t, o in (("in", "projections"), ("out", "output"))
    }
    norms = {"norm_self": "norm_self", "norm_cross": "norm_cross", "norm_ffn": "feed_forward.norm"}
    return {
        f"{layer}.{k}": v
        for k, v in (
            attention | norms | {"ffn.0": "feed_forward.inner", "ffn.1": "feed_forward.outer"}
        ).items()
    }


def image_ratios(memory: Memory, sizes: Tensor, strides: tuple[int, ...]) -> Memory:
    """The reference's centres lie in shares of the image's pixels, ours of whole cells."""
    cells = [
        sizes.flip(-1) / s / sizes.new_tensor([w, h])
        for (h, w), s in zip(memory.shapes, strides, strict=True)
    ]
    return memory._replace(valid_ratios=torch.stack(cells, dim=1))


def check_smca(a: Arrays) -> None:
    sizes = meta(a)
    both = {"heads": sizes["heads"], "hidden": sizes["ffn"]}
    config = resized(
        smca_detr_r50().detector,
        width=sizes["d"],
        encoder={**both, "layers": sizes["enc_layers"]},
        queries={"count": sizes["queries"]},
        decoder={**both, "layers": sizes["dec_layers"]},
        dropout=0.0,
    )
    model = Model(config, [a["feat"].shape[1]], sizes["logits_per_query"]).double()
    weights = a.group("w.")
    names = {
        "in_proj.conv": "neck.projection",
        "dec_norm": "decoder.final_norm",
        "cls_head": "decoder.heads.classes.0",
    }
    names |= {f"box_head.{j}": f"decoder.heads.boxes.0.layers.{j}" for j in range(3)}
    names |= {f"dec.0.center_mlp.{j}": f"queries.reference.1.layers.{j}" for j in range(3)}
    for i in range(config.encoder.layers):
        names |= at(f"enc.{i}", ENCODER | DENSE, f"encoder.layers.{i}")
    for i in range(config.decoder.layers):
        names |= {k: f"decoder.layers.{i}.{v}" for k, v in smca_layer(f"dec.{i}").items()}
        for t, o in (("norm_point", "norms"), ("offset", "offsets"), ("scale", "scales")):
            names[f"dec.{i}.{t}"] = f"decoder.position.{o}.{i}"
    state = renamed(weights, names, {})
    state |= {
        f"queries.reference.0.{k}": weights[f"dec.0.norm_point.{k}"] for k in ("weight", "bias")
    }
    model.load_state_dict(state | {"queries.position": weights["query_embed"]})
    feature = a.variable("feat")
    memory = model.neck.flatten(model.neck.project([feature]), None)
    memory = memory._replace(
        position=a["pos"].flatten(2).transpose(1, 2), padding=a["pad_mask"].bool().flatten(1)
    )
    memory = model.encoder(image_ratios(memory, a["image_sizes_hw"].double(), (sizes["stride"],)))
    valid = ~memory.padding
    same(memory.tokens[valid], a["memory"].flatten(2).transpose(1, 2)[valid], "memory")
    queries, _ = model.queries(memory)
    assert queries.boxes is not None
    same(queries.boxes, a["center_logit"].sigmoid(), "centres")
    output = model.decoder(queries, memory, (Segment("main", sizes["queries"]),), every_layer=True)
    same(output.states, a["hs"], "states")
    same(output.boxes, a["pred_boxes"], "boxes")
    same(output.logits, a["pred_logits"], "logits")
    first = model.decoder.position(0, queries.content, queries, queries.boxes, memory)
    assert first.priors is not None
    same(log_gaussian(first.priors[0], memory.shapes[0]), a["log_gauss"][0], "log Gaussian", 1e-4)
    scalar = (output.boxes * a["G_pred_boxes"]).sum() + (output.logits * a["G_pred_logits"]).sum()
    check_gradients(a, scalar, {"feat": feature})


def check_scale_selection(a: Arrays) -> None:
    sizes, stated = meta(a), re.search(r"strides ([\d,]+)", str(a.data["meta"]))
    assert stated is not None
    strides = tuple(int(stride) for stride in stated[1].strip(",").split(","))
    width, depth = sizes["d"], a.count(r"out\d+")
    position = ModulatedPriors(width, sizes["heads"], depth, strides).double()
    layers = [
        DecoderLayer(
            SelfAttention(width, sizes["heads"]),
            ModulatedAttention(width, sizes["heads"]),
            FeedForward(width, sizes["ffn"]),
            width,
        ).double()
        for _ in range(depth)
    ]
    weights = a.group("w.")
    for i, layer in enumerate(layers):
        layer.load_state_dict(renamed(weights, smca_layer(str(i)), {}))
        for t, module in (
            ("norm_point", position.norms),
            ("offset", position.offsets),
            ("scale", position.scales),
            ("scale_select", position.levels),
        ):
            module[i].load_state_dict({k: weights[f"{i}.{t}.{k}"] for k in ("weight", "bias")})
    memory = Memory(a["memory"], a["memory_pos"], a.shapes("level_shapes"), a["pad_mask"].bool())
    memory = image_ratios(memory, a["image_sizes_hw"].double(), strides)
    points = a["center_logit"].sigmoid()
    queries = Queries(torch.zeros_like(a["query_pos"]), a["query_pos"], points)
    x = queries.content
    for i, layer in enumerate(layers):
        where = position(i, x, queries, points, memory)
        same(where.level_weights, a[f"scale_weights.{i}"], "shares")
        gaussians = [log_gaussian(p, s) for p, s in zip(where.priors, memory.shapes, strict=True)]
        same(torch.cat(gaussians, dim=-1), a[f"log_gauss.{i}"], "log Gaussian", 1e-4)
        before = layer.norm_self(
            x + layer.self_attention(x, where.position, (Segment("main", x.shape[1]),))
        )
        _, found = layer.cross_attention.attend(before, where, memory)
        same(torch.cat(found, dim=-1), a[f"cross_attn.{i}"], "attention")
        x, _ = layer(x, where, memory, (Segment("main", x.shape[1]),))
        same(x, a[f"out{i}"], f"layer {i}")
    torch.testing.assert_close(
        (x * a[f"G_out{depth - 1}"]).sum(), a["scalar"].view(()), rtol=1e-4, atol=1e-6
    )
