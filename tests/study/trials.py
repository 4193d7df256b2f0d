"""Studies whose runs are made up: logs as the engine writes them, with the AP that a test wants."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detrellis.recipes import find_recipe
from detrellis.study.plan import DONE, StudyPlan, StudyRow, TrialOutcome

STEPS, BATCH = 10, 8  # an epoch's; of the recipe `tiny`
DATA = {
    "kind": "coco",
    "splits": {
        "train": {"annotations": "/data/train.json"},
        "val": {"annotations": "/data/v.json"},
    },
}


def make_plan(
    rows: Mapping[str, float | None], *, seeds: Sequence[int] = (0, 1, 2), epochs: int = 3
) -> StudyPlan:
    """Rows of the recipe `tiny` with their published AP; the first is the baseline."""
    recipe, first = find_recipe("tiny").override(f"schedule.epochs={epochs}"), next(iter(rows))
    made = [
        StudyRow(name, recipe, None if name == first else first, ap) for name, ap in rows.items()
    ]
    return StudyPlan("made up", tuple(made), DATA, tuple(seeds), command="detrellis compare")


def epoch_record(epoch: int, ap: float | None, rate: float | None) -> dict[str, Any]:
    """One epoch's, with AP in percent and `rate` images a second."""
    stats = None if ap is None else {"AP": ap / 100, "AP50": ap / 50, "AP75": ap / 200}
    head = {"kind": "epoch", "epoch": epoch, "step": STEPS * epoch, "images_per_second": rate}
    return head | {"eval": stats, "seconds": {"total": 1.0}, "losses": {}, "metrics": {}}


def finish(
    folder: Path,
    curve: Sequence[float | None],
    rate: float | None = 16.0,
    after_nms: Mapping[str, float] | None = None,
    resampled: Mapping[str, Sequence[float | None]] | None = None,
    **machine: Any,
) -> None:
    """A finished run with that AP after each epoch; `after_nms`: what the last has without
    duplicates, `resampled`: the AP of each draw of images."""
    folder.mkdir(parents=True)
    records = [epoch_record(epoch, ap, rate) for epoch, ap in enumerate(curve, 1)]
    records[-1] |= {"after_nms": after_nms, "resampled": resampled}
    steps = [{"kind": "step", "epoch": 1, "step": 1, "images_per_second": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*steps, *records]))
    told = {"device": "cpu", "threads": 1, "jobs": 1, "torch": "2", "peak_memory": 2**30}
    (folder / DONE).write_text(json.dumps(told | machine))


def outcomes(plan: StudyPlan, out: Path) -> list[TrialOutcome]:
    """What `run` would return for the runs that are there."""
    made = [TrialOutcome(trial, trial.folder(out)) for trial in plan.trials()]
    for outcome in made:
        outcome.state = "finished" if (outcome.folder / DONE).exists() else "stopped"
    return made
