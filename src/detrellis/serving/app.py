"""What the server answers.

| request | answer |
| --- | --- |
| `GET /` | a page on which a picture can be dropped |
| `GET /health` | the recipe and the classes; 503 where the detector no longer works |
| `POST /predict?threshold=0.5` | the detections in a picture: the body itself, or the one file of a multipart form |

Every error is JSON, `{"error": {"message": ..., "remedy": ...}}`: 400 for what is no picture, 408
for a body that does not come, 413 for too many bytes or pixels, 503 with `Retry-After` where too
many requests wait.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.formparsers import MultiPartException
from starlette.types import Message
from torch import Tensor

from detrellis.data.decode import read_header, read_image, upright_size
from detrellis.errors import UserError
from detrellis.predictions.record import Prediction
from detrellis.serving.batcher import Batcher
from detrellis.serving.detector import Served
from detrellis.serving.page import page
from detrellis.version import __version__

BODY_SECONDS = 60.0  # for a whole body to come
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: "
    "data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
NO_PICTURE = "Send a picture (JPEG, PNG, ...) as the body, or as the one file of a multipart form."


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and how pictures are put together."""

    max_bytes: int = 32 * 2**20  # of a body
    max_pixels: int = 50_000_000
    requests: int = 64  # at a time; others are sent away
    batch_size: int = 8
    batch_seconds: float = 0.005  # that a picture waits for others


def build_app(served: Served, limits: Limits) -> FastAPI:
    """The application; its detector works as long as the application's lifespan lasts."""
    batcher = Batcher(served.detect, limits.batch_size, limits.batch_seconds)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # By a second Ctrl-C, which does not wait for requests
        with suppress(asyncio.CancelledError):
            yield
        await run_in_threadpool(batcher.close)

    app = FastAPI(
        title="Detrellis", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    desk = _Desk(limits)
    shown = page(served.name, len(served.classes), min(served.thresholds))

    @app.get("/", response_class=HTMLResponse)
    async def show() -> HTMLResponse:
        return HTMLResponse(
            shown, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        )

    @app.get("/health")
    async def health() -> JSONResponse:
        about = {
            "model": served.name,
            "classes": list(served.classes.names),
            "version": __version__,
        }
        status = "ok" if batcher.alive else "the detector has ended"
        return JSONResponse({"status": status} | about, 200 if batcher.alive else 503)

    @app.post("/predict")
    async def predict(
        request: Request, threshold: Annotated[float | None, Query(ge=0, le=1)] = None
    ) -> JSONResponse:
        async with desk.place():
            name, body = await desk.picture_of(request)
            pixels = await run_in_threadpool(decode, body, name, limits.max_pixels)
            prediction = await asyncio.wrap_future(batcher.submit(pixels))
        least = served.thresholds if threshold is None else [threshold] * len(served.classes)
        return JSONResponse(answer(prediction, name, least))

    for kind in (AnyHTTPException, RequestValidationError, UserError, Exception):
        app.add_exception_handler(kind, _refuse)
    return app


class _Desk:
    """Where requests are let in, as many as the limits allow,
    and their bodies read, as far as they allow.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits, self._inside = limits, 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place for one request; 503 where all are taken."""
        if self._inside >= self._limits.requests:
            raise HTTPException(
                503, f"{self._inside} requests are waiting: try again", {"Retry-After": "1"}
            )
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def picture_of(self, request: Request) -> tuple[str, bytes]:
        """Name and bytes of the picture that was sent;
        of a body that is too large no more is read than allowed.
        """
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._body(request)
        except TimeoutError:
            raise HTTPException(408, f"the body did not come within {BODY_SECONDS:.0f} s") from None
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return "picture", body
        form = Request(request.scope, _once(body)).form(max_files=1, max_fields=8)
        try:
            async with form as fields:
                files = [value for value in fields.values() if isinstance(value, UploadFile)]
                if len(files) != 1:
                    raise UserError("the form has no file", NO_PICTURE)
                return files[0].filename or "picture", await files[0].read()
        except (MultiPartException, AnyHTTPException) as error:
            raise UserError(f"the form cannot be read ({_said(error)})", NO_PICTURE) from None

    async def _body(self, request: Request) -> bytes:
        allowed, body = self._limits.max_bytes, bytearray()
        stated = request.headers.get("content-length", "")
        too_much = HTTPException(413, f"more than {allowed / 2**20:g} MiB: send a smaller file")
        if stated.isdecimal() and int(stated) > allowed:
            raise too_much
        async for chunk in request.stream():
            body += chunk
            if len(body) > allowed:
                raise too_much
        return bytes(body)


def decode(body: bytes, name: str, max_pixels: int) -> Tensor:
    """The pixels of a picture, `(3, H, W)` uint8 RGB.
    It is decoded only where its header names few enough of them.

    Raises `UserError` where it is no picture, and `HTTPException` with 413 where it is too large.
    """
    if not body:
        raise UserError("an empty body", NO_PICTURE)
    with tempfile.TemporaryDirectory() as folder:  # the one reader of pictures takes files
        path = Path(folder, "picture")
        path.write_bytes(body)
        try:
            height, width = upright_size(read_header(path))
            if height * width > max_pixels:
                raise HTTPException(
                    413,
                    (
                        f"{name}: {width}x{height} pixels, and at most {max_pixels:,}: send a "
                        "smaller one"
                    ),
                )
            return read_image(path)
        except UserError as error:
            raise UserError(error.message.replace(str(path), name), NO_PICTURE) from None


def answer(prediction: Prediction, name: str, thresholds: Sequence[float]) -> dict[str, Any]:
    """Size and detections, each as `predict` writes it to `predictions.json`,
    from its class's threshold on.
    """
    height, width = prediction.size
    rows = zip(prediction.to_coco(0), prediction.labels, strict=True)
    kept = [row | {"file_name": name} for row, label in rows if row["score"] >= thresholds[label]]
    return {"file_name": name, "width": width, "height": height, "detections": kept}


def _once(body: bytes) -> Any:
    """What gives a body that has been read to a second reader."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    """Any error as JSON with its status."""
    headers: Mapping[str, str] | None = None
    if isinstance(error, UserError):
        status, message, remedy = 400, error.message, error.remedy
    elif isinstance(error, AnyHTTPException):
        status, message, remedy, headers = error.status_code, _said(error), "", error.headers
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        status, message, remedy = 400, f"{first['loc'][-1]}: {first['msg']}", "See /openapi.json."
    else:
        status = 500
        message = "the picture could not be answered"
        remedy = "The server's log says more."
    return JSONResponse({"error": {"message": message, "remedy": remedy}}, status, headers)


def _said(error: Exception) -> str:
    return str(getattr(error, "detail", "") or getattr(error, "message", "") or error)
