"""Group DETR: isolation, the mean over groups,
proposals of each group, checkpoints of one and of many groups.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from detrellis.errors import Advice, UserError
from detrellis.nn.proposals import ProposalHead, select
from detrellis.recipes.build import build
from detrellis.schemes.base import QueryBlock, Step
from detrellis.schemes.distances import matched_distance, matched_positions, position_distance
from detrellis.schemes.group import Group, sibling
from detrellis.supervision import match, supervise
from detrellis.training import TrainableDetector
from detrellis.types import Assignment, DecoderOutput, Queries, Segment, Targets

from ..small import CLASSES, NETWORKS, images, small, targets
from .test_hybrid import step_of

TWO_STAGE = ("tiny", "deformable_detr_r50_two_stage", "deformable_detr_r50_two_stage_plus")


def grouped(
    name: str, *overrides: str, k: int = 3, truth: Targets | None = None
) -> tuple[TrainableDetector, Step, QueryBlock]:
    model = (
        build(small(name, ["none", f"group={k}"]).override(list(overrides)), CLASSES)
        .double()
        .eval()
    )
    batch = images()
    truth = targets((2, 3)) if truth is None else truth
    truth = truth._replace(boxes=truth.boxes.double())
    step = model.begin(batch._replace(pixels=batch.pixels.double()), truth)
    (block,) = model.training_schemes[0].extend(step).blocks
    return model, step, block


def decode(
    model: TrainableDetector, step: Step, parts: list[QueryBlock]
) -> dict[str, DecoderOutput]:
    return model.detector.decode(step.memory, {b.segment: b.queries for b in parts})


@pytest.mark.parametrize("name", NETWORKS)
def test_a_group_in_company_is_the_group_alone_in_values_and_gradients(name: str) -> None:
    """Also of the last group, whose loss alone must give its parameters the same gradient."""
    model, step, block = grouped(name)
    count = step.queries.content.shape[1]
    main = QueryBlock("main", step.queries, step.supervision)
    together = decode(model, step, [main, block])
    for k in range(3):
        own = (
            together["main"]
            if k == 0
            else together["group"].map(lambda t, k=k: t[:, :, (k - 1) * count : k * count])
        )
        source = step.queries if k == 0 else block.queries
        first = 0 if k == 0 else (k - 1) * count
        part = Queries(*(None if t is None else t[:, first : first + count] for t in source))
        alone = model.detector.decode(step.memory, {Segment("alone", count): part})["alone"]
        torch.testing.assert_close(own.logits, alone.logits, atol=1e-10, rtol=0)
        torch.testing.assert_close(own.boxes, alone.boxes, atol=1e-10, rtol=0)
        weight = torch.randn_like(alone.boxes)
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = [
            torch.autograd.grad(
                (o.boxes * weight).sum() + o.logits.sum(),
                parameters,
                allow_unused=True,
                retain_graph=True,
            )
            for o in (own, alone)
        ]
        for one, other in zip(*gradients, strict=True):
            one, other = (torch.zeros(()) if g is None else g for g in (one, other))
            torch.testing.assert_close(one + 0 * other, other + 0 * one, atol=1e-9, rtol=1e-9)


# A golden vector's
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "mask2former_r50"])
@pytest.mark.parametrize("sizes", [(2, 3), (0, 4), (15, 1)])
def test_the_loss_is_the_mean_over_groups(name: str, sizes: tuple[int, ...]) -> None:
    model, step, block = grouped(name, truth=targets(sizes))
    count = step.queries.content.shape[1]
    main = QueryBlock("main", step.queries, step.supervision)
    outputs = decode(model, step, [main, block])
    parts = [
        outputs["main"],
        *(
            outputs["group"].map(lambda t, k=k: t[:, :, k * count : (k + 1) * count])
            for k in (0, 1)
        ),
    ]
    alone = [
        supervise([step.supervision.task("g", p, step.targets, step.mean_boxes)])[0] for p in parts
    ]
    weight = model.training_schemes[0].main_weight
    assert weight == pytest.approx(1 / 3)
    assert block.normaliser is not None
    both, _ = supervise(
        [
            step.supervision.task(
                "main", outputs["main"], step.targets, step.mean_boxes, weight=weight
            ),
            block.supervision.task(
                "group",
                outputs["group"],
                step.targets,
                block.normaliser,
                copies=block.copies,
                weight=block.weight,
            ),
        ]
    )
    for key in alone[0]:
        _, term, layer = key.split("/")
        mean = sum(a[key] for a in alone) / 3  # type: ignore[arg-type]
        torch.testing.assert_close(
            both[f"main/{term}/{layer}"] + both[f"group/{term}/{layer}"], mean
        )


def test_a_sum_instead() -> None:
    model, _, block = grouped("deformable_detr_r50", "schemes.group.reduction=sum")
    assert model.training_schemes[0].main_weight == 1
    assert block.weight == 2


def test_main_and_its_proposals_weigh_what_a_group_weighs() -> None:
    model = build(small("tiny", ["none", "group=3"]), CLASSES).eval()
    plain = build(small("tiny", ["none"]), CLASSES).eval()
    losses, expected = (m(images(), targets((2, 3))).losses for m in (model, plain))
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value / 3)
    assert {k.split("/")[0] for k in losses} == {
        "main",
        "group",
        "proposals",
        "group_proposals",
        "schemes",
    }


@pytest.mark.parametrize("name", TWO_STAGE)
def test_each_group_has_its_own_proposals(name: str) -> None:
    model, step, block = grouped(name)
    scheme = model.training_schemes[0]
    assert isinstance(scheme, Group)
    assert block.proposals is not None
    size = block.proposals.boxes.shape[2] // 2  # every token, or the selected
    for k, head in enumerate(scheme.heads):
        own = head(step.memory)
        assert torch.equal(block.queries.boxes[:, k * 12 : (k + 1) * 12], own.boxes)  # type: ignore[index]
        trained = block.proposals.map(lambda t, k=k: t[:, :, k * size : (k + 1) * size])
        for one, other in zip(trained[:2], head.training_output(own)[:2], strict=True):  # type: ignore[operator]
            assert torch.equal(one, other)


def test_heads_start_with_equal_classes_and_boxes_and_projections_of_their_own() -> None:
    model, _, _ = grouped("tiny")
    head, scheme = model.detector.queries.head, model.training_schemes[0]
    assert head is not None
    assert isinstance(scheme, Group)
    for other in scheme.heads:
        for name, value in head.state_dict().items():
            equal = torch.equal(value, other.state_dict()[name])
            assert equal == (name != "projection.weight"), name
    assert not torch.equal(scheme.heads[0].projection.weight, scheme.heads[1].projection.weight)  # type: ignore[arg-type]
    assert sibling(head).classify.weight.data_ptr() != head.classify.weight.data_ptr()


@pytest.mark.parametrize("kind", ["shared", "split"])
def test_proposals_without_heads(kind: str) -> None:
    model, step, block = grouped("tiny", f"schemes.group.proposals={kind}")
    assert not [n for n, _ in model.schemes.named_parameters() if "heads" in n]
    assert block.proposals is None
    assert step.proposals is not None
    assert step.queries.boxes is not None
    assert block.queries.boxes is not None
    if kind == "shared":
        assert torch.equal(block.queries.boxes, step.queries.boxes.repeat(1, 2, 1))
        return
    ranks = step.proposals.scores.argsort(descending=True)[:, 12:36]
    assert model.detector.queries.head is not None
    boxes = select(model.detector.queries.head.boxes(step.proposals), ranks)
    assert torch.equal(block.queries.boxes[:, :12], boxes[:, 0::2])
    assert torch.equal(block.queries.boxes[:, 12:], boxes[:, 1::2])


@pytest.mark.parametrize("kind", ["heads", "shared", "split"])
def test_contents_are_the_states_of_each_groups_own_proposals(kind: str) -> None:
    states = ("detector.queries.content_from=states", f"schemes.group.proposals={kind}")
    model, step, block = grouped("tiny", *states)
    assert step.proposals is not None
    assert torch.equal(step.queries.content, select(step.proposals.states, step.proposals.best))
    assert not step.queries.content.requires_grad
    first, second = block.queries.content.chunk(2, dim=1)
    if kind == "shared":
        expected = [step.queries.content] * 2
    elif kind == "split":
        ranks = step.proposals.scores.argsort(descending=True)[:, 12:36]
        expected = [select(step.proposals.states, ranks[:, i::2]) for i in range(2)]
    else:
        (scheme,) = model.training_schemes
        heads = [
            head
            for head in scheme.get_submodule("heads").children()
            if isinstance(head, ProposalHead)
        ]
        expected = [select(p.states, p.best) for p in (head(step.memory) for head in heads)]
    torch.testing.assert_close(first, expected[0])
    torch.testing.assert_close(second, expected[1])


@pytest.mark.parametrize("kind", ["heads", "shared", "split"])
def test_few_tokens(kind: str) -> None:
    settings = [
        f"schemes.group.proposals={kind}",
        "detector.queries.count=100",
        "detector.queries.content_from=learned",
    ]
    model = build(small("tiny", ["group=3"]).override(settings), CLASSES)
    losses = model(images(((64, 96), (32, 32))), targets((2, 1))).losses
    assert all(v.isfinite() for v in losses.values())
    # 128 tokens suffice for 100; 40 do not, and each group keeps its first contents.
    model = build(small("tiny", ["none", "group=3"]).override(settings), CLASSES)
    torch.stack(list(model(images(((32, 48),)), targets((2,))).losses.values())).sum().backward()
    learned = model.training_schemes[0].get_parameter("table.content").grad
    assert learned is not None
    tokens = int((learned[:100].abs().sum(1) > 0).sum())
    assert 0 < tokens < 100
    for part in learned.view(2, 100, -1):
        assert ((part.abs().sum(1) > 0) == (torch.arange(100) < tokens)).all()


@pytest.mark.parametrize("sees", ["main", "all"])
def test_denoising_beside_the_first_group_is_the_base(sees: str) -> None:
    """[denoising | first group] gives what it gives without groups; with `sees=all` it does not."""
    outputs = []
    for schemes in (["none", "cdn"], ["none", "cdn", "group=3"]):
        model = build(small("tiny", schemes).override(f"schemes.cdn.sees={sees}"), CLASSES).eval()
        step = step_of(model, targets((2, 3)))
        model.reseed(0)
        blocks = [QueryBlock("main", step.queries, step.supervision)]
        blocks += [b for s in model.training_schemes for b in s.extend(step).blocks]
        outputs.append(model.detector.decode(step.memory, {b.segment: b.queries for b in blocks}))
    torch.testing.assert_close(
        outputs[0]["main"].logits, outputs[1]["main"].logits, atol=1e-5, rtol=0
    )
    apart = (outputs[0]["cdn"].logits - outputs[1]["cdn"].logits).abs().max()
    assert (apart < 1e-5) == (sees == "main")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_denoising_keeps_its_own_loss(reduction: str) -> None:
    both = []
    for schemes in (["none", "cdn"], ["none", "cdn", "group=3"]):
        recipe = small("tiny", schemes)
        if recipe.schemes.group is not None:
            recipe = recipe.override(f"schemes.group.reduction={reduction}")
        model = build(recipe, CLASSES).eval()
        model.reseed(0)
        both.append(model(images(), targets((2, 3))).losses)
    for key in (k for k in both[0] if k.startswith("cdn/")):
        torch.testing.assert_close(both[0][key], both[1][key], atol=1e-4, rtol=1e-4)


def test_ranks_are_those_of_a_group() -> None:
    """Align on groups: every group's candidates for a target are ranked for themselves."""
    model, step, block = grouped("deformable_detr_r50")
    aligned = build(small("deformable_detr_r50", ["align=2"]), CLASSES).supervision
    outputs = decode(model, step, [QueryBlock("main", step.queries, step.supervision), block])
    (found,) = match(
        [
            aligned.task(
                "group", outputs["group"], step.targets, step.mean_boxes, copies=block.copies
            )
        ]
    )
    first = found.layer == 0
    # 5 targets in 2 groups
    assert found.candidate_set[first].unique(return_counts=True)[1].tolist() == [2] * 10
    assert (found.candidate_set[first].unique().numel()) == 10


