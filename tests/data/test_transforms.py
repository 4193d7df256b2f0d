"""Pixels and boxes move together, whatever the transform."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detrellis.data.operations import (
    MEAN_COLOUR,
    colour_jitter,
    crop,
    horizontal_flip,
    vertical_flip,
)
from detrellis.data.transforms import (
    DetrAugment,
    Resize,
    Transform,
    eval_transform,
    short_side_size,
    train_transform,
)
from detrellis.errors import UserError
from detrellis.recipes.data import DataConfig

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "detr": lambda: train_transform("detr", 120),
    "detr, both flips": lambda: train_transform("detr", 120, hflip=0.5, vflip=0.5),
    "fixed": lambda: train_transform("fixed", (96, 128), jitter=0.0),
    "fixed, strong zoom": lambda: train_transform(
        "fixed", (96, 128), jitter=0.0, zoom=(0.4, 2.5), vflip=0.5
    ),
    "fixed, stretched": lambda: train_transform("fixed", (128, 96), jitter=0.0, keep_aspect=False),
    "fixed, turned": lambda: train_transform(
        "fixed", (128, 96), jitter=0.0, match_orientation=True
    ),
    "none": lambda: train_transform("none", 90),
    "eval": lambda: eval_transform(90, max_size=100),
    "eval, fixed": lambda: eval_transform((100, 90)),
    "eval, stretched": lambda: eval_transform((100, 60), keep_aspect=False),
}


def painted(height: int, width: int, box: tuple[int, int, int, int]) -> Tensor:
    """A red rectangle on black."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0, box[1] : box[3], box[0] : box[2]] = 255
    return image


def red_extent(image: Tensor) -> Tensor:
    """Where the red rectangle is: (x1, y1, x2, y2)."""
    red = (image[0] > 127) & (image[1] < 60)
    rows, columns = red.any(1).nonzero().flatten(), red.any(0).nonzero().flatten()
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_boxes_follow_the_pixels(name: str) -> None:
    transform = TRANSFORMS[name]()
    box = (40, 25, 95, 80)
    image, boxes, labels = painted(120, 150, box), torch.tensor([box]).float(), torch.tensor([3])
    for seed in range(30):
        torch.manual_seed(seed)
        out, moved, kept = transform(image, boxes, labels)
        assert out.dtype == torch.uint8
        assert moved.dtype == torch.float32
        assert len(moved) == len(kept)
        if len(moved):
            assert kept.tolist() == [3]
            torch.testing.assert_close(red_extent(out), moved[0], atol=1.01, rtol=0)
        else:
            assert ((out[0] > 127) & (out[1] < 60)).float().mean() < 0.05, (
                "a box that is in view was dropped"
            )


@pytest.mark.parametrize("name", TRANSFORMS)
def test_images_without_boxes(name: str) -> None:
    out, boxes, labels = TRANSFORMS[name]()(
        painted(60, 200, (0, 0, 9, 9)), torch.zeros(0, 4), torch.zeros(0).long()
    )
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)
    assert out.dtype == torch.uint8


@pytest.mark.parametrize("name", [n for n in TRANSFORMS if n.startswith(("fixed", "eval, "))])
@pytest.mark.parametrize("shape", [(50, 300), (300, 50), (100, 100), (1, 400), (3, 2)])
def test_fixed_size_fits_its_frame(name: str, shape: tuple[int, int]) -> None:
    transform = TRANSFORMS[name]()
    frame = (
        transform.pad_to or eval_transform((128, 96), match_orientation=True).facing(*shape).pad_to
    )
    assert frame is not None
    image = torch.zeros(3, *shape, dtype=torch.uint8)
    sizes = {
        tuple(transform(image, torch.zeros(0, 4), torch.zeros(0).long())[0].shape[1:])
        for _ in range(5)
    }
    (size,) = sizes  # the zoom does not change the size
    if "stretched" in name:
        assert size == frame
    else:
        assert all(side <= limit for side, limit in zip(size, frame, strict=True))
        assert any(side == limit for side, limit in zip(size, frame, strict=True))


