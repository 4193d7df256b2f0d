"""How threads wait for each other while other programs use the cores: a training step of `tiny` at the demo's size.

    python benchmarks/threads.py [--neighbours 0 2] [--rounds 3] [--steps 5]

Each setting is timed in a process of its own, on the wall; settings take turns, so that what disturbs one disturbs all.
Neighbours are processes that spin. Read the ratios: how many times as long as one thread a setting takes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from common import arguments

CORES = os.cpu_count() or 1
# What OpenMP does by itself, and what `detrellis` sets before torch is imported.
SPINNING, PASSIVE = {}, {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
SETTINGS = {"1 thread": (1, SPINNING), f"{CORES} threads, spinning": (CORES, SPINNING)}
SETTINGS |= {f"{CORES} threads, passive": (CORES, PASSIVE)}
START = "from detrellis.cli import main; main()"  # unlike `python -m detrellis` it sets nothing


def step(threads: int, setting: dict[str, str], steps: int) -> float:
    """Milliseconds of the median step."""
    unset = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | setting
    words = ["bench", "tiny", "--train", "--size", "112x112", "--batch-sizes", "4", "--threads", str(threads)]
    words += ["--runs", str(steps), "--device", "cpu", "--json"]
    done = subprocess.run([sys.executable, "-c", START, *words], env=environment, stdout=subprocess.PIPE, check=True)
    return float(json.loads(done.stdout)["timings"][0]["median_ms"])


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that use a core each."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for each in spinning:
            each.kill()
            each.wait()


def main() -> None:
    """Time all settings with each number of neighbours."""
    parser = arguments(__doc__)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, CORES], help="processes that spin")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each setting")
    parser.add_argument("--steps", type=int, default=5, help="steps timed in each process")
    given = parser.parse_args()
    for count in given.neighbours:
        found: dict[str, list[float]] = {name: [] for name in SETTINGS}
        with neighbours(count):
            for _ in range(given.rounds):
                for name, (threads, setting) in SETTINGS.items():
                    found[name].append(step(threads, setting, given.steps))
        print(f"{count} neighbours, {CORES} cores, load {os.getloadavg()[0]:.1f}")
        one = found["1 thread"]
        for name, times in found.items():
            ratio = statistics.median(own / single for own, single in zip(times, one, strict=True))
            print(f"  {name}: {ratio:.2f} x  ({', '.join(f'{t:.0f}' for t in times)} ms)", flush=True)


if __name__ == "__main__":
    main()
