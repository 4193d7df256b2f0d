"""Co-DETR: customised positive queries, their losses, denoising, and the matching cost."""

from __future__ import annotations

import torch
from torch import Tensor

from detrellis.boxes import xyxy_to_cxcywh
from detrellis.matching import Hungarian, Match, MatchingCost, assign
from detrellis.schemes.cdn import ContrastiveDenoising, Noise
from detrellis.schemes.collaborative.assigners import BACKGROUND
from detrellis.schemes.collaborative.queries import Chosen, PositiveQueries, choose
from detrellis.schemes.collaborative.scene import BranchAssignment, Ints
from detrellis.schemes.config import CDNConfig
from detrellis.schemes.denoising import lay_out, positives
from detrellis.set_loss import CLASSIFICATION, SetLoss
from detrellis.supervision import leaving_out
from detrellis.types import Assignment, DecoderOutput, Targets

from .arrays import Arrays, close


def first(indices: Ints, k: int) -> Ints:
    """The files' random choice: the first in index order."""
    return indices[:k]


def cases(a: Arrays, ending: str) -> list[str]:
    return [k.removesuffix(ending) for k in a.data if k.endswith(ending)]


def normalised(boxes: Tensor, size: Tensor) -> Tensor:
    return xyxy_to_cxcywh(boxes.view(-1, 4)) / size.flip(-1).repeat(2)


def check_positive_queries(a: Arrays) -> None:
    features = torch.cat(
        [a[f"feat_lvl{i}"].flatten(2) for i in range(a.count(r"feat_lvl\d+"))], 2
    ).transpose(1, 2)
    background = a.number("num_classes")
    for case in cases(a, "__labels"):
        labels, regions = a[f"{case}__labels"].long(), f"{case}__roi_feats" in a
        found, targets, classes = [], [], []
        for i, own in enumerate(labels):
            positive = own < background
            if regions:
                boxes, targeted, reads = (
                    a[f"{case}__{k}"][i] for k in ("coords", "targets_in", "roi_feats")
                )
                targeted = targeted[positive]
            else:
                boxes = a[f"{case}__coords{i}"] if f"{case}__coords0" in a else a["anchors"]
                targeted, reads = a[f"{case}__pos_targets_img{i}"].view(-1, 4), features[i]
            # Each positive as a target of its own: the file does not say which share one.
            owner = torch.where(positive, positive.cumsum(0) - 1, BACKGROUND)
            found.append((boxes, owner, reads, boxes))
            targets.append(targeted)
            classes.append(own[positive])
        limit = f"{case}__max_pos_coords"
        most = a.number(limit) if limit in a else 300  # the paper's
        fill = case != "onestage_zeropad"
        offsets, sizes = (0, len(targets[0])), a["image_hw_valid"].double()
        assigned = BranchAssignment(*(torch.stack(parts) for parts in zip(*found, strict=True)))
        chosen = choose(assigned, sizes, offsets, first, max_queries=most, fill=fill)
        check_chosen(a, case, chosen, targets, torch.cat(classes))


def check_chosen(
    a: Arrays, case: str, chosen: Chosen, targets: list[Tensor], classes: Tensor
) -> None:
    sizes, background = a["image_hw_valid"].double(), a.number("num_classes")
    used = (
        torch.ones(chosen.boxes.shape[:2], dtype=torch.bool)
        if chosen.unused is None
        else ~chosen.unused
    )
    assert torch.equal(used.double(), a[f"{case}__out_label_weights"])
    close(chosen.boxes[used], a[f"{case}__out_coords"][used], 1e-5, f"{case} boxes")
    close(chosen.features[used], a[f"{case}__out_feats"][used], 1e-5, f"{case} features")
    where = (chosen.image, chosen.slot)
    labels = torch.full(used.shape, background).index_put(where, classes[chosen.target])
    assert torch.equal(labels, a[f"{case}__out_labels_out"])
    weights = torch.zeros(used.shape, dtype=torch.float64).index_put(
        where, torch.tensor(1.0, dtype=torch.float64)
    )
    assert torch.equal(weights.unsqueeze(-1).expand(-1, -1, 4), a[f"{case}__out_bbox_weights"])
    wanted = torch.cat([normalised(t, s) for t, s in zip(targets, sizes, strict=True)])[
        chosen.target
    ]
    close(wanted, a[f"{case}__out_targets"][where], 1e-5, f"{case} targets")
    if f"{case}__out_attn_mask" in a:
        # The reference blocks an unused query's own row too; ours reads itself, which changes no
        # other query.
        assert chosen.unused is not None
        blocked = a[f"{case}__out_attn_mask"]
        for image, unused in enumerate(chosen.unused):
            assert torch.equal(blocked[image][~unused], unused.expand(int((~unused).sum()), -1))