@pytest.mark.parametrize(
    ("height", "width", "size", "max_size", "expected"),
    [
        (480, 640, 800, 1333, (800, 1066)),  # int(1066.67)
        (640, 480, 800, 1333, (1066, 800)),
        (427, 640, 800, 1333, (800, 1199)),
        (300, 600, 800, 1333, (666, 1332)),  # long side would be 1600: round(666.5) is even
        (600, 300, 800, 1333, (1332, 666)),
        (500, 500, 800, 1333, (800, 800)),
        (800, 1333, 800, 1333, (800, 1333)),
        (800, 1334, 800, 1333, (799, 1332)),
        (100, 4000, 800, None, (800, 32000)),
        (1, 4000, 800, 1333, (1, 1333)),
    ],
)
def test_detr_resize_rule(
    height: int, width: int, size: int, max_size: int | None, expected: tuple[int, int]
) -> None:
    assert short_side_size(height, width, size, max_size) == expected


@given(
    height=st.integers(8, 3000),
    width=st.integers(8, 3000),
    size=st.integers(32, 1200),
    longest=st.integers(600, 2000),
)
def test_resize_rule_keeps_aspect_and_limits(
    height: int, width: int, size: int, longest: int
) -> None:
    h, w = short_side_size(height, width, size, longest)
    assert min(h, w) <= size
    assert (h <= w) == (height <= width) or h == w
    if min(h, w) < size:
        # The short side is rounded first, so the long one may pass the limit by half the aspect
        # ratio.
        assert max(h, w) <= longest + max(height, width) / min(height, width)
    if min(h, w) > 1:
        short, long = min(height, width), max(height, width)
        assert max(h, w) == int(min(h, w) * long / short)


def test_detr_sizes_scale_with_the_short_side() -> None:
    full, half = train_transform("detr", 800), train_transform("detr", 400)
    assert isinstance(full, DetrAugment)
    assert isinstance(half, DetrAugment)
    assert full.sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (full.max_size, full.crop_sides, full.crop_range) == (1333, (400, 500, 600), (384, 600))
    assert half.sides == tuple(s // 2 for s in full.sides)
    assert (half.max_size, half.crop_sides, half.crop_range) == (666, (200, 250, 300), (192, 300))
    assert train_transform("detr", 400, max_size=500).max_size == 500  # type: ignore[attr-defined]
    assert eval_transform(800) == Resize(800, 1333)


def test_without_antialiasing_nothing_is_rounded() -> None:
    image = (torch.arange(3 * 20 * 30) * 37).remainder(251).to(torch.uint8).view(3, 20, 30)
    transform = eval_transform((7, 11), keep_aspect=False, antialias=False)
    resized, *_ = transform(image, torch.zeros(0, 4), torch.zeros(0).long())
    expected = torch.nn.functional.interpolate(image[None].double(), (7, 11), mode="bilinear")[0]
    assert (expected - expected.round()).abs().max() > 0.4
    torch.testing.assert_close(resized.double(), expected, rtol=0, atol=1e-3)


def test_detr_uses_every_scale_and_both_branches() -> None:
    transform = train_transform("detr", 100, hflip=0.0)
    image = torch.zeros(3, 100, 150, dtype=torch.uint8)
    torch.manual_seed(0)
    shapes = [
        transform(image, torch.zeros(0, 4), torch.zeros(0).long())[0].shape[1:] for _ in range(200)
    ]
    whole = [s for s in shapes if abs(s[1] / s[0] - 1.5) < 0.02]
    assert {min(s) for s in shapes} >= {60, 64, 68, 72, 76, 80, 84, 88, 92, 96, 100}
    assert 70 < len(whole) < 140  # half of them, and a few crops of the same aspect ratio


def test_crop_clamps_and_drops() -> None:
    image = torch.arange(3 * 20 * 30).remainder(251).to(torch.uint8).view(3, 20, 30)
    boxes = torch.tensor(
        [[0, 0, 12, 12], [0, 0, 10, 20], [11, 6, 14, 9], [29, 0, 30, 20], [15, 14, 30, 20]]
    ).float()
    out, moved, labels = crop(image, boxes, torch.arange(5), (5, 10, 10, 15))
    torch.testing.assert_close(out, image[:, 5:15, 10:25])
    assert labels.tolist() == [0, 2, 4]  # 1 only touches the window, 3 is right of it
    assert moved.tolist() == [[0, 0, 2, 7], [1, 1, 4, 4], [5, 9, 15, 10]]
    _, _, labels = crop(image, boxes, torch.arange(5), (5, 10, 10, 15), visible=0.1)
    assert labels.tolist() == [2, 4]  # 14 of 144 pixels are left of box 0, 10 of 90 of box 4


@st.composite
def boxes_and_window(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int, int, int]]:
    side = st.integers(0, 40)
    corners = draw(st.lists(st.tuples(side, side, side, side), max_size=5))
    boxes = (
        torch.tensor([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corners])
        .float()
        .view(-1, 4)
    )
    top, left = draw(st.integers(0, 39)), draw(st.integers(0, 39))
    return boxes, (top, left, draw(st.integers(1, 40 - top)), draw(st.integers(1, 40 - left)))


