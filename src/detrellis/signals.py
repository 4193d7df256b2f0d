"""Ctrl-C and SIGTERM: who handles them, and for how long.
A block within another takes over, and gives back.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


@contextlib.contextmanager
def handled(
    handler: Handler, numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)
) -> Iterator[None]:
    """Call `handler` for these signals;
    nothing outside the main thread, whose owner handles signals.
    """
    before = {}
    with contextlib.suppress(ValueError):
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """The numbers of the signals that came, to be read at a good moment;
    a second Ctrl-C stops at once.
    """
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    with handled(note):
        yield caught


@contextlib.contextmanager
def interrupting() -> Iterator[list[int]]:
    """Both raise `KeyboardInterrupt`, so that files are closed and half-written ones removed;
    the numbers of those that came."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    with handled(note):
        yield caught


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does. A handler of the caller stays:
    the command line's tells the exit code.
    """
    unhandled = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with handled(signal.default_int_handler, (signal.SIGTERM,) if unhandled else ()):
        yield
