"""The command `detrellis`, and `python -m detrellis`:
light enough to be interrupted while the rest is imported.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

# Threads that wait for each other sleep. By default they spin, and where other programs use the
# cores they spin at each other: docs/performance.md, "Threads". OpenMP reads this when torch is
# imported; what the user has set stays.
PASSIVE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}


def main() -> None:
    """Run the command line; Ctrl-C and SIGTERM end it with a line from the first moment to the
    last.
    """
    signals = [signal.SIGINT, signal.SIGTERM]
    for number in signals:
        signal.signal(number, _leave)
    for name, value in PASSIVE.items():
        os.environ.setdefault(name, value)
    from detrellis.cli import main as run

    try:
        run()
    finally:
        for number in signals:  # what is left is to end: nobody wants a traceback of that
            signal.signal(number, signal.SIG_DFL)


def _leave(number: int, frame: object) -> NoReturn:
    """Nothing has begun yet, and a module may be half imported:
    leave at once. Under torchrun one process says so.
    """
    if os.environ.get("RANK", "0") == "0":
        print("Stopped.", file=sys.stderr, flush=True)
    os._exit(128 + number)


if __name__ == "__main__":
    main()
