"""Align-DETR: candidates, ranks, target and loss; what the golden vectors do not say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detrellis.losses import focal_positive
from detrellis.matching import Candidates, Hungarian, Match, assign
from detrellis.pairs import pair_up, quality
from detrellis.recipes.build import build
from detrellis.schemes.align import Align, align_loss, rank_weight
from detrellis.schemes.config import AlignConfig
from detrellis.schemes.denoising import lay_out, positives
from detrellis.schemes.ranks import rank
from detrellis.set_loss import CLASSIFICATION, SetLoss
from detrellis.supervision import Supervision, supervise
from detrellis.types import Assignment, DecoderOutput, Targets

from ..small import CLASSES, images, small, targets
from ..test_matching import problem

ONE = torch.tensor(1.0)


def candidates(k: int, share: float | None = 0.5) -> Hungarian:
    return Hungarian(candidates=Candidates(k, k, k, share))


def rows(found: Assignment) -> set[tuple[int, ...]]:
    return set(zip(*(t.tolist() for t in found[:4]), strict=True))


# Matching


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple),
    k=st.integers(1, 5),
    queries=st.integers(1, 30),
    copies=st.integers(1, 2),
    degenerate=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=120, deadline=None)
def test_each_target_owns_exactly_its_k_distinct_queries(
    sizes: tuple[int, ...], k: int, queries: int, copies: int, degenerate: bool, seed: int
) -> None:
    output, truth = problem(2, sizes, copies * queries, seed)
    if degenerate:
        truth.boxes[:, 2:] = 0
    found = assign([Match(output, truth, candidates(k), copies)])[0]
    for layer in range(2):
        for image, size in enumerate(sizes):
            allowed = max(1, min(k, queries // (2 * size))) if size else 0
            for copy in range(copies):
                inside = (
                    (found.layer == layer)
                    & (found.image == image)
                    & (found.query // queries == copy)
                )
                owned = found.target[inside]
                assert len(set(found.query[inside].tolist())) == len(owned)
                counts = [(owned == truth.offsets[image] + t).sum().item() for t in range(size)]
                if size <= queries:
                    assert counts == [allowed] * size
                else:
                    assert sorted(counts, reverse=True) == [1] * queries + [0] * (size - queries)
    # A candidate set is of one target in one layer and copy.
    sets = {}
    for layer, query, target, own in zip(
        *(t.tolist() for t in (found.layer, *found[2:])), strict=True
    ):
        assert sets.setdefault(own, (layer, query // queries, target)) == (
            layer,
            query // queries,
            target,
        )
    assert len(set(sets.values())) == len(sets)


@given(st.integers(0, 50), st.permutations(range(4)), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_the_order_of_images_changes_only_indices(seed: int, order: list[int], k: int) -> None:
    """A crowded image does not lower the number of candidates in another."""
    output, truth = problem(1, (2, 9, 0, 3), 20, seed)
    labels, boxes = truth.labels.split(truth.sizes), truth.boxes.split(truth.sizes)
    turned = Targets(
        torch.cat([labels[i] for i in order]),
        torch.cat([boxes[i] for i in order]),
        tuple(truth.sizes[i] for i in order),
    )
    plain = assign([Match(output, truth, candidates(k))])[0]
    other = assign([Match(output.map(lambda t: t[:, order]), turned, candidates(k))])[0]
    expected = {(i, q, t - truth.offsets[i]) for _, i, q, t in rows(plain)}
    assert {(order[i], q, t - turned.offsets[i]) for _, i, q, t in rows(other)} == expected


@given(st.integers(0, 50), st.permutations(range(12)), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_the_order_of_queries_changes_neither_losses_nor_ranks(
    seed: int, order: list[int], k: int
) -> None:
    output, truth = problem(2, (2, 1), 12, seed)
    # Where IoUs are 0 the qualities tie, and the lower index leads
    overlapping = torch.tensor([0.1, 0.1, 0.5, 0.5])
    output = output._replace(boxes=overlapping * output.boxes + torch.tensor([0.4, 0.4, 0.2, 0.2]))
    truth = truth._replace(boxes=overlapping * truth.boxes + torch.tensor([0.4, 0.4, 0.2, 0.2]))
    supervision = Align(AlignConfig(k=k)).supervision(Supervision())
    turned = output.map(lambda t: t[:, :, order])
    losses, _ = supervise([supervision.task("main", output, truth, ONE)])
    others, _ = supervise([supervision.task("main", turned, truth, ONE)])
    for name, value in losses.items():
        torch.testing.assert_close(others[name], value, atol=1e-5, rtol=1e-5)

    def ranked(o: DecoderOutput, names: list[int]) -> set[tuple[int, ...]]:
        found = assign([Match(o, truth, supervision.assign)])[0]
        ranks = rank(quality(pair_up(o, truth, found), 0.25), found.candidate_set)
        queries = [names[q] for q in found.query]
        return set(
            zip(found.layer.tolist(), queries, found.target.tolist(), ranks.tolist(), strict=True)
        )

    assert ranked(output, list(range(12))) == ranked(turned, order)


def test_stages_have_their_own_numbers() -> None:
    output, truth = problem(3, (2,), 30)
    supervision = Align(AlignConfig(k=3, k_encoder=5)).supervision(Supervision())
    found = assign([Match(output, truth, supervision.assign)])[0]
    assert found.layer.bincount().tolist() == [6, 6, 2]
    proposals = supervision.proposals()
    assert len(assign([Match(output.map(lambda t: t[:1]), truth, proposals.assign)])[0].query) == 10
    last = found.layer == 2
    assert rank(torch.rand(len(last)), found.candidate_set)[last].tolist() == [0, 0]


# Ranks


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=20))
def test_rank_counts_better_or_earlier_rows_of_the_bag(given_rows: list[tuple[int, int]]) -> None:
    bag = torch.tensor([b for b, _ in given_rows], dtype=torch.int64)
    score = torch.tensor([float(s) for _, s in given_rows])
    expected = [
        sum(
            b == bag[i] and (s > score[i] or (s == score[i] and j < i))
            for j, (b, s) in enumerate(given_rows)
        )
        for i in range(len(given_rows))
    ]
    assert rank(score, bag).tolist() == expected


def test_rank_weights() -> None:
    weights = rank_weight(torch.arange(4.0), 1.5)
    assert [round(w, 4) for w in weights.tolist()] == [1, 0.5134, 0.2636, 0.1353]


# Target and loss


def perfect(k: int, alpha: float) -> tuple[DecoderOutput, Targets, Align]:
    """Every query sits exactly on the one target."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 6, CLASSES, generator=g, dtype=torch.float64)
    truth = targets((1,))._replace(boxes=targets((1,)).boxes.double())
    boxes = truth.boxes.expand(1, 1, 6, 4).clone()
    return (
        DecoderOutput(logits, boxes, boxes),
        truth,
        Align(AlignConfig(k=k, k_last=k, alpha=alpha, floor=0.0)),
    )


