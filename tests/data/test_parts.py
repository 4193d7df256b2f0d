"""Sets whose files say of no image whether it trains or validates:
a fixed part of the images validates, with all that belongs to it and all that is wrong with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import detrellis
from detrellis.data.annotations import Annotations
from detrellis.data.doctor.check import check, prepare
from detrellis.data.doctor.fix import fix
from detrellis.data.doctor.report import Report
from detrellis.data.layout import DataSource, resolve
from detrellis.data.records import RawDataset
from detrellis.data.splits import held_out
from detrellis.engine.evaluate import EvalOptions, evaluated_split
from detrellis.errors import UserError
from tests.data.sets import HEIGHT, WIDTH, picture
from tests.small import SMALL
from tests.test_cli import call

IMAGES = [f"photo {number:02}" for number in range(30)]
VALIDATING = held_out(IMAGES)


def write_coco(root: Path) -> Path:
    """One box an image, whose width is the image's number and one."""
    content: dict[str, Any] = {
        "images": [
            {"id": 100 + n, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH}
            for n, name in enumerate(IMAGES)
        ],
        "annotations": [
            {
                "id": n + 1,
                "image_id": 100 + n,
                "category_id": 1,
                "bbox": [2, 3, n + 1, 6],
                "area": 6 * (n + 1),
                "segmentation": [[2, 3, n + 3, 3, n + 3, 9]],
            }
            for n in range(len(IMAGES))
        ],
        "categories": [{"id": 1, "name": "cell"}],
    }
    (root / "images").mkdir(parents=True)
    for number, name in enumerate(IMAGES):
        picture(number).save(root / "images" / f"{name}.jpg")
    (root / "result.json").write_text(json.dumps(content))
    return root


def write_yolo(root: Path) -> Path:
    """The same, without outlines."""
    write_coco(root)
    (root / "result.json").unlink()
    (root / "classes.txt").write_text("cell")
    (root / "labels").mkdir()
    for number, name in enumerate(IMAGES):
        width = (number + 1) / WIDTH
        line = f"0 {2 / WIDTH + width / 2} {6 / HEIGHT} {width} {6 / HEIGHT}"
        (root / "labels" / f"{name}.txt").write_text(line)
    return root


def rewrite(root: Path, change: Callable[[dict[str, Any]], object]) -> DataSource:
    file = root / "result.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return resolve(data=root)


def errors(report: Report) -> dict[str, list[tuple[str, int | None, str]]]:
    """Code, id and words of each, by split."""
    found: dict[str, list[tuple[str, int | None, str]]] = {}
    for f in report.findings:
        if f.severity == "error":
            found.setdefault(f.split, []).append((f.code, f.id, f.what))
    return found


def names(data: RawDataset | Annotations) -> set[str]:
    return {data.path(row).stem for row in range(len(data))}


