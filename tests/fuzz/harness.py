"""Trying seeds in a process of its own, which may die,
hang or run out of memory without taking the tests with it.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import torch

from detrellis.errors import UserError

LIMIT = 10.0  # seconds of computing that one input may take
WAITING = 120.0  # and by the clock, on a machine that does other things too
MEMORY = 3 << 30  # bytes of address space that all inputs together may add
LONGEST = 4000  # letters of a message
GRACE = 20  # seconds until a process that does not even heed its alarm is killed

# Of a seed, in an empty folder; raises where something is wrong
Try = Callable[[int, Path], object]


class Hang(BaseException):
    """An input that takes too long; no `except Exception` may catch it."""


def failures(attempt: Try, seeds: Iterable[int], folder: Path) -> dict[int, str]:
    """What went wrong, by seed: a traceback, or how the process ended. Empty where nothing did."""
    left, found = list(seeds), dict[int, str]()
    while left:
        done, words = _round(attempt, left, folder)
        found |= words
        left = left[done:]
    return found


def _round(attempt: Try, seeds: Sequence[int], folder: Path) -> tuple[int, dict[int, str]]:
    """How many of the seeds one process got through,
    one that killed it included, and what went wrong.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(attempt, seeds, folder, there))
    process.start()
    there.close()
    found, done = dict[int, str](), 0
    try:
        while done < len(seeds):
            if not here.poll(WAITING + GRACE):
                process.kill()
                raise EOFError
            words = here.recv()
            if words:
                found[seeds[done]] = words
            done += 1
    except EOFError:
        process.join()
        code = process.exitcode or 0
        found[seeds[done]] = (
            "the process hung" if code == -signal.SIGKILL else f"the process ended with {code}"
        )
        done += 1
    finally:
        process.join()
        here.close()
    return done, found


def _work(attempt: Try, seeds: Sequence[int], folder: Path, out: Connection) -> None:
    torch.set_num_threads(1)  # a forked process has no pool
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _too_long)
    warnings.simplefilter("ignore")
    # A process that may be killed does not tidy up: what it leaves goes with the test's folder.
    tempfile.tempdir = tempfile.mkdtemp(prefix="shared-", dir=folder)
    for seed in seeds:
        out.send(_one(attempt, seed, folder / str(seed)))
    out.close()


def _one(attempt: Try, seed: int, folder: Path) -> str:
    folder.mkdir()
    start = time.monotonic()
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        attempt(seed, folder)
    except (Exception, Hang) as error:
        return (
            f"{''.join(traceback.format_exception(error))}\nafter {time.monotonic() - start:.1f} "
            f"s in {folder}"
        )
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise Hang("it takes too long")


def refusal(error: UserError, *names: str) -> None:
    """Checks that a refusal names one of `names`, and says what to do."""
    assert any(name in error.message for name in names), f"names none of {names}: {error.message}"
    assert error.remedy, f"no remedy: {error.message}"
    short(error)


def short(error: UserError) -> None:
    """Checks that a refusal says something, and not everything that it was given."""
    assert 0 < len(str(error)) <= LONGEST, f"{len(str(error))} letters: {str(error)[:300]}"
