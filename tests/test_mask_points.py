"""Masks at points: the short ways equal the plain ones, and what nobody sees changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detrellis import mask_points
from detrellis.mask_points import (
    Draw,
    MaskCost,
    Points,
    Sampling,
    Seeded,
    mask_iou,
    mask_terms,
    sample,
    sample_bitmaps,
)
from detrellis.matching import Hungarian, Match, MatchingCost, assign, softmax_term
from detrellis.nn.masked import readable
from detrellis.set_loss import softmax_class_loss
from detrellis.supervision import Supervision, supervise
from detrellis.types import Assignment, DecoderOutput, MaskFeatures, Targets

POINTS = Points(40)
LAYERS, BATCH, QUERIES, WIDTH = 2, 2, 5, 8
ONE = torch.tensor(1.0, dtype=torch.float64)


def problem(
    sizes: tuple[int, ...] = (2, 3),
    side: tuple[int, int] = (32, 48),
    copies: int = 1,
    seed: int = 0,
) -> tuple[DecoderOutput, Targets]:
    """Noise; blobs as bitmaps."""
    g = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    height, width = side
    logits, embeds = noise(LAYERS, BATCH, QUERIES, 4), noise(LAYERS, BATCH, QUERIES, WIDTH)
    logits, embeds = (t.repeat(1, 1, copies, 1).requires_grad_() for t in (logits, embeds))
    maps = noise(BATCH, WIDTH, height // 4, width // 4).requires_grad_()
    blobs = F.interpolate(noise(1, 8, 4, 4), size=side, mode="bilinear")[0, : sum(sizes)] > 0
    labels = torch.randint(3, (sum(sizes),), generator=g)
    nowhere = torch.zeros(LAYERS, BATCH, copies * QUERIES, 0, dtype=torch.float64)
    masks = MaskFeatures(maps, side)
    output = DecoderOutput(logits, nowhere, embeds, mask_embeds=embeds, masks=masks)
    return output, Targets(
        labels, torch.rand(sum(sizes), 4, dtype=torch.float64), sizes, bitmaps=blobs
    )


def supervision() -> Supervision:
    weights = {"class": 2.0, "mask": 5.0, "dice": 5.0}
    return Supervision(
        Hungarian(MatchingCost(class_term=softmax_term), masks=MaskCost()),
        softmax_class_loss,
        weights,
    )


def test_bitmaps_are_sampled_as_maps_are() -> None:
    _, targets = problem()
    assert targets.bitmaps is not None
    points = torch.rand(5, 200, 2, dtype=torch.float64) * 1.2 - 0.1  # some beyond the edge
    expected = sample(targets.bitmaps.double().unsqueeze(1), points).squeeze(1)
    torch.testing.assert_close(
        sample_bitmaps(targets.bitmaps, torch.arange(5), points), expected, atol=1e-12, rtol=0
    )
    turned = torch.tensor([4, 1, 1])
    expected = sample(
        targets.bitmaps[turned].double().unsqueeze(1), points[:1].expand(3, -1, -1)
    ).squeeze(1)
    found = sample_bitmaps(targets.bitmaps, turned, points[:1])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_resized_product_is_the_product_with_what_is_resized() -> None:
    output, _ = problem()
    assert output.mask_embeds is not None
    assert output.masks is not None
    embeds, maps = output.mask_embeds[0], output.masks.map
    whole = torch.einsum("bnd,bdhw->bnhw", embeds, maps)
    plain = F.interpolate(whole, size=(4, 6), mode="bilinear", align_corners=False).flatten(2)
    features = F.interpolate(maps, size=(4, 6), mode="bilinear", align_corners=False).flatten(2)
    torch.testing.assert_close(embeds @ features, plain, atol=1e-10, rtol=0)
    inside = plain.sigmoid() >= 0.5
    assert torch.equal(readable(embeds, features, None), inside | ~inside.any(-1, keepdim=True))


def test_a_query_whose_mask_is_empty_reads_all_but_padding() -> None:
    features = torch.tensor([[[1.0, 2.0, 3.0, -1.0]]])  # one channel, four cells
    padding = torch.tensor([[False, False, False, True]])
    embeds = torch.tensor([[[1.0], [-1.0], [0.0]]])  # three cells, only a padded one, exactly 0
    assert readable(embeds, features, padding).tolist() == [[[True, True, True, False]] * 3]
    without = readable(embeds, features, None)
    assert without.tolist() == [
        [[True, True, True, False], [False, False, False, True], [True] * 4]
    ]


def test_costs_equal_those_of_whole_masks() -> None:
    output, targets = problem()
    sampling = Sampling(Seeded(3), POINTS)
    found = MaskCost(2.0, 3.0)(output, targets, sampling, 1)
    assert output.mask_embeds is not None
    assert output.masks is not None
    assert targets.bitmaps is not None
    points = Seeded(3)(("match", 1), (BATCH, POINTS.count), output.masks.map)
    whole = torch.einsum("nd,dhw->nhw", output.mask_embeds[1, 1], output.masks.map[1])
    x = sample(whole[None], points[1:])[0]
    t = sample(targets.bitmaps[2:].double()[None], points[1:])[0]
    pairs = [(a, b) for a in x for b in t]
    mask = torch.stack([F.binary_cross_entropy_with_logits(a, b) for a, b in pairs])
    p = [(a.sigmoid(), b) for a, b in pairs]
    dice = torch.stack([1 - (2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1) for a, b in p])
    torch.testing.assert_close(found[1, 1, 0], (2 * mask + 3 * dice).view(QUERIES, 3))


def test_the_same_seed_gives_the_same_losses_and_gradients() -> None:
    output, targets = problem()

    def gradients(seed: int) -> list[Tensor]:
        losses, _ = supervise(
            [supervision().task("m", output, targets, ONE, sampling=Sampling(Seeded(seed), POINTS))]
        )
        assert output.masks is not None
        leaves = [output.logits, output.states, output.masks.map]
        return [
            *losses.values(),
            *torch.autograd.grad(torch.stack(list(losses.values())).sum(), leaves),
        ]

    first, again, other = gradients(0), gradients(0), gradients(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[-1], other[-1])


def compared(weight: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Terms of two masks of each layer and image with these weights,
    `(LAYERS * BATCH * 2,)`, and their gradients for features and embeddings."""
    output, targets = problem()
    assert output.masks is not None
    assert output.mask_embeds is not None
    layer, image, query = torch.ones(LAYERS, BATCH, 2).nonzero().unbind(1)
    positives = Assignment(layer, image, query, query + 2 * image, torch.zeros_like(query))
    counts = [[2] * BATCH] * LAYERS
    terms = mask_terms(output, targets, positives, ONE, Sampling(Seeded(0), POINTS), counts, weight)
    total = torch.stack(list(terms.values())).square().sum()
    return terms, *torch.autograd.grad(total, [output.masks.map, output.mask_embeds])


