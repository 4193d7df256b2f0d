"""The runs that a measurement compares: which they are, what they are called, and the images to measure them on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from detrellis.arguments import BatchSize, Split, Workers, checked
from detrellis.data.findings import SkipBad
from detrellis.data.layout import DataSource
from detrellis.distributed import process_group
from detrellis.engine.evaluate import EvalOptions
from detrellis.errors import UserError
from detrellis.loading import OpenedSplit, open_split

OneRun = TypeVar("OneRun")


class ComparedRuns:
    """One run or several, to be measured in the same way."""

    @checked
    def __init__(
        self,
        places: str | Path | Sequence[str | Path],
        *,
        names: Sequence[str] | None = None,
        device: str | None = None,
        progress: bool = False,
        data: str | Path | DataSource | None = None,
        val: str | Path | None = None,
        val_images: str | Path | None = None,
        split: Split = "val",
        batch_size: BatchSize = 4,
        skip_bad: SkipBad = False,
        workers: Workers = 2,
    ) -> None:
        """`places` are folders of runs, weights files, or checkpoints of others.

        `names` is what figures and tables call the runs (default: as much of the end of each path as tells them apart);
        `progress` shows a bar on a terminal. Each run is measured on `split` of its own data set, or all on that of
        `data`, or on the annotations `val`, with images in `val_images`; `skip_bad` drops bad records instead of
        refusing the data set. `batch_size` is in images, `workers` are the processes that load them.

        Raises `UserError` where there is no run, or where the names are not different and one a run.
        """
        self.places = [places] if isinstance(places, str | Path) else list(places)
        if not self.places:
            raise UserError("no run to measure", "Name at least one.")
        self.names = run_names(self.places, names)
        self.device, self.progress = device, progress
        self.split = split if val is None else "val"  # what a report calls the images
        self.options = EvalOptions(data, val, val_images, split, batch_size, skip_bad, workers)

    def measure(
        self, measure: Callable[[OpenedSplit, str, bool], OneRun], check: Callable[[str | Path], object] = Path
    ) -> tuple[OneRun, ...]:
        """What `measure(opened, name, show)` returns for each run; `show` says whether to draw progress.

        `check` is called with the place of every run before minutes are spent on the first. Raises `UserError` where
        a run or its images cannot be read.
        """
        for place in self.places:
            check(place)
        results = []
        with process_group(self.device) as process:
            show = self.progress and process.is_main_process
            for place, name in zip(self.places, self.names, strict=True):
                with open_split(place, process, self.options) as opened:
                    results.append(measure(opened, name, show))
        return tuple(results)


def run_names(runs: Sequence[str | Path], names: Sequence[str] | None = None) -> list[str]:
    """What figures and tables call the runs: `names`, or as much of the end of each path as tells them apart.

    The same run twice gets a number. Raises `UserError` unless `names` are different and one a run.
    """
    if names is not None:
        if len(names) != len(runs) or len(set(names)) != len(names) or not all(names):
            raise UserError(f"names {', '.join(names)}", f"Give one a run ({len(runs)}), all different.")
        return list(names)
    parts = [Path(os.path.abspath(run)).parts for run in runs]
    different = len(set(parts))
    depth = 1
    while len({p[-depth:] for p in parts}) < different:
        depth += 1
    ends = ["/".join(p[-depth:]) for p in parts]
    return [f"{name}-{ends[: i + 1].count(name)}" if name in ends[:i] else name for i, name in enumerate(ends)]
