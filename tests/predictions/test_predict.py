from __future__ import annotations

import copy
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import detrellis
from detrellis.cli import app
from detrellis.cli.predict import names_below
from detrellis.data.files import below_common_folder
from detrellis.errors import UserError
from detrellis.predictions.model import Model
from detrellis.predictions.record import BrokenPictures, Prediction

from .conftest import CLASSES, picture, save


def alike(one: Prediction, other: Prediction) -> None:
    torch.testing.assert_close(
        torch.tensor(one.boxes), torch.tensor(other.boxes), atol=1e-3, rtol=1e-4
    )
    torch.testing.assert_close(
        torch.tensor(one.scores), torch.tensor(other.scores), atol=1e-5, rtol=1e-4
    )


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit | UserError), (
        result.exception
    )
    return result.exit_code, result.stdout, result.stderr


def interrupt(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Ctrl-C at the nth picture, counted from 1."""
    detect, numbers = Model._forward, itertools.count(1)

    def interrupted(*arguments: object) -> object:
        if next(numbers) == nth:
            raise KeyboardInterrupt
        return detect(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "_forward", interrupted)


def test_files_arrays_and_tensors_find_the_same(model: Model, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    array = picture()
    mixed = [path, array, Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1) / 255]
    found = model.predict(mixed, threshold=0)
    assert [p.path for p in found] == [path, None, None, None]
    assert len(found[0].scores) > 5
    for other in found[1:]:
        assert (other.boxes, other.scores) == (found[0].boxes, found[0].scores)
    assert np.array_equal(found[1].draw(CLASSES.names), found[0].draw(CLASSES.names))
    assert found[1].to_coco(1)[0]["file_name"] is None


@pytest.mark.parametrize("size", [2, 5])
def test_batches_change_nothing(model: Model, size: int) -> None:
    sides = [(40, 64), (64, 40), (40, 64), (50, 50), (40, 64), (64, 40), (80, 128), (40, 64)]
    pictures = [picture(*side, seed=i) for i, side in enumerate(sides)]
    one_by_one = model.predict(pictures, threshold=0)
    seen: list[int] = []
    hook = model.detector.register_forward_pre_hook(
        lambda _, args: seen.append(len(args[0].pixels))
    )
    batched = model.predict(pictures, threshold=0, batch_size=size)
    hook.remove()
    assert max(seen) > 1
    assert sum(seen) == len(pictures)
    for one, other in zip(one_by_one, batched, strict=True):
        assert one.size == other.size
        alike(one, other)


def test_the_detector_is_asked_in_evaluation_mode_and_left_as_it_was(model: Model) -> None:
    want = model.predict(picture(), threshold=0)[0]
    buffers = {name: value.clone() for name, value in model.detector.named_buffers()}
    model.detector.train()
    model.detector.neck.eval()
    modes = [part.training for part in model.detector.modules()]
    try:
        found = model.predict(picture(), threshold=0)[0]
        assert [part.training for part in model.detector.modules()] == modes
        hook = model.detector.decoder.register_forward_pre_hook(lambda *_: {}["mid-way"])
        with pytest.raises(KeyError):
            model.predict(picture())
        hook.remove()
        assert [part.training for part in model.detector.modules()] == modes
    finally:
        model.detector.eval()
    assert found == want
    assert all(torch.equal(value, buffers[name]) for name, value in model.detector.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_precision_is_the_detectors(model: Model, dtype: torch.dtype) -> None:
    want = model.predict(picture(), threshold=0)[0]
    other = copy.deepcopy(model)
    other.detector.to(dtype)
    found = other.predict(picture(), threshold=0)[0]
    assert {p.dtype for p in other.detector.parameters()} == {dtype}
    if dtype == torch.float64:
        alike(found, want)
    assert found.scores == pytest.approx(want.scores, abs=0.02)


def test_a_broken_picture_does_not_stop_the_others(model: Model, tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / f"{name}.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:200])
    with pytest.raises(
        BrokenPictures, match=r"b\.jpg.*\n  Replace or re-export the file, or leave it out\."
    ) as raised:
        model.predict(tmp_path)
    assert [p.path.name for p in raised.value.predictions if p.path] == ["a.jpg", "c.jpg"]
    told: list[str] = []
    for how in ("skip", lambda failure: told.append(failure.path.name)):
        found = model.predict(tmp_path, on_error=how, batch_size=2)  # type: ignore[arg-type]
        assert ([f.path.name for f in found.failures], len(found)) == (["b.jpg"], 2)
    assert told == ["b.jpg"]
    stream = model.stream(tmp_path)
    next(stream)
    with pytest.raises(UserError, match=r"b\.jpg"):
        next(stream)


def test_the_command_names_it_and_keeps_the_rest(run: Path, tmp_path: Path) -> None:
    pics, out = tmp_path / "pics", tmp_path / "out"
    for name in ("a.png", "b.png", "sub/c.png"):
        save(pics / name)
    (pics / "b.png").write_bytes(b"")
    code, stdout, stderr = call(
        run, pics, "--recursive", "--out", out, "--threshold", 0, "--txt", "--json"
    )
    assert code == 1
    assert "b.png: the file is empty" in stderr
    assert "1 of 3 pictures could not be read" in stderr
    assert "check --fix" not in stderr  # which predict has not
    rows = json.loads(stdout)
    assert {Path(row["file_name"]).name for row in rows} == {"a.png", "c.png"}
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {
        ".detrellis.jsonl"
    }
    drawn = {"a.jpg", "sub/c.jpg", "labels/a.txt", "labels/sub/c.txt"}
    assert files == drawn | {"predictions.json", "classes.txt"}
    assert (out / "classes.txt").read_text().split() == ["cat", "dog", "bird"]
    label, *numbers = (out / "labels" / "a.txt").read_text().splitlines()[0].split()
    cx, cy, w, h, score = map(float, numbers)
    x, y, width, height = rows[0]["bbox"]
    assert CLASSES.ids[int(label)] == rows[0]["category_id"]
    assert [cx * 64, cy * 40, w * 64, h * 40] == pytest.approx(
        [x + width / 2, y + height / 2, width, height], abs=1e-4
    )
    assert score == pytest.approx(rows[0]["score"], abs=1e-6)


def test_predictions_are_written_also_after_ctrl_c(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcd":
        save(tmp_path / "pics" / f"{name}.png")
    interrupt(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        detrellis.predict(run, tmp_path / "pics", out=tmp_path / "out", threshold=0)
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert sorted({Path(row["file_name"]).name for row in rows}) == ["a.png", "b.png"]


def test_no_picture_of_the_users_is_drawn_over(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = save(tmp_path / "photo.jpg")
    save(tmp_path / "other.jpg")
    before = photo.read_bytes()
    monkeypatch.chdir(tmp_path)
    for what in (["photo.jpg"], ["."], ["*.jpg"]):
        with pytest.raises(UserError, match=r"photo\.jpg|other\.jpg"):
            detrellis.predict(run, what, out=".")
    save(tmp_path / "x.png")
    (tmp_path / "out" / "labels").mkdir(parents=True)
    (tmp_path / "out" / "labels" / "x.txt").write_text("")
    with pytest.raises(UserError, match=r"labels/x\.txt: is there already"):
        detrellis.predict(run, "x.png", out="out", txt=True)
    assert photo.read_bytes() == before
    for _ in range(2):  # its own may be replaced
        detrellis.predict(run, ["photo.jpg", "other.jpg"], out="drawn")
    with pytest.raises(UserError, match="an input"):
        detrellis.predict(run, "drawn/photo.jpg", out="drawn")


def test_what_was_drawn_into_the_same_folder_is_no_input_of_the_next_call(
    run: Path, tmp_path: Path
) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "sub" / "b.png")
    for out in (tmp_path, tmp_path / "drawn"):
        for _ in range(2):
            found = detrellis.predict(run, tmp_path, out=out, recursive=True)
            assert [p.path.name for p in found if p.path] == ["a.png", "b.png"]
        for path in (out / "a.jpg", out / "sub" / "b.jpg"):
            path.unlink()
    detrellis.predict(run, tmp_path / "a.png", out=tmp_path)
    with pytest.raises(UserError, match="an input"):
        detrellis.predict(run, tmp_path / "a.jpg", out=tmp_path)


def test_supervision_reads_what_was_found(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    supervision = pytest.importorskip("supervision")
    found = model.predict(picture(), threshold=0)[0]
    detections = found.to_supervision()
    assert isinstance(detections, supervision.Detections)
    np.testing.assert_allclose(detections.xyxy, found.boxes, rtol=1e-6)
    np.testing.assert_allclose(detections.confidence, found.scores, rtol=1e-6)
    assert detections.class_id.tolist() == found.labels
    assert detections.data["class_name"].tolist() == found.names
    assert len(model.predict(picture(), threshold=1)[0].to_supervision()) == 0
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(
        UserError, match=r'supervision is missing.*\n.*pip install "detrellis\[viz\]"'
    ):
        found.to_supervision()


def test_the_table_tells_pictures_of_equal_names_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = [Path("pics/one.jpg"), Path("pics/sub/one.jpg"), tmp_path / "pics" / "two.jpg"]
    assert names_below(pictures) == ["one.jpg", "sub/one.jpg", "two.jpg"]
    assert names_below([Path("pics/sub/one.jpg"), None]) == ["one.jpg", ""]
    assert names_below([None]) == [""]


def test_files_without_a_common_folder_are_named_whole() -> None:
    files = [Path("pics/one.jpg"), Path("/elsewhere/two.jpg")]
    assert below_common_folder(files) == ("", {file: str(file) for file in files})
    assert below_common_folder([]) == ("", {})
