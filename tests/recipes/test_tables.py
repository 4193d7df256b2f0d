"""The papers' tables: every row says what was published and where,
and every run can be built and trained.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

from detrellis.errors import UserError
from detrellis.recipes import RECIPES, Recipe, find_recipe, tiny_sized
from detrellis.recipes.build import build
from detrellis.recipes.tables import PaperRow, PaperTable, load_paper, papers
from detrellis.types import Targets

from ..small import CLASSES, images, shrink, targets

TABLES = {f"{name} {table.id}": table for name in papers() for table in load_paper(name).tables}
ROWS = {f"{place}, {row.name}": row for place, table in TABLES.items() for row in table.rows}
RUNS = {place: row for place, row in ROWS.items() if not row.missing}

every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())


def test_every_experiment_of_the_papers_is_there() -> None:
    expected = {
        "align": ["1", "2", "3", "4", "5", "fig1", "preprint", "release"],
        "co": [str(n) for n in range(2, 14)],
        "group": ["1", "2", "3", "fig1"],
        "sam": ["1", "2", "3", "4", "5", "fig6", "fig7", "release"],
    }
    assert {name: [t.id for t in load_paper(name).tables] for name in papers()} == expected
    assert all(load_paper(name).name == name for name in papers())


def test_loading_imports_no_torch() -> None:
    code = (
        "import sys; from detrellis.recipes import tables; tables.load_paper('co'); assert "
        "'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@every_table
def test_rows_are_told_apart(table: PaperTable) -> None:
    names = [row.name for row in table.rows]
    assert len(set(names)) == len(names)
    assert not any(name.isdecimal() for name in names)  # would be taken for a number of a row


@every_table
def test_rows_say_what_was_published_and_where(table: PaperTable) -> None:
    for row in table.rows:
        assert row.source, row.name
        assert row.published or row.note, row.name
        assert row.recipe or row.missing, row.name
        assert all(0 < value < 100 for value in row.published.values()), row.name
        assert row.published.get("AP75", 0) <= row.published.get("AP50", 100), row.name


@every_table
def test_rows_of_a_part_are_different_runs(table: PaperTable) -> None:
    runs = [
        (row.part, str(row.boxes), row.build().model_dump_json())
        for row in table.rows
        if not row.missing
    ]
    assert len(set(runs)) == len(runs)


@pytest.mark.parametrize("name", papers())
def test_rows_name_where_their_boxes_come_from(name: str) -> None:
    paper = load_paper(name)
    for row in (row for table in paper.tables for row in table.rows if row.boxes is not None):
        giving = paper.table(row.boxes.table).row(row.boxes.row)
        assert (
            giving.build().detector.queries
            == row.build().override("detector.queries.frozen_boxes=false").detector.queries
        )


# Numbers of the specifications, which were read off the papers separately.
PUBLISHED = [
    (
        "align",
        "1",
        "Align-DETR 12e",
        {"AP": 50.5, "AP50": 67.7, "AP75": 55.3, "APs": 34.7, "APm": 53.6, "APl": 64.6},
    ),
    (
        "align",
        "1",
        "DINO 24e",
        {"AP": 50.4, "AP50": 68.3, "AP75": 54.8, "APs": 33.3, "APm": 53.7, "APl": 64.8},
    ),
    ("align", "2", "Align-H-DETR", {"AP": 49.3, "AP50": 67.2, "AP75": 53.7}),
    ("align", "3", "PSL + PMC", {"AP": 50.2, "AP50": 66.7, "AP75": 55.0}),
    ("align", "4", "without box weights", {"AP": 49.7, "AP50": 66.9, "AP75": 54.1}),
    ("align", "5", "alpha 0.75", {"AP": 47.6}),
    ("align", "5", "k 5", {"AP": 50.2}),
    ("align", "release", "IA-BCE 24e", {"AP": 51.4, "AP50": 69.1, "APl": 65.7}),
    ("co", "2", "Deformable-DETR K=2 36e", {"AP": 46.5}),
    ("co", "3", "DINO Swin-L K=0", {"AP": 58.5}),
    (
        "co",
        "4",
        "Co-DINO R50",
        {"AP": 52.1, "AP50": 69.4, "AP75": 57.1, "APs": 35.4, "APm": 55.4, "APl": 65.9},
    ),
    ("co", "6", "Co-DETR ViT-L", {"AP": 67.9, "AP_minival": 71.9}),
    ("co", "7", "six heads", {"AP": 48.9}),
    ("co", "8", "ATSS", {"AP": 46.8}),
    ("co", "9", "pos queries 12e", {"AP": 40.5}),
    ("co", "11", "Faster-RCNN K=2", {"AP": 46.7}),
    ("co", "12", "convs 5", {"AP": 42.0}),
    ("group", "1", "K=11 12e", {"AP": 37.6, "APs": 18.2, "APm": 40.7, "APl": 55.9}),
    ("group", "2", "Group DAB-DETR-DC5 12e", {"AP": 41.9}),
    ("group", "3", "Group Mask2Former", {"AP": 39.5}),
    (
        "sam",
        "1",
        "SAM-DETR++-R50 SMCA DN",
        {"AP": 44.8, "AP50": 62.6, "AP75": 47.9, "APs": 26.7, "APl": 60.9},
    ),
    ("sam", "2", "SMCA-DETR-R50 108e", {"AP": 45.6}),
    ("sam", "3", "MaxPool", {"AP": 27.0, "AP50": 50.2}),
    ("sam", "4", "within image", {"AP": 30.0, "AP50": 52.3, "AP75": 29.2}),
    ("sam", "5", "COCO, frozen", {"AP": 79.5}),
    ("sam", "release", "SAM-DETR-R50-DC5 SMCA 50e", {"AP": 45.0}),
]


@pytest.mark.parametrize(("paper", "table", "row", "numbers"), PUBLISHED)
def test_numbers_are_the_specifications(
    paper: str, table: str, row: str, numbers: dict[str, float]
) -> None:
    found = load_paper(paper).table(table).row(row).published
    assert found | numbers == found


@pytest.mark.parametrize("paper", papers())
def test_numbers_taken_from_other_tables_are_theirs(paper: str) -> None:
    rows = [row for table in load_paper(paper).tables for row in table.rows]
    found = [
        (row, m) for row in rows if (m := re.search(r"AP of Table (\w+), row (\d+)", row.source))
    ]
    assert found or paper == "co"
    for row, m in found:
        assert row.published["AP"] == load_paper(paper).table(m[1]).row(m[2]).published["AP"], (
            row.name
        )


def test_costs() -> None:
    assert load_paper("sam").table("1").row("SAM-DETR-R50").cost == {"params": 57, "gflops": 107}
    assert load_paper("co").table("7").row("six heads").cost == {"memory": 19385, "gpu_hours": 280}


# The papers print these differences.
@pytest.mark.parametrize(
    ("paper", "table", "row", "delta"),
    [
        ("align", "4", "all", 1.5),  # the baseline stands below
        ("align", "1", "Align-DETR 24e", 1.3),
        ("co", "2", "DAB-DETR-C5 K=2", 2.3),
        ("co", "2", "Deformable-DETR K=1 12e", 5.2),
        ("co", "2", "Deformable-DETR K=1 36e", 3.5),
        ("co", "3", "DINO Swin-L K=2", 1.0),
        ("co", "9", "pos queries 36e", 2.0),
        ("co", "11", "ATSS K=2", 1.2),
        ("group", "1", "K=11 50e", 2.5),
        ("group", "2", "Group DN-DETR-DC5 12e", 2.6),
        ("sam", "1", "SAM-DETR-R50-DC5", 13.2),
        ("sam", "3", "+ multi-scale", 19.6),
    ],
)
def test_deltas_refer_to_the_papers_baselines(
    paper: str, table: str, row: str, delta: float
) -> None:
    found = load_paper(paper).table(table)
    own = found.row(row)
    reference = found.baseline(own)
    assert reference is not None
    assert own.published["AP"] - reference.published["AP"] == pytest.approx(delta)


def test_baselines_have_none_themselves() -> None:
    table = load_paper("co").table("2")
    assert table.baseline(table.row(1)) is None
    table = load_paper("co").table("10")  # of all lengths
    assert table.baseline(table.row(1)) is None


def test_rows_are_found_by_name_and_number() -> None:
    table = load_paper("group").table("1")
    assert table.row(3) == table.row("3") == table.row("K=3 12e")


@pytest.mark.parametrize(
    ("paper", "table", "row", "message"),
    [
        ("alin", "1", "1", "Did you mean align"),
        ("align", "fig2", "1", "Did you mean fig1"),
        ("align", "x", "1", "paper align, table: there is no 'x'"),
        ("align", "1", "Aline-DETR 12e", "Did you mean Align-DETR 12e"),
        ("align", "1", "0", "It has rows 1 to 26"),
        ("align", "1", "27", "table 1: there is no row 27"),
    ],
)
def test_what_does_not_exist_is_named(paper: str, table: str, row: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_paper(paper).table(table).row(row)
    assert message in str(error.value)


def test_a_row_that_misses_something_says_what() -> None:
    with pytest.raises(
        UserError, match=r"Table 1, row 4 \(AdaMixer\) cannot be run: it needs AdaMixer"
    ):
        load_paper("align").table("1").row("AdaMixer").build()


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_rows_build_what_they_say(row: PaperRow) -> None:
    if row.missing:
        if row.recipe is not None:
            find_recipe(row.recipe).with_schemes(row.schemes).override([*row.full, *row.override])
        return
    base = find_recipe(row.recipe or "")
    full, tiny = row.build(), row.build(scale="tiny")
    assert full.override([*row.override, *row.full]) == full
    assert tiny.override(row.override) == tiny  # the scale undoes nothing
    assert tiny.optim == tiny_sized(base).optim  # and the row does not undo the scale
    assert tiny.detector.queries.count <= max(100, full.detector.queries.count)
    for recipe in (full, tiny):
        assert recipe.schedule.epochs == (row.epochs or recipe.schedule.epochs)
    assert Recipe.model_validate_json(full.model_dump_json()) == full


def test_published_lengths_and_others() -> None:
    row = load_paper("align").table("1").row("Align-DETR 24e")
    assert row.build().schedule.drops == (pytest.approx(20 / 24),)
    short = row.build(epochs=6)
    assert (short.schedule.epochs, short.schedule.drops) == (6, row.build().schedule.drops)
    assert load_paper("sam").table("1").row("SAM-DETR-R50").build().schedule.drops == (
        pytest.approx(10 / 12),
    )
    with pytest.raises(UserError, match=r"schedule\.epochs"):
        row.build(epochs=0)


def parts(recipe: Recipe) -> str:
    """What is built from a recipe. Of numbers that only weigh, whether they are zero."""
    built = (recipe.detector, recipe.loss, recipe.schemes)
    return str(
        [
            json.loads(part.model_dump_json(), parse_float=lambda text: float(text) > 0)
            for part in built
        ]
    )


PLAIN = "detector.backbone.drop_path=0"


def distinct() -> dict[str, Recipe]:
    """Every run that differs from others at the size of the tests, by its first row.

    Recipes as they are, and backbones, train in other tests.
    """
    seen = {parts(shrink(make().override(PLAIN))) for make in RECIPES.values()}
    found = {}
    for place, row in RUNS.items():
        recipe = shrink(row.build().override(PLAIN))
        if parts(recipe) not in seen:
            seen.add(parts(recipe))
            found[place] = recipe
    return found


def test_every_run_trains() -> None:
    truth = targets((2, 3))
    truth = Targets(*truth[:3], masks=torch.ones(5, 112, 112, dtype=torch.bool))
    runs = distinct()
    assert len(runs) > 50
    for place, recipe in runs.items():
        model = build(recipe, CLASSES)
        losses = torch.stack(list(model(images(), truth).losses.values()))
        assert losses.isfinite().all(), place
        losses.sum().backward()
        total = sum(
            float(p.grad.abs().sum()) for p in model.detector.parameters() if p.grad is not None
        )
        assert 0 < total < float("inf"), place