def test_weights_of_one_group_start_many() -> None:
    """1 -> K: the detector is filled, the further proposal heads begin as its own."""
    model, _, _ = grouped("tiny")
    scheme = model.training_schemes[0]
    with torch.no_grad():
        for p in model.detector.parameters():
            p += 1
    scheme.start_from(model.detector)
    assert isinstance(scheme, Group)
    assert model.detector.queries.head is not None
    own = model.detector.queries.head.state_dict()
    assert all(
        torch.equal(v, own[k]) for head in scheme.heads for k, v in head.state_dict().items()
    )
    assert len({p.data_ptr() for h in scheme.heads for p in h.parameters()}) == 2 * len(own)


def test_contents_begin_fresh_or_as_the_first_groups() -> None:
    for contents in ("fresh", "copied"):
        model, _, _ = grouped("dino_r50", f"schemes.group.contents={contents}")
        own = model.detector.get_parameter("queries.content")
        table = model.schemes.get_parameter("0.table.content")
        assert all(torch.equal(part, own) == (contents == "copied") for part in table.chunk(2))
        with torch.no_grad():
            own += 1
        model.training_schemes[0].start_from(model.detector)
        assert all(torch.equal(part, own) == (contents == "copied") for part in table.chunk(2))
        assert own.data_ptr() != table.data_ptr()


