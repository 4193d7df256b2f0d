"""Pictures of requests that come at the same time, through the detector together."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from torch import Tensor

from detrellis.predictions.record import Prediction

Detect = Callable[[Sequence[Tensor]], list[Prediction]]
Waiting = tuple[Tensor, "Future[Prediction]"]


class Batcher:
    """One thread that owns the detector. It takes a picture, waits at most `seconds` until there
    are `batch_size` of them, and answers them together; pictures that come meanwhile are the next
    batch."""

    def __init__(self, detect: Detect, batch_size: int, seconds: float) -> None:
        self._detect, self._batch_size, self._seconds = detect, batch_size, seconds
        self._waiting: queue.Queue[Waiting | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="detector", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether pictures are answered."""
        return self._thread.is_alive()

    def submit(self, pixels: Tensor) -> Future[Prediction]:
        """What will be detected in a picture, `(3, H, W)` uint8 RGB."""
        future: Future[Prediction] = Future()
        self._waiting.put((pixels, future))
        return future

    def close(self) -> None:
        """Answer what has been submitted, and end."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, more = self._fill(first)
            self._answer([item for item in batch if item[1].set_running_or_notify_cancel()])
            if not more:
                return

    def _fill(self, first: Waiting) -> tuple[list[Waiting], bool]:
        """A batch that begins with `first`, and whether another may come after it."""
        batch, until = [first], time.monotonic() + self._seconds
        while len(batch) < self._batch_size:
            try:
                item = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if item is None:
                return batch, False
            batch.append(item)
        return batch, True

    def _answer(self, batch: list[Waiting]) -> None:
        """Answer every picture; one that makes a batch fail is answered with the error,
        and the others without it.
        """
        try:
            predictions = self._detect([pixels for pixels, _ in batch])
        except Exception as error:
            for item in batch if len(batch) > 1 else ():
                self._answer([item])
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            return
        for (_, future), prediction in zip(batch, predictions, strict=True):
            future.set_result(prediction)