def check_query_embed(a: Arrays) -> None:
    for case in cases(a, "__in_coords"):
        boxes, features = a[f"{case}__in_coords"], a[f"{case}__in_feats"]
        positioned = f"{case}__W_feat" in a
        embed = PositiveQueries(
            features.shape[-1], positioned=positioned, features=positioned
        ).double()
        embed.place[0].load_state_dict({"weight": a[f"{case}__W_pos"], "bias": a[f"{case}__b_pos"]})
        mark = None
        if embed.feature is not None:
            embed.feature[0].load_state_dict(
                {"weight": a[f"{case}__W_feat"], "bias": a[f"{case}__b_feat"]}
            )
            mark = a[f"{case}__head_embed_scalar"]
        nothing = torch.zeros(0, dtype=torch.int64)
        queries = embed(
            Chosen(boxes, features, nothing, nothing, nothing, None, (0,) * len(boxes)), mark, 4
        )
        close(queries.content, a[f"{case}__query"], 1e-5, f"{case} contents")
        assert queries.boxes is not None
        close(queries.boxes, a[f"{case}__reference_points"], 1e-6, f"{case} references")
        if positioned:
            close(queries.position, a[f"{case}__query_pos"], 1e-5, f"{case} positions")


def check_auxiliary_loss(a: Arrays) -> None:
    kinds = {
        "codino": (SetLoss(iou_eps=1e-6, **_qfl()), 1.0),
        "codeform": (SetLoss(iou_eps=1e-6), 2.0),
    }
    for case in cases(a, "__cls"):
        labels = a[f"{case}__labels"]
        image, slot = (labels < a.number("num_classes")).nonzero(as_tuple=True)
        row = torch.arange(len(image))
        known = Assignment(torch.zeros_like(row), image, slot, row, row)
        counts = tuple(torch.bincount(image, minlength=len(labels)).tolist())
        targets = Targets(labels[image, slot], a[f"{case}__targets"][image, slot], counts)
        output = DecoderOutput(*(a[f"{case}__{k}"][None] for k in ("cls", "pred", "pred")))
        weights = a[f"{case}__label_weights"]
        for kind, (rule, classes) in kinds.items():
            count = torch.tensor(float(max(len(row), 1)), dtype=torch.float64)
            terms = leaving_out(rule, weights == 0)(output, targets, known, count)
            for ours, theirs, weight in (
                ("class", "cls", classes),
                ("box", "bbox", 5),
                ("giou", "giou", 2),
            ):
                expected = a[f"{case}__{kind}__loss_{theirs}"]
                torch.testing.assert_close(
                    weight * terms[ours].squeeze(0), expected, rtol=1e-4, atol=1e-5
                )


def _qfl() -> dict[str, object]:
    rule = CLASSIFICATION["qfl"]
    return {
        "target": rule.target,
        "positive": rule.positive,
        "negative_weight": rule.negative_weight,
    }


