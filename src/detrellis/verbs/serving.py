"""`serve`: a detector behind HTTP, until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from pathlib import Path

from detrellis.arguments import Auto, BatchSize, Count, Iou, Port, Score, checked
from detrellis.errors import UserError
from detrellis.serving.detector import open_served

INSTALL = "pip install 'detrellis[serve]'"
STOP_SECONDS = 30  # that requests have to end when the server is stopped


@checked
def serve(
    run: str | Path,
    *,
    host: str = "127.0.0.1",
    port: Port = 8000,
    threshold: Score | Auto = 0.3,
    nms: Iou | None = None,
    batch_size: BatchSize = 8,
    max_bytes: Count = 32 * 2**20,
    max_pixels: Count = 50_000_000,
    device: str | None = None,
    half: bool = False,
    started: Callable[[str], None] = print,
) -> None:
    """Serve a run or an exported network over HTTP until Ctrl-C or SIGTERM;
    requests that are inside are answered.

    `serving/app.py` says what is answered. The default `host` is this machine alone: there is no
    password, so put what has one before it. `threshold`, `nms` and `half` are as in `predict`; a
    request may name a threshold of its own. At most `batch_size` pictures go through the detector
    at a time, and a body may have `max_bytes` and a picture `max_pixels`. `started` is called with
    the address, once it answers there; port 0 takes a free one.

    Raises `UserError` where FastAPI or uvicorn is missing, or the port is taken.
    """
    try:
        import uvicorn

        from detrellis.serving.app import Limits, build_app
    except ImportError as error:
        raise UserError(f"{error.name} is not installed, which serve needs", INSTALL) from None
    served = open_served(run, threshold, nms, device, half)
    with _listening(host, port) as listener:
        app = build_app(served, Limits(max_bytes, max_pixels, batch_size=batch_size))
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        logging.getLogger("uvicorn.error").addFilter(_no_cancellation)
        number = listener.getsockname()[1]
        started(f"http://{f'[{host}]' if ':' in host else host}:{number}")
        uvicorn.Server(config).run(sockets=[listener])


def _no_cancellation(record: logging.LogRecord) -> bool:
    """Not what uvicorn says of requests that a second Ctrl-C has cancelled."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        remedy = (
            "Take another --port (0: one that is free), or an address of this machine for --host."
        )
        raise UserError(f"{host}, port {port}: {error.strerror or error}", remedy) from None
