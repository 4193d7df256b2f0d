"""COCO's annotation files: reading one.

Only a file that is no COCO file (no JSON, no list of images) raises `UserError`, naming the file
and the key. What is wrong in some of its rows is a finding: such images and boxes are named one by
one, and the others are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from detrellis.data.files import kind, not_collecting, read_object, read_sizes
from detrellis.data.findings import Finding, finding
from detrellis.data.formats import coco_rows
from detrellis.data.formats.coco_rows import CocoTable
from detrellis.data.formats.lookup import real_names, renaming_notes
from detrellis.data.formats.lvis import federated_notes, federation_of
from detrellis.data.records import RawDataset
from detrellis.data.splits import SplitFiles, fixed_parts_note, select_part
from detrellis.errors import UserError

SHAPE = 'A COCO detection file is {"images": [...], "annotations": [...], "categories": [...]}.'
# Folders of such files
HOLDS_FILES = re.compile(r".*annotation.*|annots?|anns?|labels?|coco|jsons?", re.IGNORECASE)
CROWD = (1, "1", "true", "True")  # values of `iscrowd` that say so; True and 1.0 are 1
ROOT_KEY = "image_root"  # in `info`: where `fix` writes down the folder of the images


def read_coco(split: str, files: SplitFiles, *, outlines: bool = False) -> RawDataset:
    """The split in a file, whose `file_name`s are relative to its folder of images,
    or to be found near it (see `lookup`).

    With `outlines` the objects' are kept as they were parsed, for a caller who needs all of them
    and lets go soon; otherwise the file is read again for them.
    """
    file = files.annotations
    with not_collecting():
        content = load_json(file)
        raw = _with_sizes(_part(_columns(content, file, files.images[0], split), files))
        if not outlines:
            return raw
        return replace(
            raw,
            segmentations=partial(_of_rows, [_segmentation(row) for row in content["annotations"]]),
        )


def load_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` with the line where it is malformed."""
    return read_object(file, SHAPE)


def _part(raw: RawDataset, files: SplitFiles) -> RawDataset:
    """The split's part of a file that is train and val together."""
    if files.part is None:
        return raw
    _, first, same = np.unique(raw.image_ids, return_index=True, return_inverse=True)
    # Images of one id stay together, or nobody would see that they have the same.
    stems = [Path(raw.file_names[row]).stem for row in first[same].tolist()]
    chosen = select_part(range(len(raw)), stems.__getitem__, files.part)
    images = np.zeros(len(raw), dtype=np.bool_)
    images[chosen] = True
    part = raw.part(images, others=files.part == "train")
    notes = fixed_parts_note(raw.split, files, "one COCO file")
    return replace(part, findings=(*notes, *part.findings))


def _columns(content: Mapping[str, Any], file: Path, root: Path, split: str) -> RawDataset:
    images, boxes, categories = (
        _table(content, key, file) for key in ("images", "annotations", "categories")
    )
    image_ids, image_texts = coco_rows.row_ids(images, needed=True)
    category_ids, category_texts = coco_rows.row_ids(categories, needed=True)
    box_ids, _ = coco_rows.row_ids(boxes, needed=False)
    file_names = real_names(coco_rows.names(images), root, nearby=[base_of(file)])
    listed = [
        (category_id, _name(row, category_id))
        for place, (category_id, row) in enumerate(
            zip(category_ids.tolist(), categories.rows, strict=True)
        )
        if place not in categories.wrong
    ]
    unique, repeated, contradictions = coco_rows.keep_first(listed)
    raw = RawDataset(
        split=split,
        source=file,
        root=root,
        categories=tuple(unique),
        image_ids=image_ids,
        file_names=file_names.names,
        sizes=coco_rows.sizes(images),
        ids=box_ids,
        box_image_ids=coco_rows.references(boxes, "image_id", image_texts),
        box_categories=coco_rows.references(boxes, "category_id", category_texts),
        boxes=coco_rows.boxes(boxes),
        areas=coco_rows.areas(boxes),
        crowd=np.array([row.get("iscrowd") in CROWD for row in boxes.rows], dtype=np.bool_),
        lines=np.arange(len(boxes.rows)),
        written=boxes.no_boxes,
        segmentations=partial(_segmentations, file),
        federation=federation_of(images, image_ids, categories, category_ids),
    )
    findings = (
        *_problems(raw, images, "malformed-image"),
        *_problems(raw, boxes, "malformed-annotation"),
        *_problems(raw, categories, "malformed-category"),
        *_outlined(raw, boxes),
        *renaming_notes(raw.split, raw.source, file_names),
        *_repeated_categories(raw, repeated, contradictions),
        *federated_notes(raw),
    )
    return replace(raw, findings=findings)


