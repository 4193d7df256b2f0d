"""The server: what it answers, what it refuses,
what goes through the detector together, and how it ends.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from detrellis.data.classes import ClassMap
from detrellis.errors import UserError
from detrellis.predictions.record import Prediction
from detrellis.serving.batcher import Batcher
from detrellis.serving.detector import Served, open_served
from detrellis.signals import interrupting
from detrellis.verbs.serving import _listening, serve
from tests.browser import WIDTHS, Browser
from tests.predictions.conftest import picture

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

CLASSES = ClassMap((3, 7), ("cat", "<b>dog</b>"))
SMALL_BODY, PIXELS = 2**16, 10_000
NO_FILE = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n'


def predictions(pictures: Sequence[Tensor]) -> list[Prediction]:
    """Two objects in each picture;
    the height is a score, so that answers can be told apart. A red corner breaks it.
    """
    if any(int(p[0, 0, 0]) > 250 for p in pictures):
        raise RuntimeError("broken in the detector")
    sizes = [(int(p.shape[1]), int(p.shape[2])) for p in pictures]
    box = (1.0, 2.0, 4.0, 6.0)
    return [
        Prediction(
            None, size, [0.9, size[0] / 1000], ["cat", "<b>dog</b>"], [0, 1], [3, 7], [box, box]
        )
        for size in sizes
    ]


class Server:
    """A server in a thread, and requests to it."""

    def __init__(self, served: Served, **limits: Any) -> None:
        from detrellis.serving.app import Limits, build_app

        self.socket = _listening("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        app = build_app(served, Limits(**limits))
        self.uvicorn = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=20)
        )
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers or {})
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        is_json = reply.getheader("content-type", "").startswith("application/json")
        return (
            reply.status,
            json.loads(text) if is_json else text,
            {k.lower(): v for k, v in reply.getheaders()},
        )

    def close(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(30)
        self.socket.close()
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    served = Served(predictions, "a <tiny> model", CLASSES, [0.5, 0.05])
    made = Server(served, max_bytes=SMALL_BODY, max_pixels=PIXELS, requests=32)
    yield made
    made.close()


def jpeg(height: int = 40, width: int = 64, colour: str = "green", kind: str = "JPEG") -> bytes:
    return as_jpeg(Image.new("RGB", (width, height), colour), kind)


def as_jpeg(image: Image.Image, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def form(name: str, content: bytes, field: str = "file") -> tuple[bytes, dict[str, str]]:
    head = (
        f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
    )
    return head + content + b"\r\n--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


def test_a_picture_as_the_body_or_in_a_form(server: Server) -> None:
    status, told, _ = server.ask("POST", "/predict", jpeg(60))
    assert status == 200
    assert (told["width"], told["height"], told["file_name"]) == (64, 60, "picture")
    first, second = told["detections"]
    assert (first["category_id"], first["category_name"], first["bbox"]) == (3, "cat", [1, 2, 3, 4])
    assert (second["category_id"], second["score"]) == (7, 0.06)
    body, headers = form("my photo.png", jpeg(60, kind="PNG"))
    status, again, _ = server.ask("POST", "/predict", body, headers)
    assert (status, again["file_name"]) == (200, "my photo.png")
    assert [d["bbox"] for d in again["detections"]] == [d["bbox"] for d in told["detections"]]


def test_thresholds_are_the_servers_or_the_requests(server: Server) -> None:
    def scores(query: str) -> list[float]:
        return [d["score"] for d in server.ask("POST", f"/predict{query}", jpeg())[1]["detections"]]

    assert scores("") == [0.9]  # 0.04 is below 0.05
    assert scores("?threshold=0.03") == [0.9, 0.04]
    assert scores("?threshold=0.95") == []


def test_health_and_the_page(server: Server) -> None:
    status, told, _ = server.ask("GET", "/health")
    assert (status, told["status"], told["classes"]) == (200, "ok", ["cat", "<b>dog</b>"])
    status, page, headers = server.ask("GET", "/")
    assert status == 200
    assert "a &lt;tiny&gt; model" in page
    assert "<tiny>" not in page
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert "innerHTML" not in page


def test_a_browser_draws_what_is_detected_on_a_phone_too(server: Server, tmp_path: Path) -> None:
    Image.new("RGB", (64, 60), "green").save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("no picture")
    said = "document.getElementById('said').textContent"
    with Browser(tmp_path / "browser") as browser:
        for width in WIDTHS:
            browser.open(f"http://127.0.0.1:{server.port}/", width)
            browser.give("#file", tmp_path / "photo.png")
            browser.wait(f"{said} === '2 objects'")
            assert browser.ask("document.querySelectorAll('#boxes rect').length") == 2
            assert "<b>dog</b> 0.06" in browser.ask("document.getElementById('found').textContent")
            dial = "const dial = document.getElementById('threshold'); dial.value = 0.5;"
            browser.ask(f"{{ {dial} dial.oninput(); }}")
            assert browser.ask(said) == "1 object"
            assert browser.too_wide() <= 0
            browser.give("#file", tmp_path / "text.png")
            browser.wait(f"{said} === 'text.png: no picture that can be read here'")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/predict", b"", 400, "an empty body"),
        ("POST", "/predict", b"no picture", 400, "picture: not an image"),
        ("POST", "/predict", jpeg()[:300], 400, "picture: "),
        ("POST", "/predict", jpeg(101, 100), 413, "100x101 pixels"),
        ("POST", "/predict", b"x" * (SMALL_BODY + 1), 413, "more than"),
        # Chunked: no length is stated
        ("POST", "/predict", [b"x" * SMALL_BODY, b"y"], 413, "more than"),
        ("POST", "/predict?threshold=2", jpeg(), 400, "threshold: "),
        ("POST", "/predict?threshold=nan", jpeg(), 400, "threshold: "),
        ("GET", "/predict", None, 405, "Method Not Allowed"),
        ("GET", "/nowhere", None, 404, "Not Found"),
        ("POST", "/predict", jpeg(colour="red", kind="PNG"), 500, "could not be answered"),
    ],
)
def test_errors_are_json(
    server: Server, method: str, path: str, body: Any, status: int, message: str
) -> None:
    found, told, _ = server.ask(method, path, iter(body) if isinstance(body, list) else body)
    assert found == status
    assert message in told["error"]["message"]
    assert "/tmp" not in told["error"]["message"]


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"--x\r\n", "multipart/form-data; boundary=x", "form"),
        (b"nothing", "multipart/form-data", "form cannot be read"),
        (
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
            "no file",
        ),
    ],
)
def test_forms_without_a_picture(server: Server, body: bytes, kind: str, message: str) -> None:
    status, told, _ = server.ask("POST", "/predict", body, {"Content-Type": kind})
    assert status == 400
    assert message in told["error"]["message"]


def test_many_at_a_time_and_none_is_lost(server: Server) -> None:
    heights = [20 + i % 50 for i in range(40)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(
                lambda height: server.ask("POST", "/predict?threshold=0", jpeg(height)), heights
            )
        )
    assert [status for status, *_ in answers] == [200] * len(heights)
    assert [told["detections"][1]["score"] for _, told, _ in answers] == [
        height / 1000 for height in heights
    ]


def test_too_many_wait_elsewhere_and_those_inside_are_answered_at_the_end() -> None:
    entered, released = threading.Event(), threading.Event()

    def slow(pictures: Sequence[Tensor]) -> list[Prediction]:
        entered.set()
        assert released.wait(30)
        return predictions(pictures)

    server = Server(Served(slow, "slow", CLASSES, [0.5, 0.5]), requests=1)
    with ThreadPoolExecutor(1) as pool:
        inside = pool.submit(server.ask, "POST", "/predict", jpeg())
        assert entered.wait(30)
        status, told, headers = server.ask("POST", "/predict", jpeg())
        assert (status, headers["retry-after"]) == (503, "1")
        assert "try again" in told["error"]["message"]
        server.uvicorn.should_exit = True
        time.sleep(0.2)
        released.set()
        assert inside.result(30)[0] == 200
    server.close()


def test_a_second_ctrl_c_waits_for_no_request_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entered, released, address = threading.Event(), threading.Event(), []

    def slow(pictures: Sequence[Tensor]) -> list[Prediction]:
        entered.set()
        assert released.wait(30)
        return predictions(pictures)

    def interrupt() -> None:
        connection = http.client.HTTPConnection(address[0].removeprefix("http://"), timeout=60)
        connection.request("POST", "/predict", jpeg())
        assert entered.wait(30)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        released.set()

    def started(at: str) -> None:
        address.append(at)
        pool.submit(interrupt)

    monkeypatch.setattr(
        "detrellis.verbs.serving.open_served", lambda *_: Served(slow, "slow", CLASSES, [0.5, 0.5])
    )
    with ThreadPoolExecutor(1) as pool, interrupting(), pytest.raises(KeyboardInterrupt):
        serve("a run", port=0, started=started)
    assert entered.is_set()
    assert not [record.getMessage() for record in caplog.records if record.name == "uvicorn.error"]


def test_pictures_that_come_together_go_through_together() -> None:
    sizes, gate = [], threading.Event()

    def noting(pictures: Sequence[Tensor]) -> list[Prediction]:
        assert gate.wait(30)
        sizes.append(len(pictures))
        return predictions(pictures)

    batcher = Batcher(noting, batch_size=4, seconds=0.2)
    red = torch.full((3, 4, 4), 255, dtype=torch.uint8)
    green = torch.zeros(3, 4, 4, dtype=torch.uint8)
    futures = [batcher.submit(red if i == 5 else green) for i in range(6)]
    futures.append(batcher.submit(green))
    futures[6].cancel()
    gate.set()
    batcher.close()
    assert sizes == [4, 2, 1, 1]  # the second batch fails, and is tried one by one
    assert isinstance(futures[5].exception(), RuntimeError)
    assert all(future.result().scores[0] == 0.9 for future in futures[:5])
    assert not batcher.alive


def test_a_run_is_served_as_it_predicts(run: Path, model: Any) -> None:
    served = open_served(run, 0.25)
    assert served.thresholds == [0.25] * 3
    pixels = torch.from_numpy(picture()).permute(2, 0, 1)
    (found,) = served.detect([pixels])
    expected = model.predict(picture(), threshold=0)[0]
    assert found.labels == expected.labels
    assert found.scores == pytest.approx(expected.scores, abs=1e-5)


def test_a_port_that_is_taken(run: Path) -> None:
    with _listening("127.0.0.1", 0) as taken, pytest.raises(UserError, match="--port"):
        serve(run, port=taken.getsockname()[1])