def test_of_perfect_boxes_it_is_the_focal_loss_without_alpha() -> None:
    output, truth, align = perfect(1, 0.0)
    supervision = align.supervision(Supervision())
    losses, _ = supervise([supervision.task("main", output, truth, ONE)])
    plain = SetLoss(positive=lambda x, t: focal_positive(x), negative_weight=1.0)
    expected, _ = supervise([replace(Supervision(), rule=plain).task("main", output, truth, ONE)])
    torch.testing.assert_close(losses["main/class/0"], expected["main/class/0"])


def test_the_target_has_no_gradient_and_classes_do_not_move_boxes() -> None:
    output, truth = problem(2, (3, 2), 20)
    leaves = [t.clone().requires_grad_() for t in output[:2]]
    output = DecoderOutput(leaves[0], leaves[1], leaves[1])
    align = Align(AlignConfig())
    supervision = align.supervision(Supervision())
    found = assign([Match(output, truth, supervision.assign)])[0]
    assert not align.soft_target(pair_up(output, truth, found)).target.requires_grad
    terms = supervision.rule(output, truth, found, ONE)
    (gradient,) = torch.autograd.grad(
        terms["class"].sum(), [leaves[1]], allow_unused=True, retain_graph=True
    )
    assert gradient is None or not gradient.any()
    # Eq. 3 with the target held fixed, at a matched entry.
    (gradient,) = torch.autograd.grad(terms["class"].sum(), [leaves[0]])
    where = (found.layer[0], found.image[0], found.query[0], truth.labels[found.target[0]])
    x = leaves[0][where].detach().clone().requires_grad_()
    align_loss(x, align.soft_target(pair_up(output, truth, found)).target[0]).backward()
    torch.testing.assert_close(gradient[where], x.grad)