@pytest.mark.parametrize("write", [write_coco, write_yolo])
def test_each_image_is_in_one_part_with_its_boxes(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    source = resolve(data=write(tmp_path / "set"))
    assert 2 <= len(VALIDATING) <= 10
    train, val, *_ = prepare(source)
    assert val is not None
    assert names(val) == VALIDATING
    assert names(train) == set(IMAGES) - VALIDATING
    for part in (train, val):
        numbers = [IMAGES.index(part.path(row).stem) for row in range(len(part))]
        assert part.boxes[:, 2].round().tolist() == [number + 1 for number in numbers]


@pytest.mark.parametrize("write", [write_coco, write_yolo])
def test_a_part_is_the_same_when_it_is_read_alone(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    source = resolve(data=write(tmp_path / "set"))
    both = source.load_all()
    for split, raw in both.items():
        alone = source.load(split)
        assert alone.file_names == raw.file_names
        assert alone.findings == raw.findings
        np.testing.assert_array_equal(alone.boxes, raw.boxes)


@pytest.mark.parametrize("write", [write_coco, write_yolo])
def test_the_report_says_it_once_and_finds_nothing_else(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    report = check(resolve(data=write(tmp_path / "set")))
    (note,) = [f for f in report.findings if f.code == "layout"]
    assert "a fixed 4 in 5 images train, the others validate" in note.what
    assert {f.code for f in report.findings} == {"layout"}


def test_outlines_are_those_of_the_part(tmp_path: Path) -> None:
    source = resolve(data=write_coco(tmp_path / "set"))
    for raw in source.load_all().values():
        assert raw.segmentations is not None
        outlines = raw.segmentations(raw.box_image_ids.tolist(), raw.lines.tolist())
        widths = [outline[0][2] - outline[0][0] for outline in outlines]
        assert widths == raw.boxes[:, 2].tolist()


def test_what_is_wrong_is_found_in_its_part(tmp_path: Path) -> None:
    """Bad rows of both parts, one that belongs to no image, and one id for two images: all that is
    found in the file as a whole, in the same words, and once.
    """
    root = write_coco(tmp_path / "set")
    validating = [n for n, name in enumerate(IMAGES) if name in VALIDATING]
    training = [n for n, name in enumerate(IMAGES) if name not in VALIDATING]
    bad_in_val, bad_in_train = validating[1], training[3]
    twice = (training[5], validating[0])

    def spoil(content: dict[str, Any]) -> None:
        rows = content["annotations"]
        rows[bad_in_val]["bbox"] = [2, 3, 4]
        rows[bad_in_train]["bbox"] = "2 3"
        rows[validating[2]]["category_id"] = rows[training[7]]["category_id"] = [1]
        rows.append({"id": 1000, "image_id": 5, "category_id": 1, "bbox": [1, 1, 2, 2]})
        content["images"][twice[1]]["id"] = 100 + twice[0]
        rows[twice[1]]["image_id"] = 100 + twice[0]

    source = rewrite(root, spoil)
    report = check(source)
    found = errors(report)
    assert sorted(row for rows in found.values() for row in rows) == sorted(
        errors(check(source.as_whole()))["train"]
    )
    assert {(code, id) for code, id, _ in found["val"]} >= {
        ("bad-box", bad_in_val + 1),
        ("malformed-annotation", None),
    }
    assert {(code, id) for code, id, _ in found["train"]} >= {
        ("bad-box", bad_in_train + 1),
        ("malformed-annotation", None),
        ("unknown-image", 1000),
    }
    fix(source, report, tmp_path / "clean")
    clean = resolve(data=tmp_path / "clean").load_all()
    lost = {IMAGES[n] for n in (bad_in_val, bad_in_train, validating[2], training[7], *twice)}
    assert names(clean["val"]) == VALIDATING - lost
    assert names(clean["train"]) == set(IMAGES) - VALIDATING - lost
    assert not [
        f for f in check(resolve(data=tmp_path / "clean")).findings if f.severity == "error"
    ]


def test_a_single_image_trains_and_validates(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "set")

    def first(content: dict[str, Any]) -> None:
        content["images"], content["annotations"] = (
            content["images"][:1],
            content["annotations"][:1],
        )

    raws = rewrite(root, first).load_all()
    assert {split: names(raw) for split, raw in raws.items()} == {
        "train": {IMAGES[0]},
        "val": {IMAGES[0]},
    }


def test_a_run_that_held_images_out_is_evaluated_on_these(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "set")
    (data / "result.json").rename(data / "train.json")
    trained = resolve(data=data).held_out().to_dict()
    source, split = evaluated_split("run", trained, EvalOptions(data))
    assert names(source.load(split)) == VALIDATING


def test_a_named_file_is_not_divided(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "set")
    raws = resolve(train=root / "result.json").load_all()
    assert {split: len(raw) for split, raw in raws.items()} == {"train": len(IMAGES)}


@pytest.mark.parametrize("write", [write_coco, write_yolo])
def test_other_data_are_evaluated_on_as_a_whole(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    """A run's own data are not, whether they are named or not: it was trained on the rest."""
    own, other = (resolve(data=write(tmp_path / name)) for name in ("own", "other"))

    def evaluated(trained: DataSource, data: Path | None) -> set[str]:
        source, split = evaluated_split("run", trained.to_dict(), EvalOptions(data))
        return names(source.load(split))

    assert own.folder is not None
    assert other.folder is not None
    assert evaluated(own, other.folder) == set(IMAGES)
    assert evaluated(own, own.folder) == evaluated(own, None) == VALIDATING
    with pytest.raises(UserError, match="no split `val`"):  # it was trained on all of them
        evaluated(own.as_whole(), own.folder)


def write_csv(root: Path) -> Path:
    """The same; the widest box is in a part of its own, and the only one of its class."""
    write_coco(root)
    (root / "result.json").unlink()
    rows = [
        f"{name}.jpg,2,3,{n + 3},9,{'rare' if name == min(VALIDATING) else 'cell'}"
        for n, name in enumerate(IMAGES)
    ]
    (root / "labels.csv").write_text("\n".join(["filename,xmin,ymin,xmax,ymax,class", *rows]))
    return root


def test_a_class_that_only_the_held_out_part_shows_is_a_class(tmp_path: Path) -> None:
    """Formats that give classes by name: we divided the files, so that nobody else is to blame."""
    source = resolve(data=write_csv(tmp_path / "set"))
    train, val, classes, report = prepare(source)
    assert val is not None
    assert classes.names == ("cell", "rare")
    assert classes.names == source.load("val").classes.names
    assert set(train.labels.tolist()) == {0}
    assert set(val.labels.tolist()) == {0, 1}
    assert "class-only-in-val" in {f.code for f in report.findings}


def test_hold_out_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_coco(tmp_path / "set")
    named = ("check", "--train", root / "result.json", "--fast", "--json")
    images = []
    for words in ((), ("--hold-out",)):
        found = json.loads(call(*named, *words, capsys=capsys))
        images.append({summary["split"]: summary["images"] for summary in found["splits"]})
    assert images == [
        {"train": len(IMAGES)},
        {"train": len(IMAGES) - len(VALIDATING), "val": len(VALIDATING)},
    ]
    call("check", "--data", root, "--hold-out", capsys=capsys, code=2)


def test_a_run_says_what_was_held_out_and_goes_on_where_its_data_are_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a split that is called training, whose folder has moved."""
    small = [*SMALL, "data.size=[64, 64]", "optim.batch_size=8"]
    data, run = write_coco(tmp_path / "set"), tmp_path / "run"
    (data / "result.json").rename(data / "train.json")
    source = resolve(data=data).held_out()
    detrellis.train("tiny", data=source, epochs=1, override=small, workers=0, out=run)
    line = f"Held out to validate on: {len(VALIDATING)} of {len(IMAGES)} images"
    assert line in capsys.readouterr().out
    moved = data.rename(tmp_path / "moved")
    detrellis.resume(run, data=moved, epochs=2, workers=0)
    assert line in capsys.readouterr().out


def test_a_run_from_before_files_were_divided_goes_on_with_all_images(tmp_path: Path) -> None:
    before = resolve(data=write_coco(tmp_path / "set")).as_whole()
    assert set(before.splits) == {"train"}
    now = resolve(data=write_coco(tmp_path / "moved"))
    assert names(now.divided_as(before).load("train")) == set(IMAGES)
    assert now.divided_as(now) == now