def check_denoising(a: Arrays) -> None:
    sizes = a["image_hw_valid"].double()
    for case in cases(a, "__gt0"):
        boxes = [normalised(a[f"{case}__gt{i}"], size) for i, size in enumerate(sizes)]
        labels = [a[f"{case}__lab{i}"].long().view(-1) for i in range(len(sizes))]
        targets = Targets(torch.cat(labels), torch.cat(boxes), tuple(len(x) for x in labels))
        number, table = a.number(f"{case}__num_dn_queries"), a[f"{case}__label_embedding"]
        scale = float(a[f"{case}__box_noise_scale"])
        config = CDNConfig(number=number, box_noise=scale)
        scheme = ContrastiveDenoising(config, table.shape[1], len(table), 1e-3).double()
        scheme.label_embed.load_state_dict({"weight": torch.cat([table, table[:1]])})
        # Small numbers are a number of groups in DINO's code, and here always of queries.
        layout = lay_out(targets, max(1, number // max(targets.sizes)), 2)
        assert (layout.slots, layout.groups) == (
            a.number(f"{case}__pad_size"),
            a.number(f"{case}__num_groups"),
        )
        flip = a[f"{case}__draw_p"]
        label = torch.zeros(len(flip), dtype=torch.int64)
        label[flip < 0.25] = a[f"{case}__draw_newlabel"].long()
        noise = Noise(flip, label, 2 * a[f"{case}__draw_sign01"] - 1, a[f"{case}__draw_part"])
        queries = scheme.queries(targets, layout, noise)
        close(queries.content, a[f"{case}__out_label_query"], 1e-6, f"{case} contents")
        assert queries.boxes is not None
        close(torch.logit(queries.boxes), a[f"{case}__out_bbox_query_unact"], 5e-4, f"{case} boxes")
        known = positives(layout, 1)
        output = DecoderOutput(*(a[f"{case}__{k}"][None] for k in ("dn_cls", "dn_pred", "dn_pred")))
        count = torch.tensor(float(len(known.layer)), dtype=torch.float64)
        assert count == a.number(f"{case}__dn_num_pos")
        terms = SetLoss(iou_eps=1e-6, **_qfl())(output, targets, known, count)  # type: ignore[arg-type]
        for ours, theirs, weight in (("class", "cls", 1), ("box", "bbox", 5), ("giou", "giou", 2)):
            expected = a[f"{case}__loss_{theirs}"]
            torch.testing.assert_close(
                weight * terms[ours].squeeze(0), expected, rtol=1e-4, atol=1e-5
            )


def check_hungarian(a: Arrays) -> None:
    size = a["image_hw"].double()
    for case in cases(a, "__gt_labels"):
        labels = a[f"{case}__gt_labels"].long().view(-1)
        boxes = normalised(a[f"{case}__gt_bboxes"], size)
        logits, predicted = a[f"{case}__logits"], a[f"{case}__pred_cxcywh_norm"]
        output = DecoderOutput(logits[None, None], predicted[None, None], predicted[None, None])
        (found,) = assign([Match(output, Targets(labels, boxes, (len(labels),)), Hungarian())])
        expected = a[f"{case}__gt_inds"].long()
        if not len(labels):
            assert not len(found.query)
            assert not expected.any()
            continue
        parts = {"cls": (2.0, 0.0, 0.0), "l1": (0.0, 5.0, 0.0), "giou": (0.0, 0.0, 2.0)}
        costs = {k: MatchingCost(*w)(logits, predicted, labels, boxes) for k, w in parts.items()}
        for name, cost in costs.items():
            torch.testing.assert_close(cost, a[f"{case}__cost_{name}"], rtol=1e-4, atol=1e-5)
        total = sum(costs.values())
        assert isinstance(total, Tensor)
        theirs = expected.nonzero().flatten()
        assert len(theirs) == len(found.query)
        best = total[theirs, expected[theirs] - 1].sum()
        torch.testing.assert_close(
            total[found.query, found.target].sum(), best, rtol=1e-5, atol=1e-5
        )
