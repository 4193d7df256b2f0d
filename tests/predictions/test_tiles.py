from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import detrellis
from detrellis.errors import UserError
from detrellis.predictions.model import Model
from detrellis.predictions.tiles import Tiling, Window, merged
from detrellis.rle import decode, encode, placed
from detrellis.types import Detections

from .conftest import picture, save


def test_tiles_cover_the_picture_and_overlap() -> None:
    tiles = Tiling(64, 0.25, full=False).windows(100, 200)
    assert tiles[:3] == [Window(0, 0, 64, 64), Window(48, 0, 112, 64), Window(96, 0, 160, 64)]
    assert tiles[-1] == Window(136, 36, 200, 100)
    covered = np.zeros((100, 200), dtype=int)
    for left, top, right, bottom in tiles:
        assert (right - left, bottom - top) == (64, 64)
        covered[top:bottom, left:right] += 1
    assert covered.min() == 1
    assert Tiling(64).windows(50, 40) == [Window(0, 0, 40, 50)]  # no second view of the same
    assert Tiling(64).windows(64, 65) == [
        Window(0, 0, 64, 64),
        Window(1, 0, 65, 64),
        Window(0, 0, 65, 64),
    ]
    for wrong in ({"size": 8}, {"size": 640, "overlap": 0.95}, {"size": 640, "overlap": -0.1}):
        with pytest.raises(UserError, match="tiles"):
            Tiling(**wrong)


def found(
    *rows: tuple[float, int, list[float]], masks: tuple[bytes, ...] | None = None
) -> Detections:
    """Of (score, label, box), best first."""
    scores, labels, boxes = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(
        torch.tensor(scores), torch.tensor(labels).long(), torch.tensor(boxes).reshape(-1, 4), masks
    )


def test_parts_go_for_the_whole_and_neighbours_in_one_tile_stay() -> None:
    left, right, whole = Window(0, 0, 100, 100), Window(60, 0, 160, 100), Window(0, 0, 160, 100)
    tiles = [
        # An object at 70 to 120: cut here; two that overlap, and one of another class.
        (
            left,
            found(
                (0.9, 0, [70, 10, 100, 60]), (0.8, 0, [10, 10, 40, 40]), (0.7, 0, [12, 10, 42, 40])
            ),
        ),
        (right, found((0.6, 0, [10, 10, 60, 60]), (0.5, 1, [10, 12, 60, 60]))),
        # The two again, worse; a small one within the large one, which stays.
        (whole, found((0.4, 0, [11, 10, 41, 40]), (0.3, 0, [90, 30, 100, 40]))),
    ]
    kept = merged(tiles, (100, 160), 0.5)
    assert kept.scores.tolist() == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.3])
    assert kept.boxes[2].tolist() == [70, 10, 120, 60]
    assert merged(tiles, (100, 160), 0.5, k=2).scores.tolist() == pytest.approx([0.8, 0.7])
    # At the picture's own border nothing is cut, and a part without a whole stays.
    kept = merged(
        [(left, found((0.5, 0, [0, 80, 30, 100]))), (right, found((0.6, 0, [0, 0, 20, 20])))],
        (100, 160),
        0.5,
    )
    assert len(kept.scores) == 2
    assert merged([(left, found())], (100, 160), 0.5).boxes.shape == (0, 4)


def test_masks_are_placed_in_the_picture() -> None:
    generator = np.random.default_rng(0)
    for height, width, top, left in ((7, 5, 0, 0), (7, 5, 3, 4), (10, 5, 0, 2), (10, 9, 0, 0)):
        for mask in (
            generator.random((height, width)) < 0.6,
            np.ones((height, width), bool),
            np.zeros((height, width), bool),
        ):
            want = np.zeros((10, 9), dtype=bool)
            want[top : top + height, left : left + width] = mask
            runs = placed(encode(mask), (height, width), (top, left), (10, 9))
            assert np.array_equal(decode(runs, (10, 9)), want)
            assert runs == encode(want)
    mask = generator.random((20, 20)) < 0.5
    part = found((0.5, 0, [1, 1, 9, 9]), masks=(encode(mask),))
    (runs,) = merged([(Window(10, 5, 30, 25), part)], (40, 40), 0.5).masks or ()
    assert np.array_equal(decode(runs, (40, 40))[5:25, 10:30], mask)


def test_a_picture_that_fits_into_a_tile_is_looked_at_as_ever(model: Model) -> None:
    plain = model.predict(picture(), threshold=0)[0]
    tiled = model.predict(picture(), threshold=0, tiles=64)[0]
    assert tiled == plain


def test_tiles_of_large_pictures_go_in_batches(model: Model, tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.png", seed=i, height=90, width=150) for i in range(2)]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    seen: list[int] = []
    hook = model.detector.register_forward_pre_hook(
        lambda _, args: seen.append(len(args[0].pixels))
    )
    one = model.predict([*paths, broken], threshold=0.0, tiles=Tiling(64, 0.2), on_error="skip")
    many = model.predict(paths, threshold=0.0, tiles=Tiling(64, 0.2), batch_size=4)
    hook.remove()
    assert seen == [1] * 14 + [4, 2, 1] * 2  # two rows of three tiles, and the whole
    assert len(one) == 2
    assert len(one.failures) == 1
    for each, other in zip(one, many, strict=True):
        assert each.size == (90, 150)
        torch.testing.assert_close(
            torch.tensor(each.scores), torch.tensor(other.scores), atol=1e-5, rtol=1e-4
        )
        assert torch.tensor(each.boxes).amax(0)[0] > 64
    with pytest.raises(UserError, match="both views"):
        model.predict(paths, tiles=64, tta=True)


def test_evaluation_in_tiles(run: Path, tmp_path: Path) -> None:
    paths = [save(tmp_path / "pictures" / f"{i}.png", seed=i) for i in range(2)]
    detrellis.predict(run, paths, threshold=0.0, out=tmp_path / "out", format="coco")
    on = {"data": tmp_path / "out" / "coco", "workers": 0, "skip_bad": "boxes"}
    plain, tiled = detrellis.evaluate(run, **on), detrellis.evaluate(run, **on, tiles=64)
    assert plain.ap == tiled.ap
    assert plain.ap > 0.1
    assert detrellis.evaluate(run, **on, tiles=32).ap != plain.ap
    everything = {"threshold": 0.0, "tiles": 32}
    given = sum(len(found.boxes) for found in detrellis.predict(run, paths, **everything))
    assert detrellis.evaluate(run, **on, tiles=32).detections == given > plain.detections
    with pytest.raises(UserError, match="without masks"):
        detrellis.evaluate(run, **on, tiles=64, metric="masks")
