"""A headless Chromium, where one is installed, driven by its own protocol over a pipe."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (390, 1280)  # pixels of a phone, and of a desk
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
SECONDS = 30  # for anything that is waited for


class Browser:
    """One page. Tests that ask for it are skipped where there is no Chromium."""

    def __init__(self, folder: Path) -> None:
        """Start it, with what it writes in `folder`."""
        found = next(filter(None, map(shutil.which, NAMES)), None)
        if found is None:
            pytest.skip("no Chromium is installed")
        theirs, ours = os.pipe(), os.pipe()
        # It reads commands from file 3 and answers on file 4.
        start = f'exec "$0" "$@" 3<&{theirs[0]} 4>&{ours[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", start, found, *FLAGS, f"--user-data-dir={folder}"],
            pass_fds=(theirs[0], ours[1]),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs[0])
        os.close(ours[1])
        self.commands, self.answers = os.fdopen(theirs[1], "wb"), os.fdopen(ours[0], "rb")
        self.read, self.number, self.session, self.width = b"", 0, "", 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.commands.close()
        self.process.terminate()
        self.process.wait(30)
        self.answers.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the protocol's method answers."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while (told := self._next()).get("id") != self.number:
            self.events.append(told)
        assert "error" not in told, told
        answer: dict[str, Any] = told["result"]
        return answer

    def open(self, address: str, width: int) -> None:
        """Show a page in a window of this width, and wait until it has loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.width = width
        self.events.clear()
        self.call("Page.navigate", url=address)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        told = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true."""
        until = time.monotonic() + SECONDS
        while not self.ask(f"Boolean({expression})"):
            assert time.monotonic() < until, expression
            time.sleep(0.05)

    def give(self, selector: str, file: Path) -> None:
        """Choose a file in an input, as a user does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def too_wide(self) -> int:
        """By how many pixels the page is wider than the window."""
        wide: int = self.ask("document.documentElement.scrollWidth")
        return wide - self.width

    def loaded(self) -> list[str]:
        """The addresses that the page has asked for since it was opened."""
        asked = (e for e in self.events if e.get("method") == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in asked]

    def picture(self, path: Path) -> None:
        """Save what the whole page looks like."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.read:
            part = os.read(self.answers.fileno(), 1 << 20)
            assert part, "Chromium has ended"
            self.read += part
        message, _, self.read = self.read.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        return told


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which the files of a folder are to be had."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *said: Any) -> None:
            """Nothing."""

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