def test_the_default_number_of_groups() -> None:
    numbers = {
        n: small(n, ["group"]).override("schemes.group.k=null")
        for n in ("tiny", "conditional_detr_r50")
    }
    found = {n: build(r, CLASSES).training_schemes[-1] for n, r in numbers.items()}
    assert [s.k for s in found.values() if isinstance(s, Group)] == [3, 11]


def test_one_group_is_the_base() -> None:
    model = build(small("tiny", ["none", "group=1"]), CLASSES)
    plain = build(small("tiny", ["none"]), CLASSES)
    one, other = (m(images(), targets((2, 3))).losses for m in (model, plain))
    assert all(torch.equal(value, one[key]) for key, value in other.items())


def test_patterns_are_refused_and_hybrid_is_advised_against() -> None:
    with pytest.raises(UserError, match="patterns"):
        build(small("dab_detr_r50", ["group=2"]).override("detector.queries.patterns=3"), CLASSES)
    with pytest.warns(Advice, match="twice"):
        build(small("tiny", ["group=2", "hybrid=2"]), CLASSES)


# How far apart groups are


def test_distances_are_logged_on_request() -> None:
    for name in ("conditional_detr_r50", "tiny"):
        recipe = small(name, ["group=3"])
        silent = build(recipe, CLASSES)(images(), targets((2, 3))).metrics
        assert not any(k.startswith(("group/p", "group/m")) for k in silent)
        told = build(recipe.override("schemes.group.distances=true"), CLASSES)
        for truth, matched in ((targets((2, 3)), True), (targets((0, 0)), False)):
            metrics = told(images(), truth).metrics
            assert 0 < metrics["group/pd"] < 1
            assert metrics["group/md"].isfinite() == matched
    nowhere = build(
        small("detr_r50", ["group=3"]).override("schemes.group.distances=true"), CLASSES
    )
    assert "group/pd" not in nowhere(images(), targets((2, 3))).metrics


