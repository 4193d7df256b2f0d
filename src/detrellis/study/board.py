"""How a study looks while it runs: a table on a terminal, a line for each event elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from detrellis.engine.console import duration
from detrellis.engine.log import read_records
from detrellis.study.plan import TrialOutcome

REFRESH_SECONDS = 5.0  # logs are read again
STYLES = {
    "waiting": "dim",
    "running": "bold",
    "stopped": "yellow",
    "pruned": "yellow",
    "failed": "red",
    "finished": "green",
}


class Board:
    """Shows the trials of a study, and how far each one is."""

    def __init__(
        self, outcomes: Sequence[TrialOutcome], total: Callable[[], int], console: Console
    ) -> None:
        """`outcomes` may grow, up to as many as `total` says."""
        self._outcomes, self._total, self._console = outcomes, total, console
        self._since: dict[int, float] = {}  # of the trials that run
        self._read: dict[int, tuple[str, str]] = {}  # progress of those that do not
        self._shown = -REFRESH_SECONDS
        self._live = (
            Live(console=console, auto_refresh=False, transient=True)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def started(self, outcome: TrialOutcome) -> None:
        """Show that a trial begins, or goes on."""
        self._since[id(outcome)] = time.monotonic()
        if self._live is None:
            self.say(f"{self._counted(outcome)}  {outcome.trial}: started")
        self._shown = -REFRESH_SECONDS

    def ended(self, outcome: TrialOutcome) -> None:
        """Show that a trial has ended, whatever became of it."""
        took = time.monotonic() - self._since.pop(id(outcome))
        self._read.pop(id(outcome), None)
        if self._live is None or outcome.state == "failed":
            _, ap = progress(outcome.folder)
            self.say(
                f"{self._counted(outcome)}  {outcome.trial}: {outcome.state} after "
                f"{duration(took)}, AP {ap}"
            )
        self._shown = -REFRESH_SECONDS

    def refresh(self) -> None:
        """Draw the table again where it is due."""
        now = time.monotonic()
        if self._live is not None and now - self._shown >= REFRESH_SECONDS:
            self._shown = now
            self._live.update(self._table(now), refresh=True)

    def _progress(self, outcome: TrialOutcome) -> tuple[str, str]:
        if outcome.state == "running":
            return progress(outcome.folder)
        if id(outcome) not in self._read:
            self._read[id(outcome)] = progress(outcome.folder)
        return self._read[id(outcome)]

    def _counted(self, outcome: TrialOutcome) -> str:
        return f"{self._outcomes.index(outcome) + 1}/{self._total()}"

    def _table(self, now: float) -> Table:
        table = Table("row", "seed", "state", "epoch", "AP", "time", box=SIMPLE_HEAD)
        for outcome in self._outcomes:
            epoch, ap = self._progress(outcome)
            since = self._since.get(id(outcome))
            took = "" if since is None else duration(now - since)
            epochs = outcome.trial.recipe.schedule.epochs
            cells = (str(outcome.trial.seed), outcome.state, f"{epoch}/{epochs}", ap, took)
            # Text: it may be "[bold]"
            table.add_row(Text(outcome.trial.row), *cells, style=STYLES[outcome.state])
        return table


def progress(folder: Path) -> tuple[str, str]:
    """Epochs done and the last AP in percent, from a run's log."""
    log = folder / "metrics.jsonl"
    records = [r for r in read_records(log) if r["kind"] == "epoch"] if log.exists() else []
    aps = [r["eval"]["AP"] for r in records if r["eval"] and r["eval"]["AP"] is not None]
    return str(records[-1]["epoch"] if records else 0), f"{100 * aps[-1]:.1f}" if aps else "-"
