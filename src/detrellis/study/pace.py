"""Equal training time in place of equal epochs:
how long an epoch of each row takes here, and how many it then gets.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from detrellis.data.doctor.check import prepare
from detrellis.data.layout import DataSource
from detrellis.distributed import pick_device
from detrellis.engine.bench import seconds_of, threads_of, training_step
from detrellis.errors import UserError
from detrellis.recipes import Recipe
from detrellis.study.plan import StudyPlan, StudyRow, read_plan
from detrellis.study.run import Resources

WARMUP, STEPS = 2, 7  # of each of the two rows that are compared; the first ones compile


def paced(
    plan: StudyPlan, out: Path, resources: Resources, say: Callable[[str], None]
) -> StudyPlan:
    """The plan with as many epochs for each row as take the time of its baseline's,
    on this machine.

    Where the study in `out` goes on, each row keeps its pace of there; of the others some steps are
    timed, of the row and its baseline in turn. Rows without a baseline keep their epochs. Raises
    `UserError` where another study is in `out`, before anything is timed, and where a step does not
    fit into memory.
    """
    against = {row.name: plan.row(row.against) for row in plan.rows if row.against is not None}
    old = (read_plan(out) or {}).get("pace") or {}
    known = {name: old[name] for name in against if name in old}
    _lasting(plan, known).check(out)
    if missing := [name for name in against if name not in known]:
        train, _, classes, _ = prepare(DataSource.from_dict(plan.data), skip_bad=plan.skip_bad)
        boxes = max(1, round(len(train.labels) / len(train)))
        device = pick_device(resources.devices()[0])
        say(f"Timing steps of {', '.join(missing)}, to give all rows the same time")
        with threads_of(resources.threads_each()):
            known |= {
                n: _ratio(plan.row(n), against[n], len(classes), boxes, device) for n in missing
            }
    return _lasting(plan, known)


def _lasting(plan: StudyPlan, pace: dict[str, float]) -> StudyPlan:
    """The plan with the epochs that follow from the paces; a row that has none keeps its own."""

    def paced_row(row: StudyRow) -> StudyRow:
        if row.against is None or row.name not in pace:
            return row
        epochs = max(1, round(plan.row(row.against).recipe.schedule.epochs / pace[row.name]))
        return replace(row, recipe=row.recipe.override(f"schedule.epochs={epochs}"))

    return replace(plan, pace=pace, rows=tuple(map(paced_row, plan.rows)))


def _ratio(row: StudyRow, base: StudyRow, classes: int, boxes: int, device: torch.device) -> float:
    """The time of an image in `row`, in multiples of that in `base`: from medians of steps that
    alternate, so that whatever else the machine does slows both. Steps are on random images of each
    recipe's own size and batch; where schemes are switched off in the course of the run, those of
    each of its stages, weighed by how long it is."""
    stages = [stages_of(r.recipe) for r in (row, base)]
    try:
        steps = [training_step(r, classes, device, boxes) for each in stages for _, r in each]
        times = [[seconds_of(step, device) for step in steps] for _ in range(WARMUP + STEPS)]
    except torch.OutOfMemoryError:
        raise UserError(
            f"{row.name} and {base.name}: a step of each does not fit into the memory of {device}",
            "Take a smaller batch or smaller images: -o optim.batch_size=2, -o data.size=480.",
        ) from None
    medians = map(statistics.median, zip(*times[WARMUP:], strict=True))
    own_time, base_time = (sum(part * next(medians) for part, _ in each) for each in stages)
    images = base.recipe.optim.batch_size / row.recipe.optim.batch_size
    return float(round(own_time / base_time * images, 3))


def stages_of(recipe: Recipe) -> list[tuple[float, Recipe]]:
    """The parts of a run between which schemes are switched off: the length of each, with 1 for the
    whole run, and the recipe with the schemes that are left in it."""
    untils = {name: config.until for name, config in recipe.schemes if config is not None}
    stages, begin = [], 0.0
    for end in sorted({*untils.values(), 1.0}):
        over = {name: None for name, until in untils.items() if until <= begin}
        left = recipe.schemes.model_copy(update=over)
        stages.append((end - begin, recipe.model_copy(update={"schemes": left})))
        begin = end
    return stages