def _segmentations(file: Path, image_ids: Sequence[int], lines: Sequence[int]) -> list[Any]:
    """A `SegmentationReader`: the file is read again."""
    with not_collecting():
        rows = load_json(file)["annotations"]
        return [_segmentation(rows[line]) for line in lines]


def _of_rows(rows: Sequence[Any], image_ids: Sequence[int], lines: Sequence[int]) -> list[Any]:
    """A `SegmentationReader` of what is in memory."""
    return [rows[line] for line in lines]


def _segmentation(row: Any) -> Any:
    return row.get("segmentation") if isinstance(row, dict) else None


def _name(row: Mapping[str, Any], category_id: int) -> str:
    name = row.get("name")
    return str(category_id) if name is None or name == "" else str(name)


def _problems(raw: RawDataset, table: CocoTable, code: str) -> Iterator[Finding]:
    """What is wrong with single rows of a table, under `code`, and what was assumed of many."""
    for place, problems in sorted(table.wrong.items()):
        row = None if code == "malformed-category" else place
        yield finding(
            code, raw.split, raw.source, f"{table.at(place)} {' and '.join(problems)}", row=row
        )
    for code_of_all, rows, words in (
        ("text-numbers", table.numbers_as_text, "numbers are written as texts, the first: {}"),
        (
            "text-ids",
            table.text_ids,
            f"ids in `{table.name}` are texts, the first: {{}}; they are numbered here",
        ),
        (
            "ids-missing",
            table.without_id,
            "annotations have no id to keep, the first: {}; they are numbered here",
        ),
    ):
        if rows:
            what = f"{len(rows)} {words.format(rows[0])}"
            yield finding(code_of_all, raw.split, raw.source, what, count=len(rows))


def _outlined(raw: RawDataset, boxes: CocoTable) -> Iterator[Finding]:
    if count := len(boxes.outlined):
        what = (
            f"{count} of {len(raw.ids)} annotations have no `bbox`: their `segmentation` gives "
            "the box"
        )
        yield finding("outlined-boxes", raw.split, raw.source, what, count=count)


def _repeated_categories(
    raw: RawDataset, repeated: list[tuple[int, str]], contradictions: Mapping[int, list[str]]
) -> Iterator[Finding]:
    """An id listed twice: harmless under one name,
    and otherwise nobody knows what its boxes are.
    """
    if repeated:
        first, name = repeated[0]
        what = (
            f"{len(repeated)} categories are listed again under the same id and name, the first: "
            f"{first} ({name!r})"
        )
        yield finding("repeated-category", raw.split, raw.source, what, count=len(repeated))
    for category, names in contradictions.items():
        what = f"category id {category} is defined more than once: {', '.join(map(repr, names))}"
        boxes = np.flatnonzero(raw.box_categories == category).tolist()
        if not boxes:
            yield finding("duplicate-category-id", raw.split, raw.source, what, id=category)
        for box in boxes:
            of_box = f"{what}; which is annotation {raw.ids[box]}?"
            yield finding(
                "duplicate-category-id", raw.split, raw.source, of_box, id=category, row=box
            )


def _table(content: Mapping[str, Any], key: str, file: Path) -> CocoTable:
    if key not in content:
        raise UserError(
            f"{file}: no key `{key}` at the top level (found: {', '.join(content) or 'nothing'})",
            SHAPE,
        )
    rows = content[key]
    if not isinstance(rows, list):
        raise UserError(f"{file}: `{key}` is {kind(rows)}, not a list", SHAPE)
    return coco_rows.table_of(key, rows)


def base_of(file: Path) -> Path:
    """The data set's folder, of an annotation file in it or in its folder for such files."""
    return file.parent.parent if HOLDS_FILES.fullmatch(file.parent.name) else file.parent


def _with_sizes(raw: RawDataset) -> RawDataset:
    """Reads height and width from the image files where the annotations lack them."""
    missing = np.flatnonzero((raw.sizes <= 0).any(axis=1))
    if not len(missing):
        return raw
    sizes = raw.sizes.copy()
    sizes[missing] = read_sizes([raw.path(row) for row in missing.tolist()])
    what = f"{len(missing)} of {len(raw)} images are listed without height and width"
    note = finding("size-missing", raw.split, raw.source, what, count=len(missing))
    return replace(raw, sizes=sizes, findings=(*raw.findings, note))
