"""Which rows a study has: one recipe with different training schemes,
or those of a paper's table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Literal

from detrellis.data.doctor.check import prepare
from detrellis.data.findings import SkipBad
from detrellis.data.layout import DataSource
from detrellis.errors import UserError
from detrellis.errors import command as shell_command
from detrellis.recipes import Recipe, find_recipe, tiny_sized
from detrellis.recipes.config import SCHEMES
from detrellis.recipes.tables import BoxesOf, Paper, PaperRow, PaperTable
from detrellis.study.plan import StudyPlan, StudyRow

KNOWN = (*SCHEMES, "none")
VOC = "The paper's AP is Pascal VOC's, at IoU 0.5: compare it with AP50"
Equal = Literal["epochs", "time"]  # what all rows of a study have in common
LISTS = ("co",)  # schemes whose own value has + in it: co=atss+rcnn
# What a study adds where nobody names rows: docs/results.md
USUAL = ("stable", "align=1", "group=3")


def parse_rows(text: str) -> list[list[str]]:
    """The schemes of each row: `"none,align+group=3"` gives `[[], ["align", "group=3"]]`.

    A row ends at a comma, a scheme at a + unless what follows belongs to a list:
    `co=atss+rcnn+align` is two schemes.
    """
    return [_schemes(row.strip()) for row in text.split(",") if row.strip()]


def _schemes(row: str) -> list[str]:
    schemes: list[str] = []
    for part in (p.strip() for p in row.split("+")):
        in_list = bool(schemes) and _name(schemes[-1]) in LISTS and "=" in schemes[-1]
        if in_list and _name(part) not in KNOWN and "=" not in part:
            schemes[-1] += f"+{part}"
        else:
            schemes.append(part)
    return [scheme for scheme in schemes if scheme != "none"]


def _name(scheme: str) -> str:
    """The scheme in `NAME=N@UNTIL`."""
    return re.split("[=@]", scheme, maxsplit=1)[0]


def with_exactly(recipe: Recipe, schemes: Sequence[str]) -> Recipe:
    """The recipe with these training schemes and no other; those that it had keep its dials."""
    named = {_name(scheme) for scheme in schemes}
    chosen = recipe.with_schemes(schemes)
    off = dict.fromkeys(name for name in SCHEMES if name not in named)
    return chosen.model_copy(update={"schemes": chosen.schemes.model_copy(update=off)})


def plan_schemes(
    recipe: str,
    schemes: str | None,
    source: DataSource,
    *,
    seeds: Sequence[int],
    epochs: int | None = None,
    scale: Literal["tiny"] | None = None,
    override: Sequence[str] = (),
    equal: Equal = "epochs",
    skip_bad: SkipBad = False,
    command: str = "",
) -> StudyPlan:
    """A row for each set of schemes in `schemes` (see `parse_rows`); the first is the baseline.
    Without them: the recipe's own, and each of `USUAL` that goes with the recipe, added to them.

    `override` sets fields of all rows; a dial such as `schemes.group.reduction=sum` only where a
    row has the scheme. With `equal="time"` rows that are slower than the baseline get fewer epochs,
    found when the study begins. Raises `UserError` for a row that the recipe cannot be trained
    with, and for data without a validation split.
    """
    base = find_recipe(recipe)
    base = (tiny_sized(base) if scale is not None else base).override(override)
    if epochs is not None:
        base = base.override(f"schedule.epochs={epochs}")
    if base.schedule.patience:
        raise UserError(
            "schedule.patience: a study compares rows of given lengths, and early stopping "
            "gives each another one",
            "Leave it out, or take -o schedule.patience=0.",
        )
    if schemes is None:
        schemes = _usual_rows(base)
    named = [("+".join(row) or "none", with_exactly(base, row)) for row in parse_rows(schemes)]
    if not named:
        raise UserError(
            f"--schemes {schemes}: no row",
            "For example: --schemes none,align,group=3,align+group=3.",
        )
    if len(named) == 1:
        more = "none,align" if named[0][0] == "none" else f"none,{schemes}"
        raise UserError(
            f"--schemes {schemes}: one row, and no other to compare it with",
            f"Add one: --schemes {more}.",
        )
    first = named[0][0]
    rows = tuple(StudyRow(name, own, None if name == first else first) for name, own in named)
    title = f"{base.name} with training schemes"
    plan = StudyPlan(
        title, rows, source.to_dict(), tuple(seeds), skip_bad, command, pace=_pace(equal)
    )
    classes = count_classes(source, skip_bad)
    for row in rows:
        check_row(row.recipe, classes)
    return plan


def _usual_rows(recipe: Recipe) -> str:
    """The recipe's own schemes, and those with each of `USUAL` that it can have, as rows."""
    own = [name for name, config in recipe.schemes if config is not None]
    rows = [own]
    for scheme in (s for s in USUAL if _name(s) not in own):
        row = [*own, scheme]
        with suppress(UserError):  # this recipe cannot have it
            check_row(with_exactly(recipe, row), classes=2)  # any number: none is refused for it
            rows.append(row)
    return ",".join("+".join(row) or "none" for row in rows)


