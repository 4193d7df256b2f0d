"""How threads wait for each other while other programs use the cores:
training steps of a small and a large network.

    python benchmarks/threads.py [--networks small large] [--neighbours 0 1 2] [--rounds 5] [--steps
    2]

Each setting lives in a process of its own, where OpenMP reads it. They take turns on the clock on
the wall, so that what disturbs one disturbs all. Neighbours are processes that spin. Read the
ratios: how many times as long as one thread a setting takes, the median of the rounds, with the
lowest and the highest.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import NamedTuple

from common import arguments

CORES = os.cpu_count() or 1
# What OpenMP does by itself, and what `detrellis` sets before torch is imported.
SPINNING, PASSIVE = {}, {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
SETTINGS = {"1 thread": (1, SPINNING), f"{CORES} threads, spinning": (CORES, SPINNING)}
SETTINGS |= {f"{CORES} threads, passive": (CORES, PASSIVE)}
UNSET = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT")


class Network(NamedTuple):
    """A recipe, the pixels of its square images, and how many of them a step takes."""

    recipe: str
    side: int
    batch: int


# `tiny` as the demo trains it, and a network of the papers' size.
NETWORKS = {"small": Network("tiny", 112, 4), "large": Network("dino-r50", 320, 1)}


def serve(network: Network, threads: int, asked: Connection) -> None:
    """Train with random weights: answer each number of steps with the seconds of their median."""
    import torch

    from detrellis.engine.bench import seconds_of, training_step
    from detrellis.recipes import find_recipe

    torch.set_num_threads(threads)
    size = f"data.size=[{network.side}, {network.side}]"
    recipe = find_recipe(network.recipe).override([size, f"optim.batch_size={network.batch}"])
    device = torch.device("cpu")
    step = training_step(recipe, 80, device)
    while count := asked.recv():
        asked.send(statistics.median(seconds_of(step, device) for _ in range(count)))


@contextmanager
def processes(network: Network) -> Iterator[dict[str, Connection]]:
    """One for each setting, warmed up."""
    spawn, asked, started = multiprocessing.get_context("spawn"), {}, []
    before = dict(os.environ)
    for name, (threads, setting) in SETTINGS.items():
        for unset in UNSET:
            os.environ.pop(unset, None)
        os.environ.update(setting)
        asked[name], theirs = spawn.Pipe()
        started.append(spawn.Process(target=serve, args=(network, threads, theirs), daemon=True))
        started[-1].start()
        asked[name].send(2)
        asked[name].recv()
    os.environ.clear()
    os.environ.update(before)
    yield asked
    for connection, process in zip(asked.values(), started, strict=True):
        connection.send(0)
        process.join()


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


def compare(asked: dict[str, Connection], count: int, rounds: int, steps: int) -> None:
    """Time all settings beside `count` neighbours, and print a line for each."""
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with neighbours(count):
        for _ in range(rounds):
            for name, connection in asked.items():
                connection.send(steps)
                found[name].append(connection.recv())
        load = os.getloadavg()[0]
    print(f"  {count} neighbours, load {load:.1f}")
    one = found["1 thread"]
    for name, times in found.items():
        ratios = [own / single for own, single in zip(times, one, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        median = statistics.median(times)
        print(
            f"    {name}: {statistics.median(ratios):.2f} ({spread}), {1000 * median:.0f} ms",
            flush=True,
        )


def main() -> None:
    """Time all settings with each network and number of neighbours."""
    parser = arguments(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument(
        "--neighbours", type=int, nargs="+", default=[0, 1, CORES], help="processes that spin"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each setting")
    parser.add_argument("--steps", type=int, default=2, help="steps timed in each turn")
    given = parser.parse_args()
    for name in given.networks:
        network = NETWORKS[name]
        print(f"{network.recipe}, {network.batch} x {network.side} px, {CORES} cores", flush=True)
        with processes(network) as asked:
            for count in given.neighbours:
                compare(asked, count, given.rounds, given.steps)


if __name__ == "__main__":
    main()
