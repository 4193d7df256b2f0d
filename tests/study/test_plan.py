"""Which rows a study has, and that its folder belongs to it alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from detrellis.data.layout import resolve
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import save_weights
from detrellis.errors import UserError
from detrellis.recipes import find_recipe, tiny_sized
from detrellis.recipes.build import build
from detrellis.recipes.tables import load_paper
from detrellis.study.plan import StudyPlan, StudyRow, differences
from detrellis.study.rows import parse_rows, plan_schemes, plan_table, with_exactly

from .trials import make_plan


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("none", [[]]),
        ("none,align, group=3", [[], ["align"], ["group=3"]]),
        ("co=atss+rcnn", [["co=atss+rcnn"]]),
        ("co=atss+rcnn+align", [["co=atss+rcnn", "align"]]),
        ("co=atss+rcnn@0.5+align@0.25", [["co=atss+rcnn@0.5", "align@0.25"]]),
        ("align + co=atss+rcnn + group=3,", [["align", "co=atss+rcnn", "group=3"]]),
        ("co+align", [["co", "align"]]),
        ("none+align", [["align"]]),
        ("align+rcnn", [["align", "rcnn"]]),  # no list to belong to: refused as a scheme later
        ("co=atss+gruop=3", [["co=atss", "gruop=3"]]),
    ],
)
def test_schemes_of_a_row_are_split_where_a_scheme_begins(text: str, rows: list[list[str]]) -> None:
    assert parse_rows(text) == rows


def test_a_row_has_exactly_its_schemes_with_the_recipes_dials() -> None:
    recipe = find_recipe("tiny").override(["schemes.cdn.number=7", "schemes.group.reduction=sum"])
    bare = with_exactly(recipe, [])
    assert all(value is None for _, value in bare.schemes)
    both = with_exactly(recipe, ["cdn", "group=2"])
    assert (both.schemes.cdn and both.schemes.cdn.number) == 7
    assert both.schemes.group is not None
    assert (both.schemes.group.k, both.schemes.group.reduction) == (2, "sum")
    assert both.schemes.align is None


def test_plan_of_schemes(shapes: Path) -> None:
    source = resolve(shapes)
    plan = plan_schemes(
        "tiny", "none,align+cdn", source, seeds=(0, 1), epochs=4, override=["optim.lr=1e-3"]
    )
    assert [(row.name, row.against) for row in plan.rows] == [("none", None), ("align+cdn", "none")]
    assert {row.recipe.schedule.epochs for row in plan.rows} == {4}
    assert {row.recipe.optim.lr for row in plan.rows} == {1e-3}
    # The first seed of all rows first.
    assert [str(trial) for trial in plan.trials()][:2] == ["none, seed 0", "align+cdn, seed 0"]
    assert plan.baseline == "none"


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("tiny", ["cdn", "cdn+stable", "cdn+align=1", "cdn+group=3"]),
        ("deformable-detr-r50", ["none", "stable", "align=1", "group=3"]),
        ("stable-dino-r50", ["cdn+stable", "cdn+stable+group=3"]),
        ("detr-r50", ["none", "group=3"]),
    ],
)
def test_rows_that_nobody_names(shapes: Path, recipe: str, names: list[str]) -> None:
    """The recipe's own schemes, and what goes with them."""
    plan = plan_schemes(recipe, None, resolve(shapes), seeds=(0,), scale="tiny")
    assert [row.name for row in plan.rows] == names


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        (",", "no row"),
        ("align", "one row, and no other to compare it with\n  Add one: --schemes none,align."),
        ("none", "Add one: --schemes none,align."),
        ("none,aling", "Did you mean align"),
        ("align,align", "stands twice"),
        ("align,none+align", "stands twice"),
        ("none,align+stable", "align and stable both set"),
        ("co=atss+rcn", "branches"),
    ],
)
def test_rows_that_cannot_be_trained_are_refused_first(
    shapes: Path, schemes: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_schemes("tiny", schemes, resolve(shapes), seeds=(0,))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.size=64", "data.augment=fixed needs one size for all images"),
        ("data.augment=detr", r"`detr` with the fixed size \(192, 256\)"),
    ],
)
def test_pictures_that_cannot_be_augmented_are_refused_first(
    shapes: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_schemes("tiny", "none,align", resolve(shapes), seeds=(0,), override=[override])


def test_data_without_validation_is_refused(shapes: Path) -> None:
    source = resolve(
        None, shapes / "annotations" / "instances_train.json", shapes / "images" / "train"
    )
    with pytest.raises(UserError, match="no validation split"):
        plan_schemes("tiny", "none,align", source, seeds=(0,))


def test_the_same_plan_goes_on_and_may_grow(tmp_path: Path) -> None:
    plan = make_plan({"none": None, "align": None}, seeds=(0,))
    plan.begin(tmp_path)
    plan.begin(tmp_path)
    wider = make_plan({"none": None, "align": None, "group": None}, seeds=(0, 1, 2))
    wider.begin(tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["seeds"] == [0, 1, 2]
    with pytest.raises(UserError, match=r"seed 1, 2 is left out now; row group is left out now"):
        plan.begin(tmp_path)


def test_another_plan_is_refused_by_what_differs(tmp_path: Path) -> None:
    plan = make_plan({"none": None, "align": None})
    plan.begin(tmp_path)
    longer = make_plan({"none": None, "align": None}, epochs=9)
    with pytest.raises(
        UserError, match=r"row none: schedule.epochs 3, now 9; row align: .*\n.*another --out"
    ):
        longer.begin(tmp_path)
    elsewhere = replace(
        plan, data={"kind": "voc", "splits": {"train": {"annotations": "/data/other.json"}}}
    )
    with pytest.raises(
        UserError,
        match=r"data kind coco, now voc; data splits.train.annotations /data/train.json, now",
    ):
        elsewhere.begin(tmp_path)
    with pytest.raises(UserError, match="skip_bad False, now True"):
        replace(plan, skip_bad=True).begin(tmp_path)
    with pytest.raises(UserError, match="equal epochs, now equal time"):
        replace(plan, pace={"align": 1.2}).begin(tmp_path)
    many = replace(plan, rows=tuple(replace(r, recipe=find_recipe("dino-r50")) for r in plan.rows))
    with pytest.raises(UserError, match=r", and \d+ more"):
        many.begin(tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(
        json.dumps(plan.to_dict())
    )


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    plan = make_plan({"none": None})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file, not a folder"):
        plan.begin(tmp_path / "file")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match="malformed JSON"):
        plan.begin(tmp_path)
    (tmp_path / "plan.json").write_text('{"tasks": []}')  # somebody else's
    with pytest.raises(UserError, match="no data, rows, seeds, skip_bad"):
        plan.begin(tmp_path)
    (tmp_path / "plan.json").unlink()
    with pytest.raises(UserError, match="file: is there already"):
        plan.begin(tmp_path)


def test_folders_of_rows_differ_whatever_they_are_called(tmp_path: Path) -> None:
    recipe = find_recipe("tiny")
    names = ["a/b", "a%2Fb", "a b", "co=atss+rcnn"]
    plan = StudyPlan("odd", tuple(StudyRow(name, recipe) for name in names), {})
    folders = [trial.folder(tmp_path) for trial in plan.trials()]
    assert len(set(folders)) == len(names)
    assert all(folder.resolve().parents[1] == tmp_path for folder in folders)
    assert tmp_path / "co=atss+rcnn" / "seed-0" in folders


def test_rows_of_a_papers_table(shapes: Path) -> None:
    paper = load_paper("align")
    table = paper.table("1")
    plan = plan_table(
        paper, table, resolve(shapes), seeds=(0,), scale="tiny", epochs=2, only=["Align-DETR 12e"]
    )
    assert [(r.name, r.against, r.published) for r in plan.rows] == [
        ("DINO 12e", None, 49.0),
        ("Align-DETR 12e", "DINO 12e", 50.5),
    ]
    assert {row.recipe.schedule.epochs for row in plan.rows} == {2}
    assert plan.title.endswith("Table 1: Comparison with other DETRs, ResNet-50")
    with pytest.raises(UserError, match="AdaMixer"):
        plan_table(paper, table, resolve(shapes), seeds=(0,), scale="tiny", only=["AdaMixer"])


def test_rows_of_branches_are_trained_for_them(shapes: Path) -> None:
    paper = load_paper("co")
    plan = plan_table(
        paper, paper.table("11"), resolve(shapes), seeds=(0,), only=["ATSS K=2"], scale="tiny"
    )
    assert {trial.row: trial.branch for trial in plan.trials()} == {
        "ATSS K=0": "atss",
        "ATSS K=2": "atss",
    }


def test_a_row_begins_with_the_boxes_of_a_run_on_other_data(shapes: Path, tmp_path: Path) -> None:
    """SAM-DETR, Table 5: only the row that the paper gave COCO's boxes gets them."""
    paper = load_paper("sam")
    table, name = paper.table("5"), "COCO, frozen"
    plan_of = partial(plan_table, paper, source=resolve(shapes), seeds=(0,), scale="tiny")
    reason = (
        "Table 5, row 2 needs the reference boxes of Table 2, row SAM-DETR++-R50 SMCA, trained "
        "on COCO 2017 val"
    )
    assert plan_of(table).skipped == {name: reason}
    with pytest.raises(UserError, match="Table 5, row 2 needs") as error:
        plan_of(table, only=[name])
    assert "detrellis reproduce sam 2 --row 'SAM-DETR++-R50 SMCA' --data COCO" in str(error.value)

    run = tmp_path / "last.safetensors"
    recipe = tiny_sized(find_recipe("sam-detr-plus-r50-smca"))
    card = Card(recipe, resolve(shapes).load("train").classes, {})
    save_weights(run, build(recipe, 5).detector.state_dict(), card)
    plan = plan_of(table.with_boxes(run))
    assert {trial.row: trial.boxes for trial in plan.trials()} == {
        "scratch": "",
        name: str(run),
        "random, frozen": "",
    }
    elsewhere = plan_of(table.with_boxes(shutil.copy(run, tmp_path / "other.safetensors")))
    assert differences(plan.to_dict(), elsewhere.to_dict()) == [
        f"row {name}: boxes of {run}, now of {tmp_path / 'other.safetensors'}"
    ]

    fewer = recipe.override("detector.queries.count=7")
    save_weights(run, build(fewer, 5).detector.state_dict(), replace(card, recipe=fewer))
    with pytest.raises(UserError, match="7 reference boxes in the weights, 100 in this detector"):
        plan_of(table.with_boxes(run), only=[name])
    with pytest.raises(UserError, match="no row of table 4 takes another run's boxes"):
        paper.table("4").with_boxes(run)


def test_rows_that_miss_something_are_left_out_with_the_reason(shapes: Path) -> None:
    paper = load_paper("align")
    rows = [paper.table("1").row(name) for name in ("DINO 12e", "AdaMixer", "Align-DETR 12e")]
    short = paper.table("1").model_copy(update={"rows": tuple(rows)})
    plan = plan_table(paper, short, resolve(shapes), seeds=(0,), scale="tiny")
    assert [row.name for row in plan.rows] == ["DINO 12e", "Align-DETR 12e"]
    assert plan.skipped == {"AdaMixer": "needs AdaMixer"}