@pytest.mark.parametrize("held", [1, 400])  # cells or candidates: one place at a time, some
def test_how_many_masks_are_compared_at_once_changes_nothing(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.arange(1.0, LAYERS * BATCH * 2 + 1, dtype=torch.float64)
    together = compared(weight)
    monkeypatch.setattr(mask_points, "TOGETHER", held)
    for one, other in zip(together, compared(weight), strict=True):
        torch.testing.assert_close(one, other)


def test_masks_are_compared_in_their_image_and_count_for_their_layer() -> None:
    weight = torch.zeros(LAYERS, BATCH, 2, dtype=torch.float64)
    weight[1, 1] = 1
    terms, features, embeds = compared(weight.flatten())
    assert all(term[0] == 0 and term[1] > 0 for term in terms.values())
    assert features[0].count_nonzero() == 0
    assert features[1].count_nonzero() > 0
    assert embeds[1, 1, :2].count_nonzero() == embeds.count_nonzero() > 0


def test_groups_that_are_equal_lose_as_much_as_one() -> None:
    """At points that all masks share."""
    fixed = torch.rand(4096, 2, dtype=torch.float64)

    def draw(purpose: tuple[str | int, ...], shape: tuple[int, ...], like: Tensor) -> Tensor:
        return fixed[: shape[1]].expand(*shape, 2)

    same: Draw = draw  # type: ignore[assignment]
    losses = []
    for copies in (1, 3):
        output, targets = problem(copies=copies)
        task = supervision().task(
            "m", output, targets, copies * ONE, copies, sampling=Sampling(same, POINTS)
        )
        losses.append(supervise([task])[0])
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, msg=name)


