"""Pages in a headless Chromium, where one is installed: how far each is wider than the window."""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PHONE, DESK = 390, 1280  # pixels
# Each page in a frame of the width, so that also media queries see it; scripts have their time.
LOOK = """<!doctype html><body><pre id="told"></pre><script>
const told = {};
async function look() {
  for (const page of PAGES) {
    const frame = document.createElement("iframe");
    frame.style = "width: WIDTHpx; height: 900px; border: 0";
    frame.src = page;
    document.body.append(frame);
    await new Promise((done) => { frame.onload = done; });
    await new Promise((done) => { setTimeout(done, 200); });
    const inside = frame.contentDocument.documentElement;
    told[page] = { wide: inside.scrollWidth - WIDTH, high: inside.scrollHeight,
                   title: frame.contentDocument.title };
    frame.remove();
  }
  document.getElementById("told").textContent = JSON.stringify(told);
  document.title = "looked";
}
look();
</script>"""


def chromium() -> str:
    """The browser; the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which the files of a folder are to be had."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *said: Any) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def look(folder: Path, pages: Sequence[str], width: int, scratch: Path) -> dict[str, Any]:
    """Of each page below `folder`: by how many pixels it is wider than a window of this `width`,
    its height there, and its title, once its scripts have run."""
    looking = folder / "look-at-the-pages.html"
    text = LOOK.replace("PAGES", json.dumps(list(pages))).replace("WIDTH", str(width))
    looking.write_text(text, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={scratch}"]
    budget = f"--virtual-time-budget={5000 + 1000 * len(pages)}"
    try:
        with served(folder) as address:
            ended = subprocess.run(
                [chromium(), *flags, budget, "--dump-dom", f"{address}/{looking.name}"],
                capture_output=True,
                text=True,
                timeout=600,
                check=True,
            )
    finally:
        looking.unlink()
    told = re.search(r'<pre id="told">(.+?)</pre>', ended.stdout, re.DOTALL)
    assert told is not None, ended.stderr[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(told[1]))
    return found
