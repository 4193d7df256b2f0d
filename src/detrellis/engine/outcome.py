"""What training returns."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detrellis.engine.eval_result import EvalResult
from detrellis.engine.transfer_report import TransferReport


@dataclass(frozen=True)
class TrainResult:
    """Where a run is, how far it came, and how well it did."""

    run: Path
    epochs: int  # those that are finished
    steps: int
    seconds: float
    best: float | None  # highest AP after any epoch
    result: EvalResult | None  # of the last evaluation
    finished: bool  # False: stopped by a signal; resume to go on
    signal: int | None = None  # its number: the command line exits with 128 more
    early: bool = False  # whether it finished because AP rose no more, before its last epoch
    transfer: TransferReport | None = None  # what was kept of the weights that it started from

    def stopped(self) -> str:
        """What stopped an unfinished run, and where."""
        assert self.signal is not None
        return f"Stopped by {signal.Signals(self.signal).name} after step {self.steps}, and saved."

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON holds it."""
        result = None if self.result is None else self.result.to_dict()
        transfer = None if self.transfer is None else self.transfer.to_dict()
        return {**vars(self), "run": str(self.run), "result": result, "transfer": transfer}
