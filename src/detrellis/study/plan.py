"""What a study trains, as a file beside its runs:
a second call goes on with it, and one with other settings is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from detrellis.atomic import replace_text
from detrellis.data.files import read_object
from detrellis.data.findings import SkipBad
from detrellis.errors import UserError, listed
from detrellis.outputs import Outputs
from detrellis.recipes import Recipe
from detrellis.recipes.migrate import FORMAT, read_recipe

# In a trial's folder: what it was trained on, once that is done; what it prints.
DONE, LOG = "done.json", "console.log"
PLAN = "plan.json"  # in the study's
SHOWN = 4  # differences that an error names


@dataclass(frozen=True)
class StudyRow:
    """One row of the study's table: a recipe to train."""

    name: str
    recipe: Recipe
    # Its baseline, the row that it is compared with; None: it is one, or has none
    against: str | None = None
    published: float | None = None  # the paper's AP, in percent
    branch: str = ""  # of scheme co, whose AP the row is of; empty: the detector's
    note: str = ""
    boxes: str = ""  # weights that the reference boxes are taken from; empty: they are its own

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON holds it."""
        return {**vars(self), "recipe": self.recipe.model_dump(mode="json")}


@dataclass(frozen=True)
class Trial:
    """One run: a row with a seed."""

    row: str
    seed: int
    recipe: Recipe
    branch: str = ""
    boxes: str = ""

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        """Where it is trained: `OUT/ROW/seed-S`. Names that differ have folders that differ."""
        return out / quote(self.row, safe=" +=,()") / f"seed-{self.seed}"


TrialState = Literal["waiting", "running", "stopped", "pruned", "failed", "finished"]


@dataclass
class TrialOutcome:
    """What became of a trial: its state, and the end of its log where it failed."""

    trial: Trial
    folder: Path
    state: TrialState = "waiting"
    log: str = ""  # the end of a failed trial's


@dataclass(frozen=True)
class StudyPlan:
    """Rows, seeds and data. Raises `UserError` where there is no row,
    and for a name that stands twice.
    """

    title: str
    rows: tuple[StudyRow, ...]
    data: Mapping[str, Any]  # the `DataSource`, as `to_dict` gives it
    seeds: tuple[int, ...] = (0,)
    skip_bad: SkipBad = False
    command: str = ""  # that began the study
    skipped: Mapping[str, str] = field(default_factory=dict)  # rows that cannot be trained, and why
    # For equal time: of each row's epoch, in multiples of the baseline's (see `paced`); None: equal
    # epochs.
    pace: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if not names:
            raise UserError(f"{self.title}: no row to train", "Name at least one.")
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{self.title}: row {name} stands twice", "Name each once.")
        assert all(row.against is None or row.against in names for row in self.rows)

    @property
    def baseline(self) -> str | None:
        """The row that all others are compared with;
        None where there are several such rows, or none.
        """
        return next(iter(self.baselines)) if len(self.baselines) == 1 else None

    @property
    def baselines(self) -> frozenset[str]:
        """All rows that others are compared with."""
        return frozenset(row.against for row in self.rows if row.against is not None)

    def row(self, name: str) -> StudyRow:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def trials(self) -> list[Trial]:
        """All runs, the first seed of every row first:
        a study that is stopped early can still be compared.
        """
        return [
            Trial(row.name, seed, row.recipe, row.branch, row.boxes)
            for seed in self.seeds
            for row in self.rows
        ]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        lists = {"rows": [row.to_dict() for row in self.rows], "seeds": list(self.seeds)}
        pace = None if self.pace is None else dict(self.pace)
        plain = {
            "data": dict(self.data),
            "skipped": dict(self.skipped),
            "pace": pace,
            "format": FORMAT,
        }
        return {**vars(self), **plain, **lists}

    def check(self, out: Path) -> None:
        """See that `OUT/plan.json`, if there is one, is the same study;
        it may get more rows and seeds.

        Raises `UserError` that names what differs otherwise.
        """
        old = read_plan(out)
        if old is None:
            Outputs(out).alone()
        if old is not None and (differing := differences(old, self.to_dict())):
            raise UserError(
                f"{out}: there is another study in this folder: {listed(differing, SHOWN, '; ')}",
                "Repeat its settings to go on with it, or take another --out.",
            )

    def begin(self, out: Path) -> None:
        """Write `OUT/plan.json`, once it has been checked."""
        self.check(out)
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / PLAN, json.dumps(self.to_dict(), indent=1))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences that keep plan `new` from going on with plan `old`,
    both as `to_dict` gives them.
    """
    differing = (
        []
        if old["skip_bad"] == new["skip_bad"]
        else [f"skip_bad {old['skip_bad']}, now {new['skip_bad']}"]
    )
    before, after = ("epochs" if plan.get("pace") is None else "time" for plan in (old, new))
    differing += [] if before == after else [f"equal {before}, now equal {after}"]
    differing += changes("data", old["data"], new["data"])
    if gone := [seed for seed in old["seeds"] if seed not in new["seeds"]]:
        differing.append(f"seed {', '.join(map(str, gone))} is left out now")
    rows = {row["name"]: row for row in new["rows"]}
    for row in old["rows"]:
        name = row["name"]
        if name not in rows:
            differing.append(f"row {name} is left out now")
        else:
            differing += changes(f"row {name}:", row["recipe"], rows[name]["recipe"])
            if (was := row.get("boxes", "")) != (now := rows[name]["boxes"]):
                differing.append(f"row {name}: boxes of {was or 'none'}, now of {now or 'none'}")
    return differing


def changes(where: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Values that differ between two nested dictionaries: "WHERE optim.lr 0.0001, now 0.0002"."""
    one, other = flat(old), flat(new)
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return [f"{where} {key} {one.get(key)}, now {other.get(key)}" for key in keys]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 1e-4, ...}: the leaves of a nested dictionary."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def read_plan(out: Path) -> dict[str, Any] | None:
    """`OUT/plan.json`, with recipes as this version writes them; None where there is none.

    Raises `UserError` for one that is cut off, or written by a newer version.
    """
    path = out / PLAN
    if not path.exists():
        return None
    plan = read_object(path, again="Take another --out")
    if missing := {"rows", "seeds", "data", "skip_bad"} - set(plan):
        listed = ", ".join(sorted(missing))
        raise UserError(f"{path}: not a whole plan of a study (no {listed})", "Take another --out.")
    written = plan.get("format", 1)
    if written > FORMAT:
        raise UserError(f"{path}: written by a newer Detrellis", "Update Detrellis to read it.")
    return plan | {
        "rows": [row | {"recipe": _as_now(row["recipe"], written)} for row in plan["rows"]]
    }


def _as_now(recipe: Any, written: int) -> dict[str, Any]:
    """A stored recipe as this version writes it, with the fields that are new."""
    return read_recipe(recipe, written).model_dump(mode="json")