@settings(deadline=None)
@given(boxes_and_window())
def test_crop_keeps_what_is_inside(case: tuple[Tensor, tuple[int, int, int, int]]) -> None:
    boxes, (top, left, height, width) = case
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    _, moved, labels = crop(image, boxes, torch.arange(len(boxes)), (top, left, height, width))
    assert (moved[:, :2] >= 0).all()
    assert (moved[:, 2:] <= torch.tensor([width, height])).all()
    back = moved + torch.tensor([left, top, left, top])
    own = boxes[labels]
    assert (back[:, :2] >= own[:, :2]).all()
    assert (back[:, 2:] <= own[:, 2:]).all()
    meets = [
        i
        for i, (x1, y1, x2, y2) in enumerate(boxes.tolist())
        if min(x2, left + width) > max(x1, left) and min(y2, top + height) > max(y1, top)
    ]
    assert labels.tolist() == meets


@settings(deadline=None)
@given(boxes_and_window())
def test_flips_are_their_own_inverse(case: tuple[Tensor, tuple[int, int, int, int]]) -> None:
    boxes, _ = case
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    for flip in (horizontal_flip, vertical_flip):
        twice = flip(*flip(image, boxes))
        torch.testing.assert_close(twice[0], image)
        torch.testing.assert_close(twice[1], boxes)


def test_zoom_range() -> None:
    """The objects' magnification is what `zoom` says;
    a zoomed-out image lies on the mean colour.
    """
    image, boxes = painted(100, 100, (40, 40, 60, 60)), torch.tensor([[40.0, 40, 60, 60]])
    transform = train_transform("fixed", (100, 100), zoom=(0.5, 2.0), jitter=0.0)
    torch.manual_seed(0)
    seen = []
    for _ in range(200):
        out, moved, _ = transform(image, boxes, torch.tensor([0]))
        inside = len(moved) and bool(((moved > 0) & (moved < 100)).all())
        if inside:
            seen.append(float(moved[0, 2] - moved[0, 0]) / 20)
        if inside and seen[-1] < 0.9:
            around = (
                (out == torch.tensor(MEAN_COLOUR, dtype=torch.uint8).view(3, 1, 1))
                .all(0)
                .float()
                .mean()
            )
            assert float(around) == pytest.approx(1 - seen[-1] ** 2, abs=0.03)
    assert 0.5 <= min(seen) < 0.6
    assert 1.7 < max(seen) <= 2.01
    for same in (
        train_transform("fixed", (100, 100), zoom=(1.0, 1.0), jitter=0.0, hflip=0.0),
        Resize((100, 100)),
    ):
        torch.testing.assert_close(same(image, boxes, torch.tensor([0]))[0], image)


