"""Test-time augmentation: views of an image, and what is detected in all of them."""

from __future__ import annotations

import pytest
import torch

from detrellis.data.classes import ClassMap
from detrellis.engine.views import Views, read_views
from detrellis.errors import UserError
from detrellis.predictions.model import Model
from detrellis.recipes.build import build
from detrellis.types import Detections

from ..small import small

SIZE = (64, 96)
NAMES = ClassMap((0, 1), ("a", "b"))


def model(name: str = "tiny") -> Model:
    recipe = small(name).override("data.size=64" if name == "tiny" else "data.size=[64, 96]")
    detector = build(recipe.override("data.augment=none"), 2, seed=0).detector.eval()
    return Model(detector, recipe, NAMES, torch.device("cpu"))


def picture(height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randint(
        256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def found(*rows: tuple[float, int, list[float]]) -> Detections:
    scores, labels, boxes = zip(*rows, strict=True)
    return Detections(torch.tensor(scores), torch.tensor(labels), torch.tensor(boxes))


def views(text: str) -> Views:
    made = read_views(text, model().recipe.data)
    assert made is not None
    return made


def test_what_words_ask_for() -> None:
    data = model().recipe.data
    assert [(v.resize.size, v.mirrored) for v in views("48, 80,flip").views] == [
        (48, False),
        (48, True),
        (80, False),
        (80, True),
    ]
    assert (views("flip,wbf").merge, len(views("flip,wbf").views)) == ("wbf", 2)
    assert [v.resize.size for v in views("auto").views[::2]] == [51, 64, 77]
    assert read_views(True, data) == views("auto")
    fixed = read_views("128", small("tiny").override("data.size=[64, 96]").data)
    assert fixed is not None
    assert fixed.views[0].resize.size == (128, 192)
    for wrong in ("640,flop", "8", "", "flip,nms,wbf"):
        with pytest.raises(UserError, match="--tta-views"):
            read_views(wrong, data)
    with pytest.raises(UserError, match="--nms and --tta"):
        read_views(True, data, 0.7)


def test_one_plain_view_is_none_and_changes_no_bit() -> None:
    tried = model()
    plain, viewed = (tried.predict(picture(), threshold=0.0, tta=tta)[0] for tta in (False, "64"))
    assert (plain.scores, plain.boxes, plain.labels) == (viewed.scores, viewed.boxes, viewed.labels)


def test_a_mirrored_picture_has_mirrored_detections() -> None:
    """In both views alike, so that which of them is the picture's own does not matter."""
    tried = model()
    one, other = (
        tried.predict(p, threshold=0.0, tta="64,flip")[0] for p in (picture(), picture().flip(-1))
    )
    torch.testing.assert_close(
        torch.tensor(one.scores), torch.tensor(other.scores), atol=1e-5, rtol=0
    )
    boxes = torch.tensor(other.boxes)
    back = torch.stack([96 - boxes[:, 2], boxes[:, 1], 96 - boxes[:, 0], boxes[:, 3]], dim=1)
    torch.testing.assert_close(torch.tensor(one.boxes), back, atol=1e-3, rtol=0)
    assert len(one.scores) > 0


def test_pictures_of_several_sizes_in_batches_are_as_one_by_one() -> None:
    tried, pictures = model(), [picture(), picture(96, 64), picture()]
    together = tried.predict(pictures, threshold=0.0, tta="48,64,flip", batch_size=2)
    for a, b in zip(
        together,
        [tried.predict(p, threshold=0.0, tta="48,64,flip")[0] for p in pictures],
        strict=True,
    ):
        torch.testing.assert_close(
            torch.tensor(a.scores), torch.tensor(b.scores), atol=1e-5, rtol=0
        )


def test_what_others_found_too_is_lowered_dropped_or_averaged() -> None:
    box, near, far = [0.0, 0.0, 40.0, 40.0], [0.0, 0.0, 40.0, 38.0], [50.0, 10.0, 60.0, 20.0]
    parts = [found((0.9, 0, box), (0.4, 1, box)), found((0.6, 0, near), (0.5, 0, far))]
    soft = views("64,flip").merged(parts, SIZE, 10)
    assert soft.labels.tolist() == [0, 0, 1, 0]
    torch.testing.assert_close(soft.scores, torch.tensor([0.9, 0.5, 0.4, 0.6 * 0.05]))
    hard = views("64,flip,nms").merged(parts, SIZE, 2)
    torch.testing.assert_close(hard.scores, torch.tensor([0.9, 0.5]))
    mean = views("64,flip,wbf").merged(parts, SIZE, 10)
    torch.testing.assert_close(mean.scores, torch.tensor([0.75, 0.25, 0.2]))
    torch.testing.assert_close(
        mean.boxes[0], torch.tensor([0.0, 0.0, 40.0, (0.9 * 40 + 0.6 * 38) / 1.5])
    )
    assert (
        len(
            views("64,flip,wbf")
            .merged([part.take(torch.arange(0)) for part in parts], SIZE, 10)
            .scores
        )
        == 0
    )


def test_masks_are_not_merged() -> None:
    with pytest.raises(UserError, match="gives masks"):
        model("mask2former_r50").predict(picture(), tta=True)
