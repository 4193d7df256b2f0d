"""Checks of LW-DETR and RF-DETR: the network, and its training as Group DETR with IA-BCE."""

from __future__ import annotations

import torch
from torch import Tensor

from detrellis.interop.huggingface import recipe_of
from detrellis.interop.links import Link, link_up, missing, to_ours, to_theirs
from detrellis.interop.lwdetr_names import completed, table
from detrellis.nn.proposals import ProposalHead, select
from detrellis.recipes.build import build
from detrellis.schemes.group import Group
from detrellis.supervision import match, supervise
from detrellis.training import TrainableDetector
from detrellis.types import Assignment, ImageBatch

from .arrays import Arrays, close
from .models import own_gradients

HEADS = {"projection": "enc_output", "norm": "enc_output_norm"}
HEADS |= {"classify": "enc_out_class_embed", "move": "enc_out_bbox_embed"}
TERMS = {"class": "ce", "box": "bbox", "giou": "giou"}


def check_model(a: Arrays) -> None:
    """Maps, one group's output as at inference,
    and with all groups outputs, matches, losses and gradients.
    """
    model, links = load(a)
    images = ImageBatch(a["pixel_values"], ~a["pixel_mask"].bool())
    detector, targets = model.detector, a.targets()
    # RF-DETR resizes its positions in single precision.
    exact = 1e-6 if "rfdetr" in str(a.json("config_json")["model_type"]).replace("_", "") else 1e-9
    for i, found in enumerate(detector.backbone(images.pixels)):
        close(found, a[f"vit{i}"], exact, f"map {i} of the ViT")
    memory = detector.encode(images)
    levels = memory.tokens.split([h * w for h, w in memory.shapes], dim=1)
    for i, (level, (h, w)) in enumerate(zip(levels, memory.shapes, strict=True)):
        close(
            level.transpose(1, 2).unflatten(2, (h, w)),
            a[f"memory{i}"],
            exact,
            f"level {i} of the memory",
        )
    check_inference(a, model, images)
    check_training(a, model, images, links)
    assert len(targets.sizes) == len(images.pixels)


def load(a: Arrays) -> tuple[TrainableDetector, list[Link]]:
    """The model with all groups, in evaluation mode, and the links of the detector's names."""
    recipe = recipe_of(a.json("config_json")).override(["detector.backbone.pretrained=false"])
    model = build(recipe, a["logits"].shape[-1]).double().eval()
    detector, count = model.detector, recipe.detector.queries.count
    links = link_up(detector.state_dict(), table(recipe.detector), recipe.detector.decoder.layers)
    assert not missing(detector.state_dict(), links)
    weights = a.group("p/")
    shapes = {name: value.shape for name, value in detector.state_dict().items()}
    detector.load_state_dict(to_ours(completed(weights, count), links, shapes))
    (group,) = model.training_schemes
    assert isinstance(group, Group)
    tables = {"content": "model.query_feat.weight", "deltas": "model.reference_point_embed.weight"}
    group.table.load_state_dict({ours: weights[theirs][count:] for ours, theirs in tables.items()})
    for k, head in enumerate(group.heads, start=1):
        head.load_state_dict({name: weights[further(name, k)] for name in head.state_dict()})
    return model, links


def further(name: str, k: int) -> str:
    """Their name of a parameter of group k's proposal head."""
    part, rest = name.split(".", 1)
    return f"model.{HEADS[part]}.{k}.{rest}"


def check_inference(a: Arrays, model: TrainableDetector, images: ImageBatch) -> None:
    detector = model.detector
    queries, proposals = detector.propose(detector.encode(images))
    assert proposals is not None
    assert queries.boxes is not None
    close(queries.boxes, a["init_boxes"], 1e-6, "first boxes")
    close(select(proposals.logits, proposals.best), a["enc_logits"], 1e-6, "proposals' logits")
    close(proposals.boxes, a["enc_boxes"], 1e-6, "proposals' boxes")
    output = detector(images)
    close(output.states[-1], a["last_hidden_state"], 1e-6, "states")
    close(output.logits[-1], a["logits"], 1e-6, "logits")
    close(output.boxes[-1], a["pred_boxes"], 1e-6, "boxes")


