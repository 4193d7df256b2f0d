"""Videos, made here and broken here:
what is detected in them, what is written, and what is said of broken ones.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import detrellis
from detrellis.errors import Advice, UserError
from detrellis.predictions import video_writer
from detrellis.predictions.inputs import find_pictures
from detrellis.predictions.model import Model
from detrellis.predictions.record import Prediction
from detrellis.predictions.save import JsonList
from detrellis.predictions.video import Frame, read_frames
from detrellis.verbs.prediction import expected

from .conftest import picture, save
from .test_predict import alike, call, interrupt

av = pytest.importorskip("av")

UPRIGHT = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
CLOCKWISE = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 40 << 16, 0, 0x40000000)


def film(
    path: Path,
    frames: int = 12,
    *,
    size: tuple[int, int] = (40, 64),
    ticks: Sequence[int] | None = None,
    tick: Fraction = Fraction(1, 30),
    fast: bool = False,
) -> Path:
    """A video of coloured patches; `ticks` say when each frame is shown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"} if fast else {}) as container:
        stream = container.add_stream("libx264" if path.suffix != ".avi" else "mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], "yuv420p"
        stream.codec_context.time_base = tick
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(*size, seed=number), format="rgb24")
            frame.pts, frame.time_base = number if ticks is None else ticks[number], tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(path: Path, share: float = 0.6) -> Path:
    """The file without its end."""
    data = path.read_bytes()
    path.write_bytes(data[: round(share * len(data))])
    return path


def frames_of(path: Path) -> list[Frame]:
    return list(read_frames(path))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "mov"])
def test_frames_are_the_pictures_that_were_filmed(tmp_path: Path, suffix: str) -> None:
    frames = frames_of(film(tmp_path / f"a.{suffix}"))
    assert [frame.number for frame in frames] == list(range(12))
    assert [frame.time for frame in frames] == pytest.approx([i / 30 for i in range(12)], abs=1e-3)
    for frame in frames:
        error = np.abs(
            frame.pixels.permute(1, 2, 0).numpy().astype(int) - picture(seed=frame.number)
        )
        assert error.mean() < 20  # of another picture: 85
    assert [frame.number for frame in read_frames(tmp_path / f"a.{suffix}", 5)] == [0, 5, 10]


