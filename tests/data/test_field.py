"""Data sets as people have them:
read right, or found, or refused with words that help; and one judgement for all.

A case lives in `tests/data/field/`, in the module of its area.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from detrellis.data.doctor.check import check, prepare
from detrellis.data.doctor.fix import fix
from detrellis.data.layout import DataSource, resolve
from detrellis.errors import UserError
from tests.data.field import coco, images, others, voc, yolo
from tests.data.field.cases import Case, Finds, Reads, Refused
from tests.data.field.pictures import wrong

CASES: list[Case] = [*coco.CASES, *voc.CASES, *yolo.CASES, *images.CASES, *others.CASES]


def parameters() -> list[object]:
    """A case that is pending must fail: one that passes by now shows that its mark is stale."""
    marks = {
        c.name: [pytest.mark.xfail(strict=True, reason=c.pending)] if c.pending else []
        for c in CASES
    }
    return [pytest.param(c, id=c.name, marks=marks[c.name]) for c in CASES]


def test_names_are_used_once() -> None:
    assert len({c.name for c in CASES}) == len(CASES)


@pytest.mark.parametrize("case", parameters())
def test_field(tmp_path: Path, case: Case) -> None:
    (tmp_path / "data").mkdir()
    arguments = case.build(tmp_path / "data")
    if isinstance(case.expects, Refused):
        refused(arguments, case.expects.words)
        return
    source = resolve(**arguments)
    if isinstance(case.expects, Reads):
        reads(source, case.expects)
    else:
        finds(source, case.expects)
    one_judgement(source)
    cleaned(source, tmp_path / "clean")


def refused(arguments: dict[str, Path], words: tuple[str, ...]) -> None:
    for use in (check, prepare):  # `check` and `train`
        with pytest.raises(UserError) as error:
            use(resolve(**arguments))  # type: ignore[operator]
        said = f"{error.value.message}\n{error.value.remedy}"
        for word in words:
            assert word in said, said


def reads(source: DataSource, expects: Reads) -> None:
    raws = source.load_all()
    report = check(source)
    assert [f.what for f in report.errors] == []
    assert [w for raw in raws.values() for w in wrong(raw)] == []
    assert sum(len(raw) for raw in raws.values()) == expects.images
    assert sum(len(raw.ids) for raw in raws.values()) == expects.boxes
    assert expects.finds <= {f.code for f in report.findings}


def finds(source: DataSource, expects: Finds) -> None:
    report = check(source)
    assert expects.codes <= {f.code for f in report.findings if f.severity != "note"}
    train, val, _, _ = prepare(source, skip_bad=True)
    left = [part for part in (train, val) if part is not None]
    assert sum(len(part) for part in left) == expects.images
    assert sum(len(part.ids) for part in left) == expects.boxes


def one_judgement(source: DataSource) -> None:
    """`train` refuses if and only if `check` has errors,
    and with `--skip-bad` goes on with boxes that are right.
    """
    splits = [split for split in ("train", "val") if split in source.splits]
    if check(source, fast=True, splits=splits).errors:
        with pytest.raises(UserError, match="the data set has errors"):
            prepare(source)
    else:
        prepare(source)
    train, val, _, _ = prepare(source, skip_bad=True)
    assert len(train.ids) > 0
    assert [w for part in (train, val) if part is not None for w in wrong(part)] == []


def cleaned(source: DataSource, out: Path) -> None:
    """The clean copy of `check --fix` has no errors, and its boxes are right."""
    fix(source, check(source), out)
    again = resolve(data=out)
    assert [f.what for f in check(again).errors] == []
    assert [w for raw in again.load_all().values() for w in wrong(raw)] == []
