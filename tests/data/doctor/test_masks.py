"""What the doctor says of outlines."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from detrellis.data.doctor.check import check
from detrellis.data.doctor.masks import check_masks
from detrellis.data.findings import Finding
from detrellis.data.formats import coco
from detrellis.data.layout import resolve

from ..sets import CocoSet


def runs(height: int, width: int, inside: bool = True) -> dict[str, Any]:
    mask = np.zeros((height, width), dtype=np.uint8, order="F")
    mask[4:16, 2:14] = inside
    packed = coco_mask.encode(mask)
    return {"size": packed["size"], "counts": packed["counts"].decode()}


def found(data: CocoSet) -> list[Finding]:
    return check_masks(resolve(data.write()).load("train"))


CROSSED = [2, 4, 14, 16, 14, 4, 2, 16]
CASES: dict[str, tuple[str, Any, str]] = {
    "null": ("missing-mask", None, "no mask, and others have one"),
    "empty list": ("missing-mask", [], "no mask"),
    "another size": (
        "mask-size",
        runs(48, 32),
        r"\[48, 32\] \(height, width\) in an image of \[32, 48\]",
    ),
    "no pixel": ("empty-mask", runs(32, 48, inside=False), "without a pixel"),
    "two points": ("empty-mask", [[2, 4, 14, 4]], "without a pixel"),
    "far away": ("empty-mask", [[102, 4, 114, 4, 114, 16]], "without a pixel"),
    "damaged": ("empty-mask", {"size": [32, 48], "counts": None}, "cannot be read"),
    "beyond": ("mask-outside", [[-6, 4, 14, 4, 14, 16, -6, 16]], "6 pixels beyond"),
    "elsewhere": (
        "mask-box",
        [[20, 4, 32, 4, 32, 16, 20, 16]],
        r"a box \[2, 4, 12, 12\] whose mask fills \[20, 4",
    ),
    "crossed": ("crossing-mask", [CROSSED], "crosses itself"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_names_the_first_of_each_kind(tmp_path: Path, name: str) -> None:
    code, value, words = CASES[name]
    data = CocoSet(tmp_path)
    data.box(0).update(segmentation=value, bbox=[2, 4, 12, 12])
    by_code = {f.code: f for f in found(data)}
    assert set(by_code) == ({code, "mask-box"} if name == "beyond" else {code})
    finding = by_code[code]
    assert (finding.count, finding.id, finding.noun) == (1, data.box(0)["id"], "annotation")
    assert finding.file == str(data.file("train"))
    assert re.search(words, finding.what)


ALRIGHT: dict[str, Callable[[CocoSet], object]] = {
    "as it is": lambda data: None,
    "a crowd without": lambda data: data.box(0).update(segmentation=None, iscrowd=1),
    "rounded": lambda data: data.box(0).update(
        segmentation=[[2, 4, 14.9, 4, 14.9, 16]], bbox=[2, 4, 12, 12]
    ),
    "no masks at all": lambda data: [
        row.update(segmentation=[]) for row in data.content["train"]["annotations"]
    ],
    "run lengths": lambda data: data.box(0).update(segmentation=runs(32, 48), bbox=[2, 4, 12, 12]),
}


@pytest.mark.parametrize("name", ALRIGHT)
def test_it_says_nothing_of_good_sets(tmp_path: Path, name: str) -> None:
    data = CocoSet(tmp_path)
    ALRIGHT[name](data)
    assert found(data) == []


def test_a_full_check_reads_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, read = CocoSet(tmp_path), []
    data.box(1)["segmentation"] = [CROSSED]
    parse = coco.load_json
    monkeypatch.setattr(coco, "load_json", lambda file: read.append(file.name) or parse(file))
    report = check(resolve(data.write()))
    assert len(read) == len(set(read)) == len(report.summaries)
    assert any(finding.code == "crossing-mask" for finding in report.findings)
