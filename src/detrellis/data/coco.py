"""COCO's annotation files: reading one, and finding its images.

A file that is not COCO's (no JSON, a missing key, a wrong type) raises `UserError` naming the file and the key. What is
merely wrong in it (a box of NaN, an id twice) is left to the doctor.
"""

from __future__ import annotations

import gc
import itertools
import json
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detrellis.data.files import read_sizes, read_text, subfolders
from detrellis.data.findings import finding
from detrellis.data.records import RawDataset
from detrellis.errors import UserError

SHAPE = 'A COCO detection file is {"images": [...], "annotations": [...], "categories": [...]}.'
SAMPLE = 24  # file names that decide which folder holds the images
ROOT_KEY = "image_root"  # in `info`: where `fix` writes down the folder of the images
HUGE = 1e300
Row = dict[str, Any]


def read_coco(file: Path, images: Path, split: str) -> RawDataset:
    """The split in `file`, whose `file_name`s are relative to `images`."""
    with not_collecting():
        return _with_sizes(_columns(load_json(file), file, images, split))


def _columns(content: Mapping[str, Any], file: Path, images: Path, split: str) -> RawDataset:
    image_rows, box_rows, category_rows = (_list(content, key, file) for key in ("images", "annotations", "categories"))
    names = _column(image_rows, "images", "file_name", file, lambda v: isinstance(v, str) and v != "")
    return RawDataset(
        split=split,
        source=file,
        root=images,
        categories=_categories(category_rows, file),
        image_ids=_integers(image_rows, "images", "id", file),
        file_names=tuple(names),
        sizes=_sizes(image_rows, file),
        ids=_integers(box_rows, "annotations", "id", file),
        box_image_ids=_integers(box_rows, "annotations", "image_id", file),
        box_categories=_integers(box_rows, "annotations", "category_id", file),
        boxes=_boxes(box_rows),
        areas=_areas(box_rows),
        crowd=np.array([row.get("iscrowd") in (1, "1") for row in box_rows], dtype=np.bool_),
        lines=np.arange(len(box_rows)),
    )