def test_colour_jitter_against_colour_by_colour() -> None:
    image = torch.randint(40, 200, (3, 9, 11), dtype=torch.uint8)
    torch.testing.assert_close(colour_jitter(image, 0.0), image)
    torch.manual_seed(1)
    out = colour_jitter(image, 0.3)
    assert (out != image).any()
    torch.manual_seed(1)
    assert torch.equal(out, colour_jitter(image, 0.3))
    # The same four in turn, in floats.
    torch.manual_seed(1)
    brightness, contrast, saturation = (0.7 + 0.6 * float(torch.rand(())) for _ in range(3))
    angle = torch.tensor((-0.3 + 0.6 * float(torch.rand(()))) * torch.pi / 5)
    axis = torch.ones(3) / 3**0.5
    x = image.permute(1, 2, 0).float()
    along = (x @ axis)[..., None] * axis
    x = (
        x * angle.cos()
        + torch.linalg.cross(axis.expand_as(x), x) * angle.sin()
        + along * (1 - angle.cos())
    )
    weights = torch.tensor([0.299, 0.587, 0.114])
    x = brightness * (saturation * x + (1 - saturation) * (x @ weights)[..., None])
    x = contrast * x + (1 - contrast) * (x @ weights).mean()
    torch.testing.assert_close(
        out.permute(1, 2, 0).float(), x.round().clamp(0, 255), atol=1, rtol=0
    )


def test_colour_jitter_does_not_depend_on_threads() -> None:
    image = torch.randint(0, 256, (3, 301, 407), dtype=torch.uint8)
    threads, outs = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            torch.manual_seed(0)
            outs.append(colour_jitter(image, 0.5))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outs)


@pytest.mark.parametrize("size", [(192, 256), (256, 192)])
def test_a_portrait_gets_as_many_pixels_as_a_landscape(size: tuple[int, int]) -> None:
    turned, plain = (eval_transform(size, match_orientation=match) for match in (True, False))
    assert turned.target(504, 378) == turned.target(378, 504)[::-1] == (256, 192)
    assert turned.target(400, 400) == (192, 192)
    assert (turned.pad_to, plain.pad_to) == (None, size)
    assert plain.target(504, 378)[::-1] != plain.target(378, 504)
    stretched = eval_transform(size, match_orientation=True, keep_aspect=False)
    assert stretched.target(500, 100) == (256, 192)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"policy": "detr", "size": (10, 20)}, "fixed"),
        ({"policy": "fixed", "size": 100}, "height"),
        ({"policy": "detr", "size": 100, "zoom": (0.5, 1.0)}, "zoom"),
        ({"policy": "fixed", "size": (9, 9), "zoom": (1.0, 0.5)}, "magnification"),
        ({"policy": "fixed", "size": (9, 9), "hflip": 1.5}, "hflip"),
        ({"policy": "none", "size": 0}, "positive"),
        ({"policy": "detr", "size": -3}, "positive"),
        ({"policy": "cutmix", "size": 100}, "cutmix"),
    ],
)
def test_impossible_dials_are_refused(arguments: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        train_transform(**arguments)  # type: ignore[arg-type]


def test_recipes_hand_the_orientation_on() -> None:
    data = DataConfig(size=(192, 256), match_orientation=True, augment="fixed")
    for transform in (
        train_transform(**data.usual()),
        eval_transform(data.size, **data.resizing()),
    ):
        image, nothing = torch.zeros(3, 504, 378, dtype=torch.uint8), torch.zeros(0, 4)
        assert transform(image, nothing, torch.zeros(0).long())[0].shape == (3, 256, 192)