def test_a_phones_video_is_turned_as_it_is_shown(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", 3)
    upright = frames_of(path)
    data = path.read_bytes()
    at = data.index(UPRIGHT, data.index(b"tkhd"))
    path.write_bytes(data[:at] + CLOCKWISE + data[at + len(UPRIGHT) :])
    for one, other in zip(upright, frames_of(path), strict=True):
        np.testing.assert_array_equal(
            np.rot90(one.pixels.numpy(), -1, (1, 2)), other.pixels.numpy()
        )


@pytest.mark.parametrize("encoder", list(video_writer.ENCODERS))
@pytest.mark.parametrize("ticks", [None, [0, 1, 2, 10, 11, 30, 31, 32, 33, 34, 35, 60]])
def test_the_annotated_video_keeps_rate_size_and_times(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoder: str,
    ticks: Sequence[int] | None,
) -> None:
    monkeypatch.setattr(video_writer, "ENCODERS", {encoder: video_writer.ENCODERS[encoder]})
    path = film(tmp_path / "a.mov", size=(120, 200), ticks=ticks)
    detrellis.predict(run, path, out=tmp_path / "out", threshold=1)
    with av.open(str(tmp_path / "out" / "a.mp4")) as drawn, av.open(str(path)) as given:
        ours, theirs = drawn.streams.video[0], given.streams.video[0]
        assert (ours.width, ours.height) == (200, 120)
        assert ticks is not None or ours.average_rate == theirs.average_rate == 30
        assert ours.codec_context.name == {"libx264": "h264", "mpeg4": "mpeg4"}[encoder]
    before, after = frames_of(path), frames_of(tmp_path / "out" / "a.mp4")
    assert [frame.time for frame in after] == pytest.approx(
        [frame.time for frame in before], abs=1e-4
    )
    # Nothing is drawn: the same colours, up to compression
    for one, other in zip(before, after, strict=True):
        assert np.abs(one.pixels.numpy().astype(int) - other.pixels.numpy()).mean() < 8


def test_odd_sides_and_times_that_stand_still(tmp_path: Path) -> None:
    from PIL import Image

    with video_writer.VideoWriter(tmp_path / "a.mp4", Fraction(30)) as writer:
        for number, time in enumerate((0.0, 0.0, 0.1)):
            writer.add(Image.fromarray(picture(41, 65, seed=number)), time)
    frames = frames_of(tmp_path / "a.mp4")
    assert [tuple(frame.pixels.shape) for frame in frames] == [(3, 42, 66)] * 3
    assert frames[0].time < frames[1].time < frames[2].time


def test_frames_are_predicted_as_pictures(model: Model, tmp_path: Path) -> None:
    path, photo = film(tmp_path / "a.mp4", 9), save(tmp_path / "b.png")
    found = model.predict([path, photo], threshold=0, batch_size=2)
    assert [(p.path, p.frame) for p in found] == [*((path, i) for i in range(9)), (photo, None)]
    assert all(p.pixels is None for p in found)  # a long video would not fit
    for frame, one in zip(read_frames(path), found, strict=False):
        alike(one, model.predict(frame.pixels, threshold=0)[0])
        assert one.time == frame.time
        assert (
            one.to_coco(7)[0].items()
            >= {"frame": frame.number, "time": frame.time, "image_id": 7}.items()
        )
    np.testing.assert_array_equal(
        np.asarray(found[4].image()), frames_of(path)[4].pixels.permute(1, 2, 0).numpy()
    )
    assert next(iter(model.stream(path))).frame == 0


def test_few_frames_are_in_memory(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    def counted(path: Path, every: int = 1) -> object:
        nonlocal read
        for frame in read_frames(path, every):
            read += 1
            yield frame

    monkeypatch.setattr("detrellis.predictions.inputs.read_frames", counted)
    stream = model.detect(find_pictures(film(tmp_path / "a.mp4", 60)), 0.0, None, batch_size=2)
    for number, _ in zip(range(20), stream, strict=False):
        assert read <= number + 1 + 8  # WINDOW batches of two


def test_how_many_predictions_there_will_be(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    film(tmp_path / "b.mp4", 5)
    assert [expected(find_pictures(tmp_path), every) for every in (1, 2, 9)] == [6, 4, 2]


def test_a_folder_of_pictures_and_videos(run: Path, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    film(tmp_path / "in" / "b.mp4", 5)
    out = tmp_path / "out"
    code, stdout, stderr = call(
        run, tmp_path / "in", "--out", out, "--threshold", 0, "--txt", "--crops", "--every", 2
    )
    assert (code, stderr) == (0, "")
    assert "(3 frames)" in stdout
    rows = json.loads((out / "predictions.json").read_text())
    numbers = {(Path(row["file_name"]).name, row.get("frame"), row["image_id"]) for row in rows}
    assert numbers == {("a.png", None, 1), ("b.mp4", 0, 2), ("b.mp4", 2, 3), ("b.mp4", 4, 4)}
    assert {p.name for p in out.glob("*") if p.is_file()} - {".detrellis.jsonl"} == {
        *("a.jpg", "b.mp4", "predictions.json", "classes.txt")
    }
    assert sorted(p.name for p in (out / "labels" / "b").iterdir()) == [
        "000000.txt",
        "000002.txt",
        "000004.txt",
    ]
    assert list(out.glob("crops/*/b/000002-*.jpg"))
    assert len(frames_of(out / "b.mp4")) == 3
    # Its own files are replaced, and are no inputs.
    assert call(run, tmp_path / "in", out, "--out", out)[0] == 0


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc", "csv", "labelstudio", "cvat"])
def test_frames_become_a_label_set(run: Path, tmp_path: Path, kind: str) -> None:
    film(tmp_path / "b.mp4", 3)
    detrellis.predict(run, tmp_path / "b.mp4", out=tmp_path / "out", format=kind, threshold=0.0)  # type: ignore[arg-type]
    pictures = sorted((tmp_path / "out" / kind).rglob("*.jpg"))
    assert [p.relative_to(p.parents[1]).as_posix() for p in pictures] == [
        f"b/00000{i}.jpg" for i in range(3)
    ]


def broken(folder: Path, how: str) -> Path:
    path = folder / "clip.mp4"
    if how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("no video\n" * 100)
    elif how == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000, layout="mono")
            sound = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            sound.sample_rate = 8000
            container.mux(stream.encode(sound))
            container.mux(stream.encode())
    elif how == "garbage":
        data = bytearray(film(path, 30).read_bytes())
        middle, part = len(data) // 2, len(data) // 10
        data[middle - part : middle] = np.random.default_rng(0).bytes(part)
        path.write_bytes(data)
    elif how == "cut mkv":
        path = cut(film(folder / "clip.mkv", 30))
    else:
        path = cut(film(path, 30, fast=how == "cut"))
    return path


@pytest.mark.parametrize(
    ("how", "said", "frames"),
    [
        ("empty", "the file is empty", 0),
        ("text", "a video that cannot be read (invalid data", 0),
        ("sound", "holds no pictures, only audio", 0),
        ("no index", "a video that cannot be read (invalid data", 0),
        ("cut", "ends after 0.", 10),
        ("cut mkv", "ends after 0.", 10),
        ("garbage", "are damaged, ", 20),
    ],
)
def test_a_broken_video_is_named_and_what_could_be_read_is_kept(
    run: Path, tmp_path: Path, how: str, said: str, frames: int
) -> None:
    path, photo = broken(tmp_path, how), save(tmp_path / "photo.png")
    before = path.read_bytes()
    code, stdout, stderr = call(run, path, photo, "--out", tmp_path / "out", "--threshold", 0)
    assert code == 1
    assert f"error {path}: " in stderr.replace("\n", "")
    assert said in stderr.replace("\n", " ")
    assert "1 of 2 pictures and videos could not be read to their end" in stderr.replace("\n", " ")
    assert "photo.png" in stdout
    assert path.read_bytes() == before
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    seen = {row["frame"] for row in rows if "frame" in row}
    assert len(seen) >= frames
    assert (tmp_path / "out" / "clip.mp4").exists() == bool(frames)
    if frames:
        assert len(frames_of(tmp_path / "out" / "clip.mp4")) == len(seen)


def test_ctrl_c_leaves_a_video_that_plays(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        detrellis.predict(run, film(tmp_path / "a.mp4", 20), out=tmp_path / "out")
    assert len(frames_of(tmp_path / "out" / "a.mp4")) == 7
    assert not list((tmp_path / "out").glob("*.partial"))


def test_an_input_is_never_written_over(run: Path, tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", 3)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"a\.mp4: an input, which would be overwritten"):
        detrellis.predict(run, path, out=tmp_path)
    assert path.read_bytes() == before


def test_predictions_need_not_be_kept(run: Path, tmp_path: Path) -> None:
    seen: list[Prediction] = []
    found = detrellis.predict(run, film(tmp_path / "a.mp4", 4), on_prediction=seen.append)
    assert (len(found), [p.frame for p in seen]) == (0, [0, 1, 2, 3])


def test_without_pyav_folders_are_read_and_videos_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a.png")
    film(tmp_path / "b.mp4", 2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.warns(
        Advice, match=r"b\.mp4, a video, is left out: pip install 'detrellis\[video\]'"
    ):
        assert [p.below.name for p in find_pictures(tmp_path)] == ["a.png"]
    with pytest.raises(UserError, match=r"b\.mp4: a video, for which PyAV is needed\n.*ffmpeg -i"):
        list(find_pictures(tmp_path / "b.mp4"))


@pytest.mark.parametrize(
    "rows", [[], [{"a": 1, "b": [1.5, None]}], [{"a": "x"}, {}, {"c": {"d": "é"}}]]
)
def test_a_list_that_grows_is_written_as_json_does(
    tmp_path: Path, rows: list[dict[str, object]]
) -> None:
    with JsonList() as growing:
        for row in rows:
            growing.add(row)
        growing.copy(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == json.dumps(rows, indent=1)
