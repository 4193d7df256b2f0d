"""Semantic alignment: where the points lie,
what is sampled there, every ablation, and where its reading ends.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrellis.nn.attention import split_heads
from detrellis.nn.neck import flatten
from detrellis.nn.position import SineMap, sine_embed
from detrellis.nn.semantic import CELLS, SemanticAligner, SemanticCrossAttention, region_features
from detrellis.types import Memory, Spatial

WIDTH, HEADS, QUERIES = 32, 8, 5
SHAPE = (12, 16)
INSIDE = torch.tensor(
    [[0.3, 0.4, 0.2, 0.3], [0.5, 0.5, 0.6, 0.5], [0.6, 0.3, 0.1, 0.05], [0.4, 0.6, 0.5, 0.1]]
)
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "average": {"resample": "avg"},
    "maximum": {"resample": "max"},
    "one point": {"keypoints": 1},
    "four points": {"keypoints": 4},
    "no gates": {"reweight": False},
    "anywhere": {"search": "image"},
    "from the centre": {"zero_init": True},
    "one point, no gates": {"keypoints": 1, "reweight": False},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
both = pytest.mark.parametrize("prior", [False, True], ids=["plain", "prior"])


def make(**options: Any) -> SemanticAligner:
    torch.manual_seed(0)
    return SemanticAligner(WIDTH, HEADS, **options).double()


def memory(maps: Tensor | None = None, valid: tuple[int, int] = SHAPE) -> Memory:
    """Of two images: the first fills the map, the second the first `valid` rows and columns."""
    maps = torch.randn(2, WIDTH, *SHAPE, dtype=torch.float64) if maps is None else maps
    padding = torch.zeros(2, *maps.shape[2:], dtype=torch.bool)
    padding[1, valid[0] :] = True
    padding[1, :, valid[1] :] = True
    position = SineMap(maps.shape[1], temperature=1e4, offset=-0.5, blank=True)
    return flatten([maps], padding if padding.any() else None, position)


def ramp(valid: tuple[int, int] = SHAPE) -> Tensor:
    """Maps that hold where they are read: x, y of the unpadded image in the first channels."""
    maps = torch.randn(2, WIDTH, *SHAPE, dtype=torch.float64)
    for image, (height, width) in enumerate((SHAPE, valid)):
        maps[image, 0] = (torch.arange(SHAPE[1]) + 0.5) / width
        maps[image, 1] = (torch.arange(SHAPE[0])[:, None] + 0.5) / height
    return maps


def inputs(boxes: Tensor = INSIDE) -> tuple[Tensor, Tensor]:
    """Queries, and the same boxes in both images."""
    return torch.randn(2, len(boxes), WIDTH, dtype=torch.float64), boxes.double().expand(2, -1, -1)


def widen(aligner: SemanticAligner, factor: float) -> None:
    """Spreads points, which lie near the centres at first."""
    assert aligner.find is not None
    last = aligner.find[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(factor)


# Points


@pytest.mark.parametrize("valid", [SHAPE, (9, 10)], ids=["whole", "padded"])
@pytest.mark.parametrize("search", ["box", "image"])
def test_contents_are_what_stands_at_the_points(search: Any, valid: tuple[int, int]) -> None:
    aligner = make(search=search, reweight=False)
    x, boxes = inputs()
    found = aligner(x, boxes, memory(ramp(valid), valid))
    assert found.content.shape == found.position.shape == (2, len(INSIDE), HEADS, WIDTH)
    assert found.points.std(2).min() > 0, "heads have points of their own"
    # A region's samples fade towards its border, from the centres of its outermost cells on.
    shares = (found.points - boxes[..., None, :2]) / boxes[..., None, 2:] * 2
    clear = (
        (shares.abs() < 1 - 1 / CELLS).all(-1)
        if search == "box"
        else torch.ones_like(shares[..., 0]).bool()
    )
    assert clear.float().mean() > 0.5
    torch.testing.assert_close(found.content[..., :2][clear], found.points[clear])
    torch.testing.assert_close(found.position, sine_embed(found.points, WIDTH // 2))


@pytest.mark.parametrize("factor", [1.0, 1e4])
def test_points_stay_in_their_boxes(factor: float) -> None:
    aligner = make()
    widen(aligner, factor)
    boxes = torch.cat(
        [INSIDE, torch.tensor([[0.0, 1.0, 0.5, 0.9], [0.5, 0.5, 1e-4, 1e-4], [0.5, 0.5, 1.0, 1.0]])]
    )
    x, boxes = inputs(boxes)
    points = aligner(x, boxes, memory()).points
    away = (points - boxes[..., None, :2]).abs()
    assert (away <= boxes[..., None, 2:] / 2 + 1e-12).all()
    assert (away > 0).any()


@pytest.mark.parametrize("factor", [1.0, 1e4])
def test_a_search_of_the_image_stays_in_the_image(factor: float) -> None:
    aligner = make(search="image")
    widen(aligner, factor)
    x, boxes = inputs(torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.6, 0.6]]))
    points = aligner(x, boxes, memory(valid=(9, 10))).points
    assert ((points >= 0) & (points <= 1)).all()
    assert ((points - boxes[..., None, :2]).abs() > boxes[..., None, 2:] / 2).any(), (
        "some lie outside their boxes"
    )


@pytest.mark.parametrize("keypoints", [1, 2, 4, 8])
@both
def test_neighbouring_heads_share_points(keypoints: int, prior: bool) -> None:
    aligner = make(keypoints=keypoints, prior=prior, reweight=False)
    found = aligner(*inputs(), memory())
    for values in (found.points, found.content, found.position, found.scale):
        if values is None:
            continue
        owner = [m * keypoints // HEADS for m in range(HEADS)]
        for m in range(HEADS):
            for other in range(HEADS):
                assert torch.equal(values[:, :, m], values[:, :, other]) == (
                    owner[m] == owner[other]
                )


def test_zero_init_starts_in_the_centres() -> None:
    x, boxes = inputs()
    centres = boxes[..., None, :2].expand(-1, -1, HEADS, -1)
    found = make(zero_init=True, prior=True)(x, boxes, memory())
    assert torch.equal(found.points, centres)
    assert found.scale is not None
    assert not found.scale.any(), "and looks everywhere"
    assert not torch.allclose(make()(x, boxes, memory()).points, centres)


# Ablations


@pytest.mark.parametrize(("resample", "pool"), [("avg", torch.mean), ("max", torch.amax)])
@both
def test_pooling_gives_all_heads_the_regions_content(resample: Any, pool: Any, prior: bool) -> None:
    aligner = make(resample=resample, prior=prior, reweight=False)
    (x, boxes), maps = inputs(), torch.randn(2, WIDTH, *SHAPE, dtype=torch.float64)
    found = aligner(x, boxes, memory(maps))
    regions = region_features(maps, boxes, torch.ones(1, 1, 2)).unflatten(0, boxes.shape[:2])
    expected = pool(regions, (3, 4))[:, :, None].expand(-1, -1, HEADS, -1)
    torch.testing.assert_close(found.content, expected)
    assert torch.equal(found.points, boxes[..., None, :2].expand(-1, -1, HEADS, -1))
    assert (found.scale is not None) == prior
    assert bool(list(aligner.parameters())) == prior, "what finds points is left out with them"


def test_gates_are_the_old_querys() -> None:
    (x, boxes), where = inputs(), memory()
    free, gated = make(reweight=False), make()
    gated.load_state_dict(free.state_dict(), strict=False)
    plain, found = free(x, boxes, where), gated(x, boxes, where)
    for gate, before, after in (
        (gated.content_gate, plain.content, found.content),
        (gated.position_gate, plain.position, found.position),
    ):
        assert gate is not None
        torch.testing.assert_close(after, before * gate(x).sigmoid().unflatten(-1, (HEADS, WIDTH)))
    other = torch.randn_like(x)
    assert torch.equal(free(other, boxes, where).content, plain.content)
    assert not torch.equal(gated(other, boxes, where).content, found.content)


@every_option
@both
def test_every_parameter_learns(options: dict[str, Any], prior: bool) -> None:
    torch.manual_seed(0)
    aligner = make(prior=prior, **options)
    if options.get("zero_init"):
        for p in aligner.parameters():
            nn.init.normal_(p, std=0.1)
    attention = SemanticCrossAttention(WIDTH, HEADS, aligner, dropout=0.1).double()
    (x, boxes), where = inputs(), memory(valid=(9, 10))
    tokens = where.tokens.requires_grad_()
    out = attention(x, Spatial(x, boxes), where)
    assert out.shape == x.shape
    (out * torch.randn_like(out)).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.any()
    for name, p in attention.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@both
def test_boxes_learn_from_the_priors_centres_only(prior: bool) -> None:
    """RoIAlign's coordinates and the points' sine embedding give no gradient."""
    attention = SemanticCrossAttention(WIDTH, HEADS, make(prior=prior)).double()
    x, boxes = inputs()
    boxes = boxes.clone().requires_grad_()
    attention(x, Spatial(x, boxes), memory()).square().sum().backward()
    assert (boxes.grad is not None and bool(boxes.grad.any())) == prior


# Attention


@both
def test_every_head_compares_over_the_full_width(prior: bool) -> None:
    attention = SemanticCrossAttention(WIDTH, HEADS, make(prior=prior)).double()
    (x, boxes), where = inputs(), memory(valid=(9, 10))
    aligned = attention.aligner(x, boxes, where)
    read, weights = attention.attend(aligned, where)
    q = attention.query(aligned.content) + attention.query_position(aligned.position)
    keys = attention.key(where.tokens) + attention.key_position(where.position)
    assert where.padding is not None
    assert where.valid_ratios is not None
    mask = torch.zeros_like(weights).masked_fill(where.padding[:, None, None], -torch.inf)
    if aligned.scale is not None:
        y, x_ = torch.meshgrid(*(torch.arange(n) + 0.5 for n in SHAPE), indexing="ij")
        centre = aligned.points * torch.tensor(SHAPE[::-1]) * where.valid_ratios.unsqueeze(2)
        away = torch.stack([x_, y], -1).flatten(0, 1) - centre.transpose(1, 2).unsqueeze(3)
        mask = mask - (away * aligned.scale.transpose(1, 2).unsqueeze(3)).square().sum(-1) / 8
    expanded = keys.unsqueeze(1).expand(-1, HEADS, -1, -1)
    values = split_heads(attention.value(where.tokens), HEADS)
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), expanded, values, attn_mask=mask)
    torch.testing.assert_close(read, expected)
    torch.testing.assert_close(weights @ values, expected)


def test_dropout_acts_in_training_only() -> None:
    attention = SemanticCrossAttention(WIDTH, HEADS, make(), dropout=0.5).double()
    (x, boxes), where = inputs(), memory()
    assert not torch.equal(*(attention(x, Spatial(x, boxes), where) for _ in range(2)))
    attention.eval()
    assert torch.equal(*(attention(x, Spatial(x, boxes), where) for _ in range(2)))


# Edges and padding


@every_option
@both
def test_any_box_is_finite(options: dict[str, Any], prior: bool) -> None:
    extremes = torch.tensor(
        [
            [0.5, 0.5, 0.0, 0.0],
            [0.0, 0.0, 0.0, 1.0],
            [1.0, 1.0, 1.0, 1.0],
            [0.5, 0.5, 1.0, 1.0],
            [0.7, 0.2, 1e-6, 0.4],
        ]
    )
    attention = SemanticCrossAttention(WIDTH, HEADS, make(prior=prior, **options)).double()
    x, boxes = inputs(extremes)
    out = attention(x, Spatial(x, boxes), memory(valid=(1, 1)))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())


@every_option
@both
def test_padding_changes_nothing_for_boxes_within_the_image(
    options: dict[str, Any], prior: bool
) -> None:
    """Neither what stands there, nor whether there is any."""
    attention = SemanticCrossAttention(WIDTH, HEADS, make(prior=prior, **options)).double()
    (x, boxes), valid = inputs(), (9, 10)
    where = memory(valid=valid)
    out = attention(x, Spatial(x, boxes), where)
    assert where.padding is not None
    dirty = where._replace(
        tokens=where.tokens + 100 * torch.rand(WIDTH) * where.padding.unsqueeze(-1)
    )
    torch.testing.assert_close(attention(x, Spatial(x, boxes), dirty), out, atol=1e-9, rtol=0)
    cropped = where.tokens[1:].transpose(1, 2).unflatten(2, SHAPE)[..., : valid[0], : valid[1]]
    alone = flatten([cropped], None, SineMap(WIDTH, temperature=1e4, offset=-0.5, blank=True))
    # A map's last valid index is divided by itself plus 1e-6.
    torch.testing.assert_close(
        attention(x[1:], Spatial(x[1:], boxes[1:]), alone), out[1:], atol=1e-5, rtol=0
    )


def test_regions_over_the_edge_read_what_stands_there() -> None:
    """As in the reference code: the limit of "padding is never read" in docs/architecture.md."""
    aligner = make()
    x, boxes = inputs(torch.tensor([[0.9, 0.9, 0.6, 0.6]]))
    where = memory(valid=(9, 10))
    assert where.padding is not None
    dirty = where._replace(tokens=where.tokens + where.padding.unsqueeze(-1))
    one, other = (aligner(x, boxes, m).content for m in (where, dirty))
    assert torch.equal(one[0], other[0])
    assert not torch.allclose(one[1], other[1])


def test_the_position_map_is_0_on_padding() -> None:
    valid = torch.ones(1, 4, 5)
    valid[:, 3:] = 0
    valid[:, :, 4:] = 0
    outside = valid.flatten(1) == 0
    blank, noisy = (
        SineMap(WIDTH, temperature=1e4, offset=-0.5, blank=b)(valid) for b in (True, False)
    )
    assert not blank[outside].any()
    assert noisy[outside].any()
    assert torch.equal(blank[~outside], noisy[~outside])


# Precision


def test_a_wide_map_keeps_its_columns_under_autocast() -> None:
    """In bf16, 301 of them would be 300 or 302."""
    tokens = ((torch.arange(301) + 0.5) / 301).repeat(3)[None, :, None].expand(-1, -1, WIDTH)
    where = Memory(tokens, torch.zeros(1, 903, WIDTH), ((3, 301),))
    x, boxes = torch.randn(1, 4, WIDTH), INSIDE[None]
    with torch.autocast("cpu", torch.bfloat16):
        content = SemanticAligner(WIDTH, HEADS, resample="avg", reweight=False)(
            x.bfloat16(), boxes, where
        ).content
    torch.testing.assert_close(content, boxes[..., None, :1].expand_as(content), atol=1e-6, rtol=0)


def test_points_stay_float32_under_autocast() -> None:
    """In bf16 a point would be one of 256 places.
    What is read there, from a map in bf16, says where it was read.
    """
    torch.manual_seed(0)
    tokens = torch.arange(251.0).repeat(3)[None, :, None].expand(-1, -1, WIDTH)
    where = Memory(tokens.bfloat16(), torch.zeros(1, 753, WIDTH), ((3, 251),))
    x, boxes = torch.randn(1, 4, WIDTH), INSIDE[None]
    aligner = SemanticAligner(WIDTH, HEADS, prior=True, reweight=False, search="image")
    widen(aligner, 1e-3)  # a map of such numbers saturates the points
    with torch.autocast("cpu", torch.bfloat16):
        found = aligner(x.bfloat16(), boxes, where)
    assert found.scale is not None
    assert found.points.dtype == found.scale.dtype == torch.float32
    assert (found.points - 0.5).abs().amax() < 0.49
    torch.testing.assert_close(
        found.content[..., 0] + 0.5, found.points[..., 0] * 251, atol=1e-3, rtol=0
    )