def _pace(equal: Equal) -> dict[str, float] | None:
    """The paces of a plan before they are measured."""
    return {} if equal == "time" else None


def count_classes(source: DataSource, skip_bad: SkipBad) -> int:
    """The number of classes of a data set that can be trained and evaluated on;
    `UserError` for any other one, before a run begins."""
    _, validation, classes, _ = prepare(source, skip_bad=skip_bad)
    if validation is None:
        raise UserError(
            "the data set has no validation split, and nothing could be compared",
            "Name it with --val, or take --hold-out: one in five of the training images validates.",
        )
    return len(classes)


def check_row(recipe: Recipe, classes: int, boxes: str = "") -> None:
    """Raises `UserError` for a recipe that cannot be built, whose pictures cannot be augmented so,
    or that cannot begin with the reference boxes of the weights `boxes`. Nothing is allocated but
    these."""
    import torch  # only now: it takes seconds, and what can be refused without it has been

    from detrellis import api
    from detrellis.engine.samples import augmentation_of
    from detrellis.engine.transfer import take_boxes
    from detrellis.recipes.build import build

    with torch.device("meta"):
        model = build(recipe.untrained(), classes)
    augmentation_of(recipe)
    if boxes:
        take_boxes(model.detector, api.load(boxes, device="cpu").detector.state_dict())


def plan_table(
    paper: Paper,
    table: PaperTable,
    source: DataSource,
    *,
    seeds: Sequence[int],
    only: Sequence[str] = (),
    epochs: int | None = None,
    scale: Literal["tiny"] | None = None,
    equal: Equal = "epochs",
    skip_bad: SkipBad = False,
    command: str = "",
) -> StudyPlan:
    """The rows of a paper's table, each with its baseline there;
    `only`: some of them (names or numbers).

    Rows that cannot be trained are left out with the reason, unless `only` names them: then it is
    raised.
    """
    named = [table.row(which) for which in only]
    wanted = [
        row for which in named for row in (which, table.baseline(which)) if row is not None
    ] or table.rows
    classes = count_classes(source, skip_bad)
    recipes: dict[str, Recipe] = {}
    skipped: dict[str, str] = {}
    for row in (row for row in table.rows if row in wanted):
        try:
            recipes[row.name] = row.build(epochs, scale)
            if row.boxes and not row.boxes.run:
                raise _needs_boxes(paper, row, row.boxes)
            check_row(recipes[row.name], classes, row.boxes.run if row.boxes else "")
        except UserError as error:
            if row in named:
                raise
            recipes.pop(row.name, None)
            skipped[row.name] = f"needs {row.missing}" if row.missing else error.message
    rows = tuple(
        _published(table, table.row(name), recipe, recipes) for name, recipe in recipes.items()
    )
    title = f"{paper.title}, {place(table)}: {table.title}"
    return StudyPlan(
        title, rows, source.to_dict(), tuple(seeds), skip_bad, command, skipped, _pace(equal)
    )


def _needs_boxes(paper: Paper, row: PaperRow, giving: BoxesOf) -> UserError:
    """A row's reference boxes are those of another row, which is trained on that row's data."""
    data = paper.table(giving.table).data
    again = shell_command(
        "reproduce", paper.name, giving.table, "--row", giving.row, "--data", data.split()[0]
    )
    return UserError(
        f"{row.source} needs the reference boxes of {giving}, trained on {data}",
        f"Name that run's folder with --boxes. {again} trains it.",
    )


def _published(
    table: PaperTable, row: PaperRow, recipe: Recipe, recipes: Collection[str]
) -> StudyRow:
    base = table.baseline(row)
    against = None if base is None or base.name not in recipes else base.name
    note = ". ".join(
        text for text in (row.source, row.note, VOC if table.metric == "voc" else "") if text
    )
    return StudyRow(
        row.name,
        recipe,
        against,
        row.published.get("AP"),
        row.branch,
        note,
        row.boxes.run if row.boxes else "",
    )


def place(table: PaperTable) -> str:
    """`Table 3`, `Fig. 1`, or the name of what is in none."""
    return f"Table {table.id}" if table.id.isdecimal() else table.id.replace("fig", "Fig. ")
