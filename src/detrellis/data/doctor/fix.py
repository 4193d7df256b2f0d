"""A clean copy of the annotations on disk: `detrellis check --fix OUT`.

`OUT/annotations/instances_<split>.json` in COCO's format, whatever the layout was. Images are
neither copied nor touched: each `file_name` stays relative to its old image folder, which stands in
`info.image_root`. So `--data OUT` finds the images where they are, other tools take the same files
with that folder, and `--train-images` overrides it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from detrellis.data.decode import read_header, upright_size
from detrellis.data.doctor.boxes import check_boxes
from detrellis.data.doctor.classes import align_classes
from detrellis.data.doctor.drop import drop_bad
from detrellis.data.doctor.report import Report
from detrellis.data.findings import RULES, Finding
from detrellis.data.formats.coco import ROOT_KEY, load_json
from detrellis.data.formats.coco_rows import rows_by_id, table_of
from detrellis.data.layout import DataSource
from detrellis.data.records import RawDataset, clip
from detrellis.errors import UserError
from detrellis.outputs import Outputs

SWAPPED = "width and height exchanged"  # beside the findings' codes in the counts
AREA = "area computed"
Extras = tuple[dict[str, Any], dict[int, dict[str, Any]], list[dict[str, Any]]]


@dataclass(frozen=True)
class FixResult:
    """The files that `fix` wrote, and what it changed."""

    out: Path
    files: Mapping[str, Path]  # by split
    changes: Mapping[str, Mapping[str, int]]  # by split and code: records dropped or changed

    def text(self) -> str:
        """A few lines for the console."""
        lines = [f"Clean copy in {self.out}"]
        for split, file in self.files.items():
            changed = ", ".join(f"{code}: {count:,}" for code, count in self.changes[split].items())
            lines.append(f"  {file.name}: {changed or 'nothing to change'}")
        return "\n".join([*lines, f"Train with --data {self.out}; the images stay where they are."])


def fix(source: DataSource, report: Report, out: Path, keep_partial: bool = False) -> FixResult:
    """Writes a copy of the annotations without what `report` found, and returns what was changed.

    Images with errors and boxes with errors are left out, and images that lose an object by that
    (`keep_partial`: these stay, and teach that it is not there). Boxes that leave their frame are
    clipped, but not where they may be corners; exact copies are removed, repeated annotation ids
    renumbered, missing areas computed, classes brought to training's ids. An image that another
    split has too is left out of the one that comes first (train), unless that is more than half of
    it. `report` must be a check of `source` as it is now; after a fast one, images that cannot be
    decoded are in the copy.

    Raises `UserError` where `out` holds anything but the copy that an earlier call made.
    """
    raws = source.load_all([summary.split for summary in report.summaries])
    targets = {split: out / "annotations" / f"instances_{split}.json" for split in raws}
    outputs = clean_folder(source, out)
    # All splits first, so that nothing is written where one of them cannot be.
    cleaned: dict[str, RawDataset] = {}
    changes: dict[str, dict[str, int]] = {}
    for split, raw in raws.items():
        findings = [f for f in report.findings if f.split == split]
        cleaned[split], changes[split] = _clean(raw, findings, keep_partial)
        if "train" in cleaned:
            cleaned[split], aligned = align_classes(cleaned[split], cleaned["train"].categories)
            changes[split] |= aligned
        if not len(cleaned[split].ids) and (len(raw.ids) or split != "test"):
            raise UserError(
                f"{raw.source}: nothing is left of {split}\n{report.text()}",
                "Put this right by hand.",
            )
    contents = {
        split: json.dumps(_content(raw, _extras(source, split))) for split, raw in cleaned.items()
    }
    outputs.clear()
    for split, content in contents.items():
        outputs.write(targets[split].relative_to(out).as_posix(), content)
    return FixResult(out, targets, changes)


def clean_folder(source: DataSource, out: Path) -> Outputs:
    """Where the clean copy goes;
    `UserError` where anything is there but an earlier copy: to ask before any work.
    """
    outputs = Outputs(out, "--fix")
    outputs.alone(files.annotations for files in source.splits.values())
    return outputs


def _clean(
    raw: RawDataset, findings: list[Finding], keep_partial: bool
) -> tuple[RawDataset, dict[str, int]]:
    """The split without what the findings name and with what can be put right,
    and how many were changed, by code.
    """
    raw, turned = _turned(raw, [f for f in findings if f.code == "wrong-size"])
    if turned:
        # In the right frame other boxes are outside: single boxes are checked anew.
        findings = [
            f
            for f in findings
            if f.row is None or RULES[f.code].action not in ("drop box", "renumber")
        ]
        findings = [f for f in findings if f.code != "wrong-size" or f.row not in turned]
        findings += check_boxes(raw)
    if 2 * sum(f.code == "shared-image" for f in findings) > len(raw):
        # Train and val are meant to be the same, as in a trial run.
        findings = [f for f in findings if f.code != "shared-image"]
    raw, counts = drop_bad(raw, findings, keep_partial)
    # What may be corners, taken for a size, would look right when clipped.
    doubtful = any(f.code == "xyxy-boxes" for f in findings)
    boxes = clip(raw.boxes, raw.sizes[raw.box_rows]) if len(raw) and not doubtful else raw.boxes
    cut = (boxes != raw.boxes).any(axis=1)
    # An object's area is at most its box's.
    box_areas = boxes[:, 2] * boxes[:, 3]
    missing = np.isnan(raw.areas)
    areas = np.where(missing, box_areas, np.where(cut, np.minimum(raw.areas, box_areas), raw.areas))
    changed = {SWAPPED: len(turned), "clipped-box": int(cut.sum())}
    if raw.label_files is None:
        changed[AREA] = int(missing.sum())
    return replace(raw, boxes=boxes, areas=areas), counts | {
        key: count for key, count in changed.items() if count
    }


def _turned(raw: RawDataset, wrong_sizes: list[Finding]) -> tuple[RawDataset, set[int]]:
    """The split with width and height exchanged where the boxes fit that,
    and the rows of these images.

    Other wrong sizes leave the boxes in doubt.
    """
    sizes, turned = raw.sizes.copy(), set[int]()
    for f in wrong_sizes:
        assert f.row is not None
        listed = (int(sizes[f.row, 0]), int(sizes[f.row, 1]))
        height, width = upright_size(read_header(raw.path(f.row)), listed)
        if (width, height) != listed:
            continue
        boxes = raw.boxes[raw.box_rows == f.row]
        if (boxes[:, :2] + boxes[:, 2:] <= (width + 1, height + 1)).all():
            sizes[f.row] = height, width
            turned.add(f.row)
    return replace(raw, sizes=sizes), turned


def _extras(source: DataSource, split: str) -> Extras:
    """Top level, images by id and annotations of a COCO file,
    for the fields that pass through unread (masks, ...).
    """
    if source.kind != "coco":
        return {}, {}, []
    content = load_json(source.splits[split].annotations)
    rest = {
        key: value for key, value in content.items() if key not in ("info", "images", "annotations")
    }
    return rest, rows_by_id(content, "images"), table_of("annotations", content["annotations"]).rows


def _content(raw: RawDataset, extras: Extras) -> dict[str, Any]:
    rest, old_images, old_boxes = extras
    images = [
        old_images.get(i, {}) | {"id": i, "file_name": name, "height": height, "width": width}
        for i, name, (height, width) in zip(
            raw.image_ids.tolist(), raw.file_names, raw.sizes.tolist(), strict=True
        )
    ]
    columns = (
        raw.lines,
        raw.ids,
        raw.box_image_ids,
        raw.box_categories,
        raw.boxes,
        raw.areas,
        raw.crowd.astype(int),
    )
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    annotations = [
        (old_boxes[line] if old_boxes else {}) | dict(zip(keys, row, strict=True))
        for line, *row in zip(*(column.tolist() for column in columns), strict=True)
    ]
    old_categories = rows_by_id(rest, "categories")
    info = {"description": f"Clean copy of {raw.source}", ROOT_KEY: str(raw.root)}
    return {
        "info": info,
        **rest,
        "images": images,
        "annotations": annotations,
        "categories": [
            old_categories.get(i, {}) | {"id": i, "name": name} for i, name in raw.categories
        ],
    }