@pytest.mark.parametrize("sizes", [(0, 0), (7, 0)])
def test_any_number_of_targets_gives_gradients(sizes: tuple[int, ...]) -> None:
    output, targets = problem(sizes)
    losses, metrics = supervise(
        [supervision().task("m", output, targets, ONE, sampling=Sampling(Seeded(), POINTS))]
    )
    assert output.masks is not None
    leaves = [output.states, output.masks.map]
    found = torch.autograd.grad(torch.stack(list(losses.values())).sum(), leaves)
    assert all(t.isfinite().all() for t in (*losses.values(), *found))
    assert any(t.any() for t in found) == any(sizes)
    assert metrics["m/iou"].isnan() != any(sizes)


def test_padding_further_changes_no_loss_of_points_inside() -> None:
    output, targets = problem()
    assert output.masks is not None
    assert targets.bitmaps is not None
    grown = MaskFeatures(
        F.pad(output.masks.map, (0, 12, 0, 8), value=9.0),
        (64, 96),
        torch.ones(BATCH, 64, 96, dtype=torch.bool).index_put(
            tuple(
                torch.meshgrid(
                    torch.arange(BATCH), torch.arange(32), torch.arange(48), indexing="ij"
                )
            ),
            torch.tensor(False),
        ),
    )
    further = (
        output._replace(masks=grown),
        targets._replace(bitmaps=F.pad(targets.bitmaps, (0, 48, 0, 32))),
    )

    def losses(output: DecoderOutput, targets: Targets, points: Points) -> Tensor:
        # Points that do not reach the last half cell, where samples mix with what lies beyond the
        # image.
        sampling = Sampling(lambda *p: Seeded()(*p) * 0.8 + 0.1, points)
        return torch.stack(
            list(
                supervise([supervision().task("m", output, targets, ONE, sampling=sampling)])[
                    0
                ].values()
            )
        )

    inside = replace(POINTS, inside=True)
    torch.testing.assert_close(losses(*further, inside), losses(output, targets, inside))
    assert not torch.allclose(losses(*further, POINTS), losses(output, targets, POINTS))


def test_iou_counts_the_cells_of_whole_masks() -> None:
    output, targets = problem()
    match = Match(output, targets, supervision().assign, sampling=Sampling(Seeded(), POINTS))
    (positives,) = assign([match])
    assert output.mask_embeds is not None
    assert output.masks is not None
    assert targets.bitmaps is not None
    found = mask_iou(output, targets, positives, match.counts)
    rows = torch.where(positives.layer == 1)[0]
    assert len(found) == len(rows) == sum(targets.sizes)
    for value, row in zip(found, rows, strict=True):
        image, query, target = positives.image[row], positives.query[row], positives.target[row]
        inside = (
            torch.einsum("d,dhw->hw", output.mask_embeds[1, image, query], output.masks.map[image])
            > 0
        )
        truth = targets.bitmaps[target, 2::4, 2::4]
        torch.testing.assert_close(value, (inside & truth).sum() / (inside | truth).sum())


def test_uncertain_points_are_chosen() -> None:
    """A mask that is uncertain in its left half alone: the loss looks there."""
    output, targets = problem((1, 0))
    asked: list[tuple[str | int, ...]] = []

    def draw(purpose: tuple[str | int, ...], shape: tuple[int, ...], like: Tensor) -> Tensor:
        asked.append(purpose)
        return Seeded()(purpose, shape, like)

    assert output.masks is not None
    maps = torch.ones_like(output.masks.map) * 100
    maps[..., : maps.shape[-1] // 2] = 1e-3
    output = output._replace(masks=output.masks._replace(map=maps))
    match = Match(output, targets, supervision().assign, sampling=Sampling(draw, POINTS))  # type: ignore[arg-type]
    (positives,) = assign([match])
    terms = mask_terms(output, targets, positives, ONE, match.sampling, match.counts)  # type: ignore[arg-type]
    assert {purpose[0] for purpose in asked} == {"match", "candidates", "anywhere"}
    # All points uniform: half of them certain and, by a huge margin, right or wrong.
    uniform = Sampling(Seeded(), replace(POINTS, uncertain=0.0))
    even = mask_terms(output, targets, positives, ONE, uniform, match.counts)
    assert not torch.allclose(terms["mask"], even["mask"])
