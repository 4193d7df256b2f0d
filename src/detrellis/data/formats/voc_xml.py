"""One XML file of Pascal VOC, in whatever encoding and dialect tools write it.

No content of a file raises: `VocFile.problem` says why what it shows is unknown, and the doctor
reports that.
"""

from __future__ import annotations

import codecs
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from detrellis.data.files import read_bytes, read_head
from detrellis.errors import UserError

DECLARED = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["']""")
ROOT = re.compile(r"<(\w+:)?annotation[\s/>]", re.IGNORECASE)
# Files say the smaller set and hold letters of the larger one.
WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949"}
LOST = "\ufffd"  # what stands for bytes that are no letters
SHOWN = 80  # letters of what stands there that a message quotes
HEAD = 4096  # bytes that are looked at to recognise a file

Corners = tuple[float, float, float, float]  # left, top, right, bottom as written


class VocObject(NamedTuple):
    """One object of an XML file."""

    name: str
    corners: Corners  # NaN where a number is missing, which the doctor will name
    edges: bool  # they are edges for certain: of a turned box or a polygon
    difficult: bool
    written: str = ""  # what stands where there are no four numbers


class VocFile(NamedTuple):
    """The content of one XML file."""

    image: str  # `filename`, else `path`
    size: tuple[int, int]  # height, width; 0 where missing
    objects: list[VocObject]
    problem: str = ""  # why nothing can be said about its picture


def is_voc(file: Path) -> bool:
    """Whether it begins like a file of VOC's: other tools write XML too."""
    try:
        return ROOT.search(read_head(file, HEAD)) is not None
    except UserError:
        return False


def parse_xml(file: Path) -> VocFile:
    """What the file says, or why it says nothing."""
    try:
        root = _root(read_bytes(file))
        name = _text(root, "filename") or _text(root, "path")
        size = _whole(root.findtext("size/height")), _whole(root.findtext("size/width"))
        return VocFile("" if LOST in name else name, size, _objects(root))
    except UserError as error:
        return _unknown(error.message.removeprefix(f"{file}: "))
    except ElementTree.ParseError as error:
        return _unknown(f"malformed XML ({error})")
    except ValueError as error:
        return _unknown(str(error))


def _unknown(problem: str) -> VocFile:
    return VocFile("", (0, 0), [], problem)


def _root(data: bytes) -> ElementTree.Element:
    """The `annotation` element. Raises `ParseError`, or `ValueError` in words."""
    if not data.strip(b"\0 \r\n\t"):
        raise ValueError("the file is empty")
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        # Expat reads few encodings; what is given to it as text it reads whatever the file
        # declares.
        if (text := _decoded(data)) is None:
            if isinstance(error, ElementTree.ParseError):
                raise
            what = f"its text cannot be read in the encoding that it declares, {_declared(data)!r}"
            raise ValueError(what) from error
        root = ElementTree.fromstring(text)
    for element in root.iter():  # some tools write a namespace, or <Object> and <Name>
        element.tag = element.tag.rpartition("}")[2].lower()
    if root.tag != "annotation":
        raise ValueError(f"XML of another kind: its top level is <{root.tag}>, not <annotation>")
    return root


def _decoded(data: bytes) -> str | None:
    """The text by the encoding that the file declares; None where that does not help."""
    try:
        name = codecs.lookup(_declared(data) or "utf-8").name
    except LookupError:
        return None
    if name.startswith(("utf-16", "utf-32")):
        # It could not be read as such: tools copy the declaration into files in UTF-8
        name = "utf-8"
    try:
        return data.decode(WIDER.get(name, name))
    except UnicodeDecodeError:
        # Mostly the path of the machine that wrote it, in its own encoding: that does no harm, a
        # class name would.
        return data.decode("utf-8", errors="replace") if name in ("utf-8", "ascii") else None


def _declared(data: bytes) -> str:
    match = DECLARED.match(data.removeprefix(codecs.BOM_UTF8))
    return match.group(1).decode("ascii") if match else ""


def _objects(root: ElementTree.Element) -> list[VocObject]:
    objects = []
    for number, element in enumerate(root.findall("object"), start=1):
        if _text(element, "deleted") == "1":  # the LabelMe of old keeps what was removed
            continue
        name = _text(element, "name")
        if not name:
            raise ValueError(f"object {number} has no <name>")
        if LOST in name:
            raise ValueError(
                f"the <name> of object {number} is not in UTF-8, and no other encoding is declared"
            )
        corners, edges = _corners(element)
        written = "" if all(map(math.isfinite, corners)) else _written(element)
        difficult = _text(element, "difficult").lower() in ("1", "true")
        objects.append(VocObject(name, corners, edges, difficult, written))
    return objects


def _corners(element: ElementTree.Element) -> tuple[Corners, bool]:
    """The corners, and whether they are edges:
    a turned box and a polygon give the box around them.
    """
    box = element.find("bndbox")
    if box is not None:
        xmin, ymin, xmax, ymax = (
            _number(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")
        )
        return (xmin, ymin, xmax, ymax), False
    turned, polygon = element.find("robndbox"), element.find("polygon")
    if turned is not None:
        return _around(
            *(_number(turned.findtext(key)) for key in ("cx", "cy", "w", "h", "angle"))
        ), True
    if polygon is not None:
        xs, ys = (
            [_number(e.text) for e in polygon.iter() if re.fullmatch(rf"{axis}\d*", e.tag)]
            for axis in "xy"
        )
        if len(xs) > 1 and len(ys) > 1:
            return (min(xs), min(ys), max(xs), max(ys)), True
    return (math.nan,) * 4, False


def _written(element: ElementTree.Element) -> str:
    """The numbers as they stand there: `xmin 7,0, ymin 8`."""
    box = element.find("bndbox")
    numbers = [] if box is None else [f"{e.tag} {(e.text or '').strip() or 'nothing'}" for e in box]
    return ", ".join(numbers)[:SHOWN] or "no <bndbox> with anything in it"


def _around(cx: float, cy: float, w: float, h: float, angle: float) -> Corners:
    """The upright box around one that is turned by `angle` radians."""
    if not math.isfinite(angle):
        return (math.nan,) * 4
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    x, y = (w * cos + h * sin) / 2, (w * sin + h * cos) / 2
    return cx - x, cy - y, cx + x, cy + y


def _text(element: ElementTree.Element, key: str) -> str:
    return (element.findtext(key) or "").strip()


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _whole(text: str | None) -> int:
    value = _number(text)
    return int(value) if math.isfinite(value) else 0
