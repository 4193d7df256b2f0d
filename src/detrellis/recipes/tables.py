"""The papers' experiments as data:
what was published for each row of their tables, and the recipe that repeats it.

`papers/NAME.yaml` holds a paper's tables, and those of its figures whose points are runs. Numbers
are the papers', AP in percent; a row's note says what is inferred, and where paper and released
code differ. Loading imports no torch.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field

from detrellis.errors import UserError
from detrellis.fields import Config, Count, unknown_name
from detrellis.recipes import find_recipe, tiny_sized
from detrellis.recipes.config import Recipe

Named = TypeVar("Named")

# As `eval` names them; on a second split where a table has two. VOC's AP is at IoU 0.5.
Score = Literal["AP", "AP50", "AP75", "APs", "APm", "APl", "AP_test", "AP_minival"]
# Millions; GFLOPs; of training: MB, hours
Cost = Literal["params", "gflops", "memory", "gpu_hours"]


class BoxesOf(Config):
    """Reference boxes of another row of the paper, trained on that row's data."""

    table: str
    row: str
    run: str = ""  # such a run, or its weights; not in the paper's file

    def __str__(self) -> str:
        return f"Table {self.table}, row {self.row}"


class PaperRow(Config):
    """One run. `recipe`, then `schemes` and `override` as for `--scheme` and `-o`; `full`:
    overrides at full size only, where the tiny scale has its own (backbone, number of queries,
    batch).

    A row that is `missing` something has at most a part of its recipe, and cannot be built.
    """

    name: str
    part: str = ""  # of the table
    recipe: str | None = None
    schemes: tuple[str, ...] = ()
    override: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    epochs: Count | None = None  # None: not published, the recipe's
    # The epoch after which the learning rate falls; None: at the recipe's share of the run
    drop: Count | None = None
    published: dict[Score, float] = Field(default_factory=dict)
    cost: dict[Cost, float] = Field(default_factory=dict)
    source: str
    branch: str = ""  # of scheme co, whose own AP was published; empty: the detector's
    baseline: bool = False  # deltas refer to it
    boxes: BoxesOf | None = None  # None: its own
    missing: str = ""  # what the project lacks
    note: str = ""

    def build(self, epochs: int | None = None, scale: Literal["tiny"] | None = None) -> Recipe:
        """The recipe of this run, for `epochs` instead of the published ones,
        which hold at the tiny scale too.

        The scale comes first, so that it undoes nothing that the row is about. Raises `UserError`
        for a row that is missing something.
        """
        if self.missing or self.recipe is None:
            remedy = "Take a row that misses nothing."
            raise UserError(
                f"{self.source} ({self.name}) cannot be run: it needs {self.missing}", remedy
            )
        recipe = find_recipe(self.recipe)
        if scale == "tiny":
            recipe = tiny_sized(recipe)
        recipe = recipe.with_schemes(self.schemes, [*self._schedule(), *self.override])
        if scale is None:
            recipe = recipe.override(self.full)
        return recipe if epochs is None else recipe.override(f"schedule.epochs={epochs}")

    def _schedule(self) -> list[str]:
        """The published length as overrides."""
        length = [f"schedule.epochs={self.epochs}"] if self.epochs else []
        return length + (
            [f"schedule.drops=[{self.drop / self.epochs}]"] if self.drop and self.epochs else []
        )


class PaperTable(Config):
    """A table, or a figure. `id`: as the paper numbers it, "3" or "fig1";
    other words for what is in none.
    """

    id: str
    title: str
    data: str
    metric: Literal["coco", "voc"] = "coco"
    epochs: Count | None = None  # of rows that do not differ
    rows: tuple[PaperRow, ...]

    def row(self, which: str | int) -> PaperRow:
        """The row of that name or number, from 1;
        `UserError` with the nearest name, or the numbers there are.
        """
        if isinstance(which, int) or which.isdecimal():
            if not 1 <= int(which) <= len(self.rows):
                raise UserError(
                    f"table {self.id}: there is no row {which}",
                    f"It has rows 1 to {len(self.rows)}.",
                )
            return self.rows[int(which) - 1]
        return _named({row.name: row for row in self.rows}, which, f"table {self.id}, row")

    def with_boxes(self, run: str | Path) -> PaperTable:
        """The table whose rows that need another row's reference boxes take those of `run`;
        `UserError` without any.
        """
        if not any(row.boxes for row in self.rows):
            raise UserError(
                f"--boxes {run}: no row of table {self.id} takes another run's boxes",
                "Leave it out.",
            )
        place = Path(run)
        # Also for runs that are started elsewhere
        known = str(place.resolve() if place.exists() else run)
        rows = [
            row.model_copy(
                update={"boxes": row.boxes and row.boxes.model_copy(update={"run": known})}
            )
            for row in self.rows
        ]
        return self.model_copy(update={"rows": tuple(rows)})

    def baseline(self, row: PaperRow) -> PaperRow | None:
        """What the row is compared with: the baseline of its part and length that stands next above
        it, else the first below; None for a baseline itself, and where there is none."""
        at = self.rows.index(row)
        alike = [
            i
            for i, r in enumerate(self.rows)
            if r.baseline and (r.part, r.epochs) == (row.part, row.epochs)
        ]
        if row.baseline or not alike:
            return None
        return self.rows[max((i for i in alike if i < at), default=alike[0])]


class Paper(Config):
    """A paper's tables."""

    name: str
    title: str
    drops: dict[int, int]  # epochs of a run: the epoch after which its learning rate falls
    tables: tuple[PaperTable, ...]

    def table(self, id: str) -> PaperTable:
        """The table of that id; `UserError` with the nearest one otherwise."""
        return _named({table.id: table for table in self.tables}, id, f"paper {self.name}, table")


def papers() -> tuple[str, ...]:
    """The names of the papers."""
    return tuple(
        sorted(
            f.name.removesuffix(".yaml") for f in _folder().iterdir() if f.name.endswith(".yaml")
        )
    )


@cache
def load_paper(name: str) -> Paper:
    """The paper of that name; `UserError` with the nearest one otherwise."""
    if name not in papers():
        raise unknown_name(name, papers(), "paper")
    data = yaml.safe_load(_folder().joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return Paper.checked(
        data | {"tables": [_inherited(table, data["drops"]) for table in data["tables"]]}
    )


def _inherited(table: dict[str, Any], drops: dict[int, int]) -> dict[str, Any]:
    """The table with every row's length and schedule."""
    rows = [{"epochs": table.get("epochs")} | row for row in table["rows"]]
    return table | {"rows": [{"drop": drops.get(row["epochs"])} | row for row in rows]}


def _folder() -> Traversable:
    return resources.files("detrellis.recipes") / "papers"


def _named(known: dict[str, Named], name: str, where: str) -> Named:
    if name not in known:
        raise unknown_name(name, list(known), where)
    return known[name]
