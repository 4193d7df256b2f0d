"""COCO's annotation files: reading one.

Only a file that is no COCO file (no JSON, no list of images) raises `UserError`, naming the file and the key. What is
wrong in some of its rows is a finding: such images and boxes are named one by one, and the others are read.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from detrellis.data.doctor.findings import Finding, finding
from detrellis.data.files import read_sizes, read_text
from detrellis.data.formats import coco_rows
from detrellis.data.formats.coco_rows import Odd, kind
from detrellis.data.formats.lookup import Names, real_names, renaming_notes
from detrellis.data.records import RawDataset
from detrellis.errors import UserError

SHAPE = 'A COCO detection file is {"images": [...], "annotations": [...], "categories": [...]}.'
HOLDS_FILES = re.compile(r".*annotation.*|annots?|anns?|labels?|coco|jsons?", re.IGNORECASE)  # folders of such files
ROOT_KEY = "image_root"  # in `info`: where `fix` writes down the folder of the images


def read_coco(file: Path, images: Path, split: str) -> RawDataset:
    """The split in `file`, whose `file_name`s are relative to `images`, or to be found near it (see `lookup`)."""
    with not_collecting():
        return _with_sizes(_columns(load_json(file), file, images, split))


def _columns(content: Mapping[str, Any], file: Path, images: Path, split: str) -> RawDataset:
    image_odd, box_odd, category_odd = (_table(content, key, file) for key in ("images", "annotations", "categories"))
    image_ids, image_texts = coco_rows.own_ids(image_odd, needed=True)
    category_ids, category_texts = coco_rows.own_ids(category_odd, needed=True)
    ids, _ = coco_rows.own_ids(box_odd, needed=False)
    found = real_names(coco_rows.names(image_odd), images, nearby=[base_of(file)])
    named = ((i, _name(row, i)) for i, row in zip(category_ids.tolist(), category_odd.rows, strict=True))
    listed = [pair for place, pair in enumerate(named) if place not in category_odd.wrong]
    categories, again, several = coco_rows.keep_first(listed)
    raw = RawDataset(
        split=split,
        source=file,
        root=images,
        categories=tuple(categories),
        image_ids=image_ids,
        file_names=found.names,
        sizes=coco_rows.sizes(image_odd),
        ids=ids,
        box_image_ids=coco_rows.references(box_odd, "image_id", image_texts),
        box_categories=coco_rows.references(box_odd, "category_id", category_texts),
        boxes=coco_rows.boxes(box_odd),
        areas=coco_rows.areas(box_odd),
        crowd=np.array([row.get("iscrowd") in (1, "1") for row in box_odd.rows], dtype=np.bool_),
        lines=np.arange(len(box_odd.rows)),
        written=box_odd.boxes,
    )
    notes = _notes(raw, (image_odd, box_odd, category_odd), found)
    return replace(raw, findings=(*notes, *_categories_twice(raw, again, several)))


def _name(row: Mapping[str, Any], own: int) -> str:
    name = row.get("name")
    return str(own) if name is None or name == "" else str(name)


def _notes(raw: RawDataset, odds: tuple[Odd, Odd, Odd], found: Names) -> Iterator[Finding]:
    """What the rows have that the columns cannot say."""
    for odd, code in zip(odds, ("malformed-image", "malformed-annotation", "malformed-category"), strict=True):
        for place, what in sorted(odd.wrong.items()):
            said = f"{odd.at(place)} {' and '.join(what)}"
            row = None if code == "malformed-category" else place
            yield finding(code, raw.split, raw.source, said, row=row)
        for code_of_all, rows, words in (
            ("text-numbers", odd.as_text, "numbers are written as texts, the first: {}"),
            ("text-ids", odd.named, f"ids in `{odd.table}` are texts, the first: {{}}; they are numbered here"),
            ("ids-missing", odd.numbered, "annotations have no id to keep, the first: {}; they are numbered here"),
        ):
            if rows:
                what_all = f"{len(rows)} {words.format(rows[0])}"
                yield finding(code_of_all, raw.split, raw.source, what_all, count=len(rows))
    if outlined := odds[1].outlined:
        what_all = f"{len(outlined)} of {len(raw.ids)} annotations have no `bbox`: their `segmentation` gives the box"
        yield finding("outlined-boxes", raw.split, raw.source, what_all, count=len(outlined))
    yield from renaming_notes(raw.split, raw.source, found)


def _categories_twice(
    raw: RawDataset, again: list[tuple[int, str]], several: Mapping[int, list[str]]
) -> Iterator[Finding]:
    """An id listed twice: harmless under one name, and otherwise nobody knows what its boxes are."""
    if again:
        own, name = again[0]
        what = f"{len(again)} categories are listed again under the same id and name, the first: {own} ({name!r})"
        yield finding("repeated-category", raw.split, raw.source, what, count=len(again))
    for own, names in several.items():
        what = f"category id {own} is defined more than once: {', '.join(map(repr, names))}"
        boxes = np.flatnonzero(raw.box_categories == own).tolist()
        if not boxes:
            yield finding("duplicate-category-id", raw.split, raw.source, what, id=own)
        for box in boxes:
            here = f"{what}; which is annotation {raw.ids[box]}?"
            yield finding("duplicate-category-id", raw.split, raw.source, here, id=own, row=box)


def load_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` with the line where it is malformed."""
    text = read_text(file)
    try:
        with not_collecting():
            content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(*_malformed(file, text, error)) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a JSON file that can be read ({error})", SHAPE) from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: the top level is {kind(content)}, not an object", SHAPE)
    return content


def _malformed(file: Path, text: str, error: json.JSONDecodeError) -> tuple[str, str]:
    if not text.strip():
        return f"{file}: the file is empty", "Export the annotations again; a copy may have been cut off."
    where = f"line {error.lineno}, column {error.colno}"
    if error.msg == "Extra data" and text[error.pos :].lstrip()[:1] in ("{", "["):
        return f"{file}: several JSON values, the second in {where} (JSON Lines?)", f"Export one. {SHAPE}"
    what = f"{file}: malformed JSON ({error.msg}, {where})"
    if not text[error.pos :].strip():
        return what, "Export the annotations again; a copy may have been cut off."
    rules = "no comments, no comma behind the last entry, and \\\\ for a backslash"
    return what, f"Put this line right (JSON has {rules}), or export the annotations again."


@contextmanager
def not_collecting() -> Iterator[None]:
    """No garbage collection: it would look at millions of small objects again and again, none of them garbage."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _table(content: Mapping[str, Any], key: str, file: Path) -> Odd:
    if key not in content:
        raise UserError(f"{file}: no key `{key}` at the top level (found: {', '.join(content) or 'nothing'})", SHAPE)
    rows = content[key]
    if not isinstance(rows, list):
        raise UserError(f"{file}: `{key}` is {kind(rows)}, not a list", SHAPE)
    return coco_rows.objects(key, rows)


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
