"""One process at a time writes to a run's folder, and nobody has to remove a lock."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from detrellis import folders
from detrellis.errors import Advice, UserError
from detrellis.folders import held
from detrellis.outputs import LOCK, Outputs

HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+b", buffering=0)
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0)
file.write(b"process 7 on elsewhere, since yesterday")
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with (
        held(run, new=True),
        pytest.raises(UserError, match=f"run: process {os.getpid()} on .*, since") as error,
    ):
        held(run).__enter__()
    assert "--out" in error.value.remedy
    with held(run):  # free again, and the file is in nobody's way
        Outputs(run).alone()


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / LOCK], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="process 7 on elsewhere, since yesterday, writes here"):
            held(tmp_path).__enter__()
        process.send_signal(signal.SIGKILL)
    with held(tmp_path):
        pass


def test_a_worker_that_outlives_it_does_not_keep_the_lock(tmp_path: Path) -> None:
    (began, begin), (ends, end) = os.pipe(), os.pipe()
    with held(tmp_path):
        worker = os.fork()
        if worker == 0:
            os.close(end)
            os.write(begin, b"x")
            os.read(ends, 1)  # until the test ends
            os._exit(0)
        os.read(began, 1)
    with held(tmp_path):
        os.close(end)
        os.waitpid(worker, 0)


def test_what_the_check_says_is_raised_and_the_folder_is_free(tmp_path: Path) -> None:
    def check() -> None:
        raise UserError("taken", "Go.")

    with pytest.raises(UserError, match="taken"):
        held(tmp_path, check=check).__enter__()
    with held(tmp_path):
        pass


def test_places_without_locks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path / "nowhere"):  # whoever reads it says more
        assert not (tmp_path / "nowhere").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: this folder cannot be written \(File exists\)"):
        held(tmp_path / "file", new=True).__enter__()

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folders.fcntl, "flock", none)
    with pytest.warns(Advice, match="no locks here .No locks available."), held(tmp_path):
        pass


def unfinished(folder: Path, error: BaseException, write: Callable[[Path], None]) -> None:
    """A run that writes so much, and raises."""
    with held(folder, new=True):
        write(folder)
        raise error


@pytest.mark.parametrize("error", [UserError("no", "Go."), KeyboardInterrupt(), OSError("full")])
def test_nothing_is_left_of_what_never_began(error: BaseException, tmp_path: Path) -> None:
    run, own = tmp_path / "runs" / "deep" / "run", tmp_path / "own"
    own.mkdir()
    for folder, rest in ((run, tmp_path / "runs"), (own, own / LOCK)):
        with pytest.raises(type(error)):
            unfinished(folder, error, lambda folder: Outputs(folder).take(["metrics.jsonl"]))
        assert not rest.exists()
    assert list(own.iterdir()) == []  # somebody else made it, so it stays


def test_what_has_begun_stays(tmp_path: Path) -> None:
    error = UserError("no", "Go.")
    with pytest.raises(UserError):
        unfinished(tmp_path / "run", error, lambda folder: (folder / "metrics.jsonl").touch())
    assert {path.name for path in (tmp_path / "run").iterdir()} == {LOCK, "metrics.jsonl"}


def test_who_is_refused_takes_no_lock_away(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(UserError, match="writes here"):
        held(tmp_path, new=True).__enter__()
    assert (tmp_path / LOCK).exists()


def test_a_lock_that_goes_while_it_is_taken_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, asked = folders.fcntl.flock, []

    def late(file: object, how: int) -> None:
        asked.append(how)
        if len(asked) == 1:  # by another process, whose run did not begin
            (tmp_path / LOCK).unlink()
        flock(file, how)

    monkeypatch.setattr(folders.fcntl, "flock", late)
    with held(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()}")
    assert len(asked) == 2
