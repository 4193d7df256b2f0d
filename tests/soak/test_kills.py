"""A run that is killed 20 times ends with the same bits as one that is not, of one process or two."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from ..engine.kills import assert_never_killed, trained, trained_by_two
from ..engine.test_saving import SETTINGS

KILLS, EPOCHS = 20, 10
SHORT = 2  # epochs


def test_twenty_kills_at_random_moments(shapes: Path, tmp_path: Path) -> None:
    """Some 20 moments lie between two states,
    and what is killed before it saves begins there again.
    """
    told, whole, out = tmp_path / "told", tmp_path / "whole", tmp_path / "run"
    assert trained(None, told, shapes, whole, SETTINGS, EPOCHS) is None
    draw, killed = random.Random(25), Counter[str]()
    while killed.total() < KILLS:
        moment = trained(draw.randint(1, 40), told, shapes, out, SETTINGS, EPOCHS)
        assert moment is not None, "the run came to its end"
        killed[moment] += 1
    assert trained(None, told, shapes, out, SETTINGS, EPOCHS) is None
    print("killed:", dict(killed))
    assert len(killed) >= 6
    assert_never_killed(whole, out)


def test_twenty_kills_of_one_of_two_processes(shapes: Path, tmp_path: Path) -> None:
    """The second writes nothing, and has a third of the first one's moments."""
    told, whole, out = tmp_path / "told", tmp_path / "whole", tmp_path / "run"
    assert trained_by_two(None, 0, told, shapes, whole, SETTINGS, EPOCHS) is None
    draw, killed = random.Random(25), Counter[tuple[int, str]]()
    while killed.total() < KILLS:
        rank = draw.randint(0, 1)
        at = draw.randint(1, (40, 12)[rank])
        moment = trained_by_two(at, rank, told, shapes, out, SETTINGS, EPOCHS)
        assert moment is not None, "the run came to its end"
        killed[rank, moment] += 1
        print(rank, at, moment, flush=True)
    assert trained_by_two(None, 0, told, shapes, out, SETTINGS, EPOCHS) is None
    assert len(killed) >= 8
    assert_never_killed(whole, out)


def test_every_moment_of_a_short_run(shapes: Path, tmp_path: Path) -> None:
    """Killed in each of its moments:
    the first step, inside checkpoints, evaluations and reports.
    """
    told, whole = tmp_path / "told", tmp_path / "whole"
    assert trained(None, told, shapes, whole, SETTINGS, SHORT) is None
    at = 0
    while True:
        at += 1
        out = tmp_path / f"{at:03}"
        moment = trained(at, told, shapes, out, SETTINGS, SHORT)
        if moment is not None:
            assert trained(None, told, shapes, out, SETTINGS, SHORT) is None
        assert_never_killed(whole, out)
        shutil.rmtree(out)
        if moment is None:
            break
    assert at > 60


def test_kills_by_the_clock(shapes: Path, tmp_path: Path) -> None:
    """Of the command, with workers, wherever it is: importing, reading, training, writing."""
    told, whole, out = tmp_path / "told", tmp_path / "whole", tmp_path / "run"
    assert trained(None, told, shapes, whole, SETTINGS, EPOCHS) is None
    begin = ["train", "tiny", "--data", str(shapes), "--out", str(out), "--epochs", str(EPOCHS)]
    begin += [word for setting in SETTINGS for word in ("-o", setting)]
    draw, killed = random.Random(25), 0
    for _ in range(60):
        verb = ["train", "--resume", str(out)] if (out / "last.state.pt").exists() else begin
        process = subprocess.Popen(
            [sys.executable, "-m", "detrellis", *verb, "--workers", "1"], stdout=subprocess.DEVNULL
        )
        try:
            assert process.wait(draw.uniform(3, 25) if killed < KILLS else 900) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    print("killed", killed, "times")
    assert killed >= 3
    assert_never_killed(whole, out)
