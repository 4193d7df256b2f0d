"""A server under load: 200 requests, 16 at a time, of several sizes;
none is lost, and each gets its own answer.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from detrellis.serving.detector import open_served
from tests.predictions.conftest import model, picture, run
from tests.serving.test_serving import Server, as_jpeg

__all__ = ["model", "run"]

REQUESTS, AT_A_TIME = 200, 16


def test_200_requests_16_at_a_time(run: Path) -> None:
    pictures = [as_jpeg(Image.fromarray(picture(40 + 8 * (i % 3), 64, seed=i))) for i in range(20)]
    server = Server(open_served(run, 0.0))
    seconds = []

    def ask(number: int) -> tuple[int, object]:
        before = time.perf_counter()
        status, told, _ = server.ask("POST", "/predict", pictures[number % len(pictures)])
        seconds.append(time.perf_counter() - before)
        return status, told

    alone = [ask(number)[1] for number in range(len(pictures))]
    seconds.clear()
    begun = time.perf_counter()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        answers = list(pool.map(ask, range(REQUESTS)))
    rate = REQUESTS / (time.perf_counter() - begun)
    server.close()
    assert [status for status, _ in answers] == [200] * REQUESTS
    for number, (_, told) in enumerate(answers):
        expected = alone[number % len(pictures)]
        assert (told["width"], told["height"]) == (expected["width"], expected["height"])
        scores, wanted = ([d["score"] for d in each["detections"]] for each in (told, expected))
        assert scores == pytest.approx(wanted, abs=1e-4)
    median, slowest = 1000 * statistics.median(seconds), 1000 * max(seconds)
    print(f"{rate:.1f} requests/s, median {median:.0f} ms, slowest {slowest:.0f} ms")
