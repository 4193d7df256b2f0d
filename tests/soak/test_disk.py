"""Disks that are full, fill up, or may only be read:
nothing is lost, and the message says what to do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import detrellis
from detrellis.cli.entry import WRONG_USE, refusal
from detrellis.errors import UserError

from ..engine.kills import assert_never_killed, trained
from ..engine.test_saving import SETTINGS

EPOCHS, MB = 2, 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", place], capture_output=True
    ).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has room."""
    base = tmp_path_factory.mktemp("whole")
    assert trained(None, base / "told", shapes, base / "run", SETTINGS, EPOCHS) is None
    return base / "run"


def leave(disk: Path, free: int) -> None:
    """Fill the disk but for `free` bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - free))


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name[0] != "."
    }


def test_a_run_on_a_disk_that_fills_up(
    shapes: Path, whole: Path, disk: Path, tmp_path: Path
) -> None:
    """With more and more room, up to all that it takes:
    it stops with a message, and goes on once there is more.
    """
    needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    stopped = 0
    for part in range(12):
        out = disk / f"run{part}"
        leave(disk, part * needed // 8)
        said = trained(None, tmp_path / "told", shapes, out, SETTINGS, EPOCHS)
        (disk / "filler").unlink()
        assert not list(disk.rglob(".*.partial"))
        if said is not None:
            stopped += 1
            assert "No space left on device" in said
            assert str(out) in said
            assert trained(None, tmp_path / "told", shapes, out, SETTINGS, EPOCHS) is None
        assert_never_killed(whole, out)
        shutil.rmtree(out)
    assert stopped >= 4


def test_no_room_at_any_moment(shapes: Path, whole: Path, tmp_path: Path) -> None:
    """A call that writes fails, each in turn."""
    at, refused = 0, 0
    while True:
        at += 1
        out, told = tmp_path / f"{at:03}", tmp_path / "told"
        said = trained(at, told, shapes, out, SETTINGS, EPOCHS, True)
        passed = at > len(told.read_text().split('", "'))
        assert not list(out.rglob(".*.partial"))
        if said is not None:
            refused += 1
            assert "No space left on device" in said
        # A trained run that had no room for its report says so, and ends well
        if said is not None or not (out / "report.json").exists():
            assert trained(None, told, shapes, out, SETTINGS, EPOCHS) is None
        assert_never_killed(whole, out)
        shutil.rmtree(out)
        if passed:
            break
    assert refused > 20


def test_a_folder_that_may_only_be_read(shapes: Path, whole: Path, disk: Path) -> None:
    shutil.copytree(whole, disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(
        UserError, match=r"run: this folder cannot be written .Read-only file system"
    ):
        detrellis.resume(disk / "run", epochs=9)
    with pytest.raises(UserError, match=r"this folder cannot be written"):
        detrellis.train("tiny", data=shapes, out=disk / "new")
    assert len(detrellis.load(disk / "run").predict(shapes / "images" / "val")) == 5
    with pytest.raises(UserError, match="cannot be written"):
        detrellis.predict(disk / "run", shapes / "images" / "val", out=disk / "pictures")


WRITERS: dict[str, Callable[[Path, Path, Path], object]] = {
    "predict": lambda run, data, out: detrellis.predict(
        run, data / "images" / "val", out=out / "pictures", txt=True
    ),
    "results": lambda run, data, out: detrellis.evaluate(
        run, results=out / "found.json", workers=0
    ),
    "report": lambda run, data, out: detrellis.evaluate(
        run, data=data, report=out / "report", workers=0
    ),
    "export": lambda run, data, out: detrellis.export(run, out=out / "model.onnx"),
    "check": lambda run, data, out: command("check", "--data", data, "--fix", out / "clean"),
    "analyze": lambda run, data, out: command(
        "analyze", "misalignment", run, "--out", out / "figures"
    ),
}


def command(*words: object) -> None:
    """The command line in a process of its own; an error is what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "detrellis", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, WRONG_USE), done.stderr[-3000:]
    if done.returncode:
        raise UserError(done.stderr)


@pytest.mark.parametrize("name", WRITERS)
def test_what_else_writes(name: str, shapes: Path, whole: Path, disk: Path, tmp_path: Path) -> None:
    """On a full disk: a message that names a file there,
    no half file, and what an earlier call wrote stays.
    """
    write, out = WRITERS[name], disk / "out"
    write(whole, shapes, out)
    before = content(out)
    assert before
    leave(disk, 0)
    with pytest.raises((UserError, OSError)) as error:
        write(whole, shapes, disk / "again")
    refused = refusal(error.value)
    assert refused.code == WRONG_USE
    assert str(disk) in refused.message
    assert not list(disk.rglob(".*.partial"))
    (disk / "filler").unlink()
    assert content(out) == before
