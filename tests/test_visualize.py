from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detrellis.outputs import jpeg
from detrellis.visualize import detections, fonts
from detrellis.visualize.colours import BACKGROUND, BAR, PALETTE, colour_of, ink_on
from detrellis.visualize.detections import draw_detections
from detrellis.visualize.sheets import contact_sheet
from detrellis.visualize.tags import Rectangle, Tag, place_tags, style_of

GREY = (128, 128, 128)
NAMES = ["cat", "dog", "bird"]


def plain(width: int = 800, height: int = 600) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def colours(
    image: Image.Image, box: tuple[int, int, int, int] | None = None
) -> set[tuple[int, int, int]]:
    part = image if box is None else image.crop(box)
    return {tuple(row) for row in np.asarray(part).reshape(-1, 3).tolist()}


def tags(
    boxes: list[Rectangle],
    labels: list[int],
    scores: list[float] | None,
    size: tuple[int, int] = (800, 600),
) -> list[Tag]:
    marks = detections._marks(boxes, labels, scores, NAMES)
    return place_tags(marks, style_of(marks, size, None), size)


def shared(a: Rectangle, b: Rectangle) -> float:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    def luminance(colour: tuple[int, int, int]) -> float:
        c = np.array(colour) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    high, low = sorted([luminance(a), luminance(b)], reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_box_tag_and_legend_have_the_class_colour() -> None:
    picture = draw_detections(plain(), [[200, 200, 400, 400]], [1], [0.9], NAMES)
    dog = colour_of(1)
    for x, y in ((200, 300), (400, 300), (300, 200), (300, 400)):  # the four edges
        assert picture.getpixel((x, y)) == dog
    assert picture.getpixel((300, 300)) == GREY  # the object is not painted over
    assert (0, 0, 0) in colours(picture, (200, 170, 280, 200))  # ink in the tag above the corner
    legend = picture.crop((0, 600, 800, picture.height))
    assert {dog, BACKGROUND} < colours(legend)
    assert colour_of(0) not in colours(picture)


def test_the_given_image_is_not_changed() -> None:
    image = plain()
    draw_detections(image, [[10, 10, 100, 100]], [0], [0.5], NAMES)
    assert colours(image) == {GREY}


def test_without_boxes_only_the_image_is_left() -> None:
    assert draw_detections(plain(), [], [], [], NAMES).tobytes() == plain().tobytes()
    assert draw_detections(plain(), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).size == (
        800,
        600,
    )


def test_without_legend_the_size_stays() -> None:
    boxes, labels = [[10, 10, 100, 100]], [0]
    assert draw_detections(plain(), boxes, labels, None, NAMES, legend=False).size == (800, 600)
    assert draw_detections(plain(), boxes, labels, None, NAMES).height > 600


def test_tensors_arrays_and_lists_give_the_same_picture() -> None:
    boxes, labels, scores = [[10.5, 10, 100, 100], [200, 50, 300, 400]], [0, 2], [0.5, 0.25]
    want = draw_detections(plain(), boxes, labels, scores, NAMES).tobytes()
    assert (
        draw_detections(
            plain(), np.array(boxes), np.array(labels), np.array(scores), NAMES
        ).tobytes()
        == want
    )
    tensors = (
        torch.tensor(boxes, requires_grad=True),
        torch.tensor(labels),
        torch.tensor(scores).bfloat16(),
    )
    assert draw_detections(plain(), *tensors, NAMES).tobytes() == want


def test_lengths_must_agree() -> None:
    with pytest.raises(AssertionError, match="1 boxes and 2 labels"):
        draw_detections(plain(), [[0, 0, 1, 1]], [1, 2])
    with pytest.raises(AssertionError, match="1 boxes and 2 scores"):
        draw_detections(plain(), [[0, 0, 1, 1]], [1], [0.5, 0.5])


@pytest.mark.parametrize(
    ("size", "want"), [((64, 48), (640, 480)), ((30, 60), (320, 640)), ((900, 700), (900, 700))]
)
def test_small_images_are_enlarged_with_their_boxes(
    size: tuple[int, int], want: tuple[int, int]
) -> None:
    width, height = size
    box = [width / 4, height / 4, width / 2, height / 2]
    picture = draw_detections(plain(*size), [box], [0], [0.5], NAMES, legend=False)
    assert picture.size == want
    assert picture.getpixel((want[0] // 4, want[1] * 3 // 8)) == colour_of(0)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "LA"])
def test_every_mode_of_image(mode: str) -> None:
    picture = draw_detections(plain().convert(mode), [[200, 200, 400, 400]], [1], [0.9], NAMES)
    assert picture.mode == "RGB"
    assert picture.getpixel((200, 300)) == colour_of(1)


def test_boxes_outside_or_not_finite_are_left_out_and_others_cut_at_the_frame() -> None:
    odd = [
        [900, 10, 950, 40],
        [-50, -50, -10, -10],
        [float("nan"), 0, 5, 5],
        [0, 0, float("inf"), 5],
    ]
    assert draw_detections(plain(), odd, [0] * 4, [0.9] * 4, NAMES).tobytes() == plain().tobytes()
    picture = draw_detections(plain(), [[-100, -100, 2000, 2000]], [0], [0.9], NAMES, legend=False)
    assert all(
        picture.getpixel(p) == colour_of(0) for p in ((799, 300), (0, 300), (400, 599), (400, 0))
    )


def test_a_box_of_one_pixel_or_turned_around_is_drawn() -> None:
    picture = draw_detections(
        plain(), [[300, 300, 300, 300], [500, 400, 450, 350]], [0, 1], None, NAMES, legend=False
    )
    assert picture.getpixel((300, 300)) == colour_of(0)
    assert picture.getpixel((450, 375)) == colour_of(1)


def test_a_small_box_lies_on_top_of_a_large_one() -> None:
    boxes = [[100, 100, 600, 500], [100, 100, 120, 120]]
    for order in ([0, 1], [1, 0]):
        picture = draw_detections(
            plain(), [boxes[i] for i in order], order, None, NAMES, legend=False
        )
        assert picture.getpixel((100, 110)) == colour_of(1)
        assert picture.getpixel((100, 400)) == colour_of(0)


def test_colours_depend_on_the_class_alone_and_are_apart() -> None:
    first = [colour_of(i) for i in range(len(PALETTE))]
    distances = [np.abs(np.subtract(a, b)).sum() for a, b in itertools.combinations(first, 2)]
    assert min(distances) > 60
    assert len({colour_of(i) for i in range(4 * len(PALETTE))}) == 4 * len(PALETTE)
    boxes = [[200, 200, 400, 400], [450, 200, 600, 400]]
    alone = draw_detections(plain(), boxes[1:], [2], [0.9], NAMES)
    both = draw_detections(plain(), boxes, [0, 2], [0.9, 0.3], NAMES)
    assert alone.getpixel((450, 300)) == both.getpixel((450, 300)) == colour_of(2)


def test_ink_can_be_read_on_every_class_colour() -> None:
    inks = set()
    for label in range(200):
        inks.add(ink_on(colour_of(label)))
        assert contrast(ink_on(colour_of(label)), colour_of(label)) >= 4.5
    assert inks == {(0, 0, 0), (255, 255, 255)}


def test_a_tag_sits_on_its_boxs_corner() -> None:
    (tag,) = tags([(200, 200, 400, 400)], [1], [0.876])
    assert tag.text == "dog 0.88"
    assert (tag.box[0], tag.box[3]) == (200, 200)
    (tag,) = tags([(200, 5, 400, 400)], [1], None)  # no room above
    assert tag.text == "dog"
    assert tag.box[:2] == (200, 0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 60))
def test_tags_stay_in_the_frame_and_hardly_cover_each_other(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    centre, half = rng.uniform(0, 1, (count, 2)) * [800, 600], rng.uniform(5, 80, (count, 2))
    corners = np.concatenate([centre - half, centre + half], 1).clip(0, [799, 599, 799, 599])
    boxes: list[Rectangle] = [(x1, y1, x2, y2) for x1, y1, x2, y2 in corners.tolist()]
    placed = tags(boxes, rng.integers(0, 3, count).tolist(), rng.random(count).tolist())
    for tag in placed:
        assert min(tag.box) >= 0
        assert tag.box[2] <= 800
        assert tag.box[3] <= 600
    for a, b in itertools.combinations(placed, 2):
        assert shared(a.box, b.box) <= 0.11 * max(
            (t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) for t in (a, b)
        )


def test_where_there_is_room_no_tag_covers_another() -> None:
    # Nearly the same box
    boxes: list[Rectangle] = [(100.0 + 3 * i, 300, 200.0 + 3 * i, 400) for i in range(5)]
    placed = tags(boxes, [0] * 5, [0.9, 0.8, 0.7, 0.6, 0.5])
    assert sorted(t.text for t in placed) == [f"cat 0.{i}0" for i in (5, 6, 7, 8, 9)]
    assert all(shared(a.box, b.box) < 1 for a, b in itertools.combinations(placed, 2))


def test_where_there_is_no_room_the_best_scores_have_tags() -> None:
    boxes: list[Rectangle] = [(300, 300, 320, 320)] * 200
    scores = np.random.default_rng(0).random(200).tolist()
    placed = tags(boxes, [0] * 200, scores)
    assert 4 <= len(placed) < 30
    assert f"{max(scores):.2f}".removeprefix("0") in [t.text for t in placed]


def grid(count: int, side: float) -> list[Rectangle]:
    places = itertools.product(range(12), range(10))
    return [
        (60.0 * x + 20, 55.0 * y + 20, 60.0 * x + 20 + side, 55.0 * y + 20 + side)
        for x, y in places
    ][:count]


def test_a_crowd_has_thinner_lines_and_shorter_tags() -> None:
    few, many = grid(5, 20), grid(110, 20)
    looks = [
        style_of(detections._marks(b, [0] * len(b), [0.5] * len(b), NAMES), (800, 600), None)
        for b in (few, many)
    ]
    assert [look.line for look in looks] == [4, 2]
    assert looks[0].font.size > looks[1].font.size >= 11
    assert {t.text for t in tags(few, [0] * 5, [0.5] * 5)} == {"cat 0.50"}
    placed = tags(many, [0] * 110, [0.5] * 110)
    assert {t.text for t in placed} == {".50"}
    assert len(placed) == 110
    assert tags(many, [7] * 110, None) == []  # ground truth: the colours and the legend say it
    large: list[Rectangle] = [*many, (10, 10, 700, 590)]
    texts = {t.text for t in tags(large, [0] * 110 + [1], [0.5] * 110 + [0.75])}
    assert texts == {".50", "dog 0.75"}  # a large box has room for its name


@pytest.mark.parametrize(
    ("size", "want"), [((3, 900), (160, 900)), ((900, 3), (900, 160)), ((1, 1), (640, 640))]
)
def test_a_strip_has_room_for_its_tags(size: tuple[int, int], want: tuple[int, int]) -> None:
    picture = draw_detections(plain(*size), [[0, 0, *size]], [1], [0.9], NAMES, legend=False)
    assert picture.size == want
    # The tag, and not the frame alone
    assert (np.asarray(picture) == colour_of(1)).all(2).sum() > 300
    assert draw_detections(plain(*size), [], [], [], NAMES, min_side=1).size == size


def test_a_picture_that_no_jpeg_can_hold_is_made_smaller() -> None:
    with Image.open(io.BytesIO(jpeg(Image.new("RGB", (70_000, 20))))) as picture:
        assert picture.size == (65_500, 19)


def test_tags_and_lines_grow_with_the_picture() -> None:
    looks = [
        style_of(detections._marks([[0, 0, 9, 9]], [0], [0.5], NAMES), size, None)
        for size in ((640, 480), (2560, 1920))
    ]
    assert looks[1].font.size == pytest.approx(4 * looks[0].font.size, rel=0.1)
    assert looks[1].line == 4 * looks[0].line


def test_the_legend_wraps_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    original = fonts.shortened
    monkeypatch.setattr(
        detections,
        "shortened",
        lambda text, *rest: (written.append(text), original(text, *rest))[1],
    )
    names = [f"class with a long name {i}" for i in range(30)]
    boxes = [[10 * i, 50, 10 * i + 8, 90] for i in range(30)] + [[500, 300, 600, 400]]
    picture = draw_detections(plain(), boxes, [*range(30), 3], None, names)
    assert picture.height - 600 > 100
    assert written == [f"{n} ({2 if i == 3 else 1})" for i, n in enumerate(names)]
    strip = picture.crop((0, 600, 800, picture.height))
    assert {colour_of(i) for i in range(30)} <= colours(strip)
    edge = np.asarray(strip)[:, -2:]
    assert (edge == BACKGROUND).all()  # nothing runs out of the picture


def test_names_that_are_missing_long_broken_or_foreign() -> None:
    boxes = [[20, 100, 120, 200], [200, 100, 300, 200], [400, 100, 500, 200], [600, 100, 700, 200]]
    names = ["two\nlines", "x" * 200, "Größe 血小板", " "]
    for labels in ([0, 1, 2, 3], [4, -1, 99, 0]):
        assert draw_detections(plain(), boxes, labels, [0.5] * 4, names).width == 800
    (tag,) = tags([(200, 200, 400, 400)], [7], [0.5])
    assert tag.text == "class 7 0.50"


def test_letters_that_no_font_has_are_not_drawn_as_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "FONTS", ())
    fonts.font_name.cache_clear()
    assert fonts.writable("Éléphant", None) == "Elephant"
    assert fonts.writable("血小板", None, "class 2") == "class 2"
    assert fonts.writable("a\n b", None) == "a b"
    # Not what 白血球 cell is called too
    assert fonts.writable("赤血球 cell", None, "class 0") == "class 0 cell"
    assert fonts.font_name(frozenset("é")) is None
    fonts.font_name.cache_clear()


def test_the_font_with_most_of_the_letters_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {
        None: frozenset("éß"),
        "a.ttf": frozenset("ß"),
        "b.ttf": frozenset(),
        "c.ttf": frozenset(),
    }
    monkeypatch.setattr(fonts, "missing", lambda name, letters: lacking[name] & letters)
    monkeypatch.setattr(fonts, "FONTS", ("a.ttf", "b.ttf", "c.ttf"))
    fonts.font_name.cache_clear()
    assert fonts.font_name(frozenset("abc")) is None
    assert fonts.font_name(frozenset("é")) == "a.ttf"
    assert fonts.font_name(frozenset("éß")) == "b.ttf"
    fonts.font_name.cache_clear()


def test_a_font_that_is_not_installed_has_no_letter() -> None:
    assert fonts.missing("no such font.ttf", frozenset("a")) == frozenset("a")
    assert fonts.missing(None, frozenset("abc XYZ 0.9")) == frozenset()
    assert fonts.missing(None, frozenset("a血")) == frozenset("血")


def test_a_sheet_holds_every_picture_whole() -> None:
    pictures = [
        Image.new("RGB", size, colour_of(i))
        for i, size in enumerate([(300, 200), (200, 300), (100, 100), (50, 9)])
    ]
    sheet = contact_sheet(pictures, 3, cell=150)
    counted = np.asarray(sheet).reshape(-1, 3)
    for i, size in enumerate([(150, 100), (100, 150), (150, 150), (150, 27)]):
        assert (counted == colour_of(i)).all(1).sum() == size[0] * size[1]
    assert sheet.width < 3 * 150 + 4 * 8
    assert colours(sheet) == {BACKGROUND, *(colour_of(i) for i in range(4))}
    rows = [int(np.argwhere((np.asarray(sheet) == colour_of(i)).all(2))[0][0]) for i in range(4)]
    assert rows == [4, 4, 4, 4 + 150 + 4]


def test_a_sheet_of_nothing_and_of_one() -> None:
    assert contact_sheet([], cell=100).size == (100, 100)
    assert colour_of(0) in colours(
        contact_sheet(
            [Image.new("L", (10, 10)).convert("RGB"), Image.new("RGB", (9, 9), colour_of(0))]
        )
    )


def test_titles_stand_above_their_pictures() -> None:
    truth, prediction = (Image.new("RGB", (200, 100), colour_of(i)) for i in (0, 1))
    sheet = contact_sheet([truth, prediction], 2, ("ground truth", "predicted"), cell=200)
    pixels = np.asarray(sheet)
    places = [np.argwhere((pixels == colour_of(i)).all(2)) for i in (0, 1)]
    assert places[0][:, 1].max() < places[1][:, 1].min()  # truth is on the left
    for place in places:
        (top, left), right = place.min(0), place[:, 1].max()
        bar = pixels[:top, left : right + 1]
        assert (bar == BAR).all(2).any()
        assert (bar.astype(int).min(2) > 200).sum() > 20  # ink
    with pytest.raises(AssertionError, match="1 titles for 2 images"):
        contact_sheet([truth, prediction], titles=["one"])


def test_torch_is_not_needed() -> None:
    files = list(Path(detections.__file__).parent.glob("*.py"))
    assert len(files) > 1
    assert not [file.name for file in files if "import torch" in file.read_text()]