@pytest.mark.parametrize("loss", ["align", "ia_bce", "focal", "qfl", "vfl", "psl", "mal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finite_at_any_logit(loss: str, dtype: torch.dtype) -> None:
    output, truth = problem(1, (3,), 8)
    logits = torch.tensor([120.0, -120, 0, 88, -88, 17, -1e4, 1e4], dtype=dtype)[
        None, None, :, None
    ]
    logits = logits.repeat(1, 1, 1, 6).requires_grad_()
    base = Supervision() if loss in ("align", "ia_bce") else Supervision(rule=CLASSIFICATION[loss])
    if loss in ("align", "ia_bce"):
        base = Align(AlignConfig(k_last=2, classification=loss)).supervision(base)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = supervise([base.task("main", output._replace(logits=logits), truth, ONE)])
    assert all(v.isfinite() and v.dtype == torch.float32 for v in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@given(st.floats(0, 1), st.floats(-20, 20))
def test_the_loss_is_focal_at_both_ends(target: float, logit: float) -> None:
    x = torch.tensor(logit, dtype=torch.float64)
    p = x.sigmoid()
    expected = -target * (1 - p) ** 2 * p.log() - (1 - target) * p**2 * (1 - p).log()
    torch.testing.assert_close(
        align_loss(x, torch.tensor(target, dtype=torch.float64)), expected, atol=1e-7, rtol=1e-6
    )


def test_boxes_are_weighed_by_rank_and_divided_by_uncopied_targets() -> None:
    output, truth = problem(1, (2,), 20)
    for ranked in (True, False):
        align = Align(AlignConfig(k_last=3, rank_boxes=ranked))
        supervision = align.supervision(Supervision())
        found = assign([Match(output, truth, supervision.assign)])[0]
        pairs = pair_up(output, truth, found)
        weight = (
            rank_weight(rank(quality(pairs, 0.25), found.candidate_set).float(), 1.5)
            if ranked
            else torch.ones(6)
        )
        losses, _ = supervise([supervision.task("main", output, truth, torch.tensor(2.0))])
        expected = (weight * (pairs.boxes - pairs.target_boxes).abs().sum(-1)).sum() / 2
        torch.testing.assert_close(losses["main/box/0"] / 5, expected)


def test_known_pairs_have_rank_0_though_a_target_has_many() -> None:
    truth = targets((2, 1))
    layout = lay_out(truth, groups=3, kinds=2)
    found = positives(layout, layers=2)
    assert rank(torch.rand(len(found.candidate_set)), found.candidate_set).tolist() == [0] * 18
    assert len(found.candidate_set) == 18


@pytest.mark.parametrize("classification", ["align", "ia_bce", "base"])
def test_what_the_base_says_is_kept_only_on_request(classification: str) -> None:
    base = Supervision(rule=CLASSIFICATION["qfl"])
    rule = Align(AlignConfig(classification=classification)).supervision(base).rule  # type: ignore[arg-type]
    assert isinstance(rule, SetLoss)
    assert (rule.positive is CLASSIFICATION["qfl"].positive) == (classification == "base")
    output, truth = problem(1, (3,), 20)
    found = assign([Match(output, truth, candidates(2))])[0]
    learned = rule.target(pair_up(output, truth, found))
    if classification == "base":
        assert torch.equal(learned.target, pair_up(output, truth, found).iou)
    assert learned.box_weight is not None
    assert learned.box_weight.lt(1).sum() == 3


def total(model: torch.nn.Module, truth: Targets) -> Tensor:
    model.reseed(0)  # type: ignore[operator]
    return torch.stack(list(model(images(), truth).losses.values())).sum()


def test_a_step_learns() -> None:
    """Align on a whole small DINO with denoising: a few steps on one batch lower the loss."""
    model = build(small("align_dino_r50"), CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    truth, before = targets((2, 3)), None
    for _ in range(15):
        optimizer.zero_grad()
        loss = total(model, truth)
        before = loss.item() if before is None else before
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * before