def test_matched_positions_by_hand() -> None:
    positions = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)  # two images, three groups of two

    def rows(*found: tuple[int, int, int, int]) -> Assignment:
        layer, image, query, target = (torch.tensor(t) for t in zip(*found, strict=True))
        return Assignment(layer, image, query, target, torch.arange(len(layer)))

    main = rows((1, 0, 1, 0), (1, 1, 0, 1), (0, 0, 0, 0))  # only the last layer counts
    further = rows((1, 0, 3, 0), (1, 1, 0, 1))  # group 2's second query; group 1's first
    matched = matched_positions(positions, [main, further], 2)
    assert torch.equal(matched[0], torch.stack([positions[0, 0, 1], positions[1, 0, 0]]))
    assert torch.equal(matched[2, 0], positions[0, 2, 1])
    assert torch.equal(matched[1, 1], positions[1, 1, 0])
    assert matched[1, 0].isnan().all()
    apart: Tensor = matched_distance(matched)
    torch.testing.assert_close(apart[0], (positions[1, 1, 0] - positions[1, 0, 0]).norm())
    assert apart[2].isnan()  # groups 1 and 2 share no target
    assert position_distance(positions).shape == (2, 3)


def test_a_scheme_keeps_no_part_of_the_detector() -> None:
    model, _, _ = grouped("tiny")
    own = {p.data_ptr() for p in model.detector.parameters()}
    assert not own & {p.data_ptr() for p in model.schemes.parameters()}
    assert isinstance(model.schemes, nn.ModuleList)
