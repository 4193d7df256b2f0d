"""The command `detrellis`, and `python -m detrellis`: light enough to be interrupted while the rest is imported."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def main() -> None:
    """Run the command line; Ctrl-C and SIGTERM end it with a line from the first moment to the last."""
    signals = [signal.SIGINT, signal.SIGTERM]
    for number in signals:
        signal.signal(number, _leave)
    from detrellis.cli import main as run

    try:
        run()
    finally:
        for number in signals:  # what is left is to end: nobody wants a traceback of that
            signal.signal(number, signal.SIG_DFL)


def _leave(number: int, frame: object) -> NoReturn:
    """Nothing has begun yet, and a module may be half imported: leave at once."""
    print("Stopped.", file=sys.stderr, flush=True)
    os._exit(128 + number)


if __name__ == "__main__":
    main()