def load_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` with the line where it is malformed."""
    text = read_text(file)
    try:
        with not_collecting():
            content = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        why = "the file is empty" if not text.strip() else f"malformed JSON ({error.msg}, {where})"
        raise UserError(f"{file}: {why}", "Export the annotations again; a copy may have been cut off.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a JSON file that can be read ({error})", SHAPE) from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: the top level is {_kind(content)}, not an object", SHAPE)
    return content


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


def _list(content: Mapping[str, Any], key: str, file: Path) -> list[Row]:
    if key not in content:
        raise UserError(f"{file}: no key `{key}` at the top level (found: {', '.join(content) or 'nothing'})", SHAPE)
    rows = content[key]
    if not isinstance(rows, list):
        raise UserError(f"{file}: `{key}` is {_kind(rows)}, not a list", SHAPE)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{file}: {key}[{number}] is {_kind(row)}, not an object", SHAPE)
    return rows


def _column(rows: list[Row], table: str, key: str, file: Path, good: Callable[[Any], bool]) -> list[Any]:
    """`row[key]` of every row; `UserError` naming the first row where it is missing or not `good`."""
    try:
        values = [row[key] for row in rows]
    except KeyError:
        number = next(n for n, row in enumerate(rows) if key not in row)
        raise UserError(f"{file}: {table}[{number}]{_id(rows[number])} has no `{key}`", SHAPE) from None
    for number, value in enumerate(values):
        if not good(value):
            where = f"{table}[{number}]{_id(rows[number])}: `{key}`"
            raise UserError(f"{file}: {where} is {_shown(value)}", f"`{key}` must be {_wanted(key)}.")
    return values


def _integers(rows: list[Row], table: str, key: str, file: Path) -> NDArray[np.int64]:
    """An integer column. A number like 3.0 is taken for 3; text is not guessed at."""
    try:
        values = np.array([row[key] for row in rows])
        if values.dtype.kind == "i" and values.ndim == 1:  # the fast way: numpy has looked at every type
            return values.astype(np.int64)
    except (KeyError, ValueError, OverflowError):
        pass
    return np.array(_column(rows, table, key, file, _is_integer), dtype=np.int64)


def _is_integer(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63 and int(value) == value  # NaN is not below anything


def _sizes(rows: list[Row], file: Path) -> NDArray[np.int64]:
    """(I, 2) height and width; 0 where they are missing, for `_with_sizes` to find out."""
    keys = ("height", "width")
    if any(row.get(key) is None for row in rows for key in keys):
        rows = [{"id": row["id"], **{key: row.get(key) or 0 for key in keys}} for row in rows]
    return np.stack([_integers(rows, "images", key, file) for key in keys], axis=1).reshape(-1, 2)


def _with_sizes(raw: RawDataset) -> RawDataset:
    """Reads height and width from the image files where the annotations lack them."""
    missing = np.flatnonzero((raw.sizes <= 0).any(axis=1))
    if not len(missing):
        return raw
    sizes = raw.sizes.copy()
    sizes[missing] = read_sizes([raw.path(row) for row in missing.tolist()])
    what = f"{len(missing)} of {len(raw)} images are listed without height and width"
    return replace(
        raw, sizes=sizes, findings=(finding("size-missing", raw.split, raw.source, what, count=len(missing)),)
    )


def _boxes(rows: list[Row]) -> NDArray[np.float64]:
    """(T, 4); NaN where `bbox` is missing or not four numbers, which the doctor will name."""
    try:
        boxes = np.array([row["bbox"] for row in rows])
        if boxes.dtype.kind in "if" and boxes.shape == (len(rows), 4):
            return boxes.astype(np.float64)
    except (KeyError, ValueError):
        pass
    return np.array([_box(row.get("bbox")) for row in rows], dtype=np.float64).reshape(-1, 4)


def _box(value: Any) -> list[float]:
    four = isinstance(value, list) and len(value) == 4
    if not four or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
        return [np.nan] * 4
    return [float(v) if abs(v) < HUGE else np.nan for v in value]  # a whole number may be too large for a float


def _areas(rows: list[Row]) -> NDArray[np.float64]:
    """(T,) NaN where `area` is missing or no positive number."""
    values = [row.get("area") for row in rows]
    numbers = [v if isinstance(v, int | float) else np.nan for v in values]
    areas = np.array(numbers, dtype=np.float64)
    return np.where(np.isfinite(areas) & (areas > 0), areas, np.nan)


def _categories(rows: list[Row], file: Path) -> tuple[tuple[int, str], ...]:
    ids = _integers(rows, "categories", "id", file).tolist()
    return tuple((i, str(row.get("name", i))) for i, row in zip(ids, rows, strict=True))


def _id(row: Row) -> str:
    return f" (id {row['id']})" if "id" in row else ""


def _shown(value: Any) -> str:
    return f"the text {value!r}" if isinstance(value, str) else f"{value!r:.60}"


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", int: "a number"}
    return "null" if value is None else kinds.get(type(value), "a number")


def _wanted(key: str) -> str:
    return "a file name" if key == "file_name" else "a whole number"


# Finding the images


def find_images(file: Path, folders: Sequence[Path] = ()) -> Path:
    """The folder that the `file_name`s of `file` are relative to: the one where the listed files really are.

    `folders` are looked at before the usual places near `file`. Raises `UserError` with all that were looked at.
    """
    names, written_down = sample_names(file)
    if not names:
        return file.parent  # no images, or no COCO file: reading it will say which
    looked: list[Path] = []
    hits: list[int] = []
    for places in ([*written_down, *folders, *_usual(file)], _below(file)):
        looked += [place for place in dict.fromkeys(places) if place not in looked]
        hits += [sum((folder / name).is_file() for name in names) for folder in looked[len(hits) :]]
        if max(hits) == len(names):
            break
    if max(hits) > 0:
        return looked[hits.index(max(hits))]
    listed = "".join(f"\n    {folder}" for folder in looked if folder.is_dir())
    raise UserError(
        f"{file}: its images were not found; looked for {names[0]!r} in{listed}",
        "Name the folder that the `file_name`s are relative to with `--train-images` or `--val-images`.",
    )


def sample_names(file: Path) -> tuple[list[str], list[Path]]:
    """A few `file_name`s and the image folder that `fix` wrote down, without parsing the file (COCO's has 450 MB)."""
    try:
        with file.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)  # closed when the last match is gone
        names = _texts(re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', data))
        roots = _texts(re.finditer(rb'"%s"\s*:\s*("(?:[^"\\]|\\.)*")' % ROOT_KEY.encode(), data[:4096]))
        return list(itertools.islice(names, SAMPLE)), [Path(text) for text in roots]
    except (OSError, ValueError):
        return [], []  # missing or empty: reading it will say so


def _texts(matches: Iterable[re.Match[bytes]]) -> Iterator[str]:
    for match in matches:
        try:
            yield str(json.loads(match.group(1)))
        except ValueError:
            continue


def _base(file: Path) -> Path:
    return file.parent.parent if "annotation" in file.parent.name.lower() else file.parent


def _word(file: Path) -> str:
    """instances_train2017.json -> train2017."""
    return file.stem.split("_")[-1]


def _usual(file: Path) -> Iterator[Path]:
    """Where images usually are."""
    base, word = _base(file), _word(file)
    yield from (base / name for name in (f"images/{word}", word, f"{word}/images", "images"))
    yield from (file.parent, base)


def _below(file: Path) -> list[Path]:
    """All folders around an annotation file; those named like its split first, since names may recur in others."""
    alike = _word(file)[:3].lower()
    return sorted(subfolders(_base(file), depth=3), key=lambda folder: not folder.name.lower().startswith(alike))