def check_training(
    a: Arrays, model: TrainableDetector, images: ImageBatch, links: list[Link]
) -> None:
    step = model.begin(images, a.targets())
    (group,) = model.training_schemes
    (block,) = group.extend(step).blocks
    main = model.main(step)
    outputs = model.detector.decode(step.memory, {b.segment: b.queries for b in (main, block)})
    every = [outputs["main"], outputs["group"]]
    boxes = [b.queries.boxes for b in (main, block)]
    close(
        torch.cat([b for b in boxes if b is not None], 1),
        a["train_init_boxes"],
        1e-6,
        "first boxes of all groups",
    )
    close(torch.cat([o.logits for o in every], 2), a["all_logits"], 1e-6, "logits of all groups")
    close(torch.cat([o.boxes for o in every], 2), a["all_boxes"], 1e-6, "boxes of all groups")
    proposed = [b.proposals for b in (main, block) if b.proposals is not None]
    close(
        torch.cat([o.logits[0] for o in proposed], 1),
        a["train_enc_logits"],
        1e-6,
        "proposals' logits of all groups",
    )
    close(
        torch.cat([o.boxes[0] for o in proposed], 1),
        a["train_enc_boxes"],
        1e-6,
        "proposals' boxes of all groups",
    )

    tasks = [task for b in (main, block) for task in model._tasks(b, outputs[b.name], step)]
    tasks = sorted(tasks, key=lambda task: "proposals" in task.name)
    found = match(tasks)
    check_matches(a, found, model.detector.queries.count)
    losses, _ = supervise(tasks, found)
    check_losses(a, losses, model)
    total = torch.stack(list(losses.values())).sum()
    torch.testing.assert_close(total, a["loss_total"], rtol=1e-6, atol=0)
    total.backward()
    check_gradients(a, model, links)


def check_matches(a: Arrays, found: list[Assignment], count: int) -> None:
    layers = a["all_logits"].shape[0]
    names = [*(f"layer{i}" for i in range(layers - 1)), "last"]
    offsets = a.targets().offsets
    for first, rows in ((0, names), (2, ["encoder"])):
        for layer, name in enumerate(rows):
            for image, offset in enumerate(offsets):
                pairs = []
                for shift, part in ((0, found[first]), (count, found[first + 1])):
                    own = (part.layer == layer) & (part.image == image)
                    pairs.append(torch.stack([part.query[own] + shift, part.target[own] - offset]))
                ours, theirs = torch.cat(pairs, 1), a[f"match/{name}_b{image}"]
                order = theirs[0].argsort()
                assert torch.equal(ours[:, ours[0].argsort()], theirs[:, order]), (
                    f"matches of {name}"
                )


def check_losses(a: Arrays, losses: dict[str, Tensor], model: TrainableDetector) -> None:
    weights, layers = model.supervision.weights, a["all_logits"].shape[0]
    for term, theirs in TERMS.items():
        for layer in range(layers):
            both = losses[f"main/{term}/{layer}"] + losses[f"group/{term}/{layer}"]
            suffix = "" if layer == layers - 1 else f"_{layer}"
            expected = a[f"loss/loss_{theirs}{suffix}"]
            torch.testing.assert_close(
                both / weights[term], expected, rtol=1e-6, atol=0, msg=f"{term} of {layer}"
            )
        both = losses[f"proposals/{term}/0"] + losses[f"group_proposals/{term}/0"]
        torch.testing.assert_close(
            both / weights[term], a[f"loss/loss_{theirs}_enc"], rtol=1e-6, atol=0, msg=term
        )


def check_gradients(a: Arrays, model: TrainableDetector, links: list[Link]) -> None:
    """Of every parameter of all groups, but the keys' biases that theirs do without."""
    (group,) = model.training_schemes
    assert isinstance(group, Group)
    trained = {name for name, _ in model.detector.named_parameters()}
    links = [link for link in links if trained.issuperset(link.ours)]
    found = to_theirs(own_gradients(model.detector), links)
    for ours, theirs in (("content", "query_feat"), ("deltas", "reference_point_embed")):
        gradient = group.table[ours].grad
        assert gradient is not None
        found[f"model.{theirs}.weight"] = torch.cat([found[f"model.{theirs}.weight"], gradient])
    for k, head in enumerate(group.heads, start=1):
        assert isinstance(head, ProposalHead)
        found |= {further(name, k): value for name, value in own_gradients(head).items()}
    norms = {
        str(n): norm for n, norm in zip(a.data["grad_norm_names"], a["grad_norms"], strict=True)
    }
    for name, norm in norms.items():
        if norm < 0:  # no gradient: a token that nothing reads, a block behind the last map
            assert name not in found, name
        else:
            close(
                found[name].norm(), norm, 1e-4 * max(1.0, norm.item()), f"gradient norm of {name}"
            )
    for name, expected in a.group("grad/").items():
        close(
            found[name],
            expected,
            1e-4 * max(1.0, expected.abs().max().item()),
            f"gradient of {name}",
        )
