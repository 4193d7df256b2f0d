"""A small synthetic detection set, written as a real COCO folder:
for the first run, the tests and the benchmarks.

Five kinds of shapes of any colour, tilted, scaled, cut off by the border and hidden behind one
another, on gradients and noise, among lines and blobs that are no objects. The colour says nothing
about the class; outline and marking do. The category ids have gaps, as in real data.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from detrellis.errors import UserError
from detrellis.rle import Bitmap, encode

CATEGORIES = {1: "disc", 3: "square", 4: "triangle", 7: "star", 9: "ring"}
VERSION = 4  # of the pictures that follow from the same parameters
MARK = "detrellis shapes"  # in the annotation file's `info`: how we know a folder is ours
SUPERSAMPLING = 3  # masks are drawn this much larger and averaged: smooth edges
# An object of which more than this fraction is behind others or outside the frame is not annotated
HIDDEN = 0.7
SMALLEST = 0.17  # radius of an object, relative to the shorter side of the image
LARGEST = 0.28
TILT = math.pi / 9  # largest angle by which a shape is turned either way
MARKINGS = {
    "disc": "circles",
    "square": "stripes",
    "triangle": "dots",
    "star": "bars",
    "ring": "plain",
}

Mask = NDArray[np.float32]  # (height, width), coverage in [0, 1] or a texture
Canvas = NDArray[np.float32]  # (..., 3) colours, 0 to 255
Random = np.random.Generator


@dataclass(frozen=True)
class Kinds:
    """The classes that are drawn; as it stands, the five shapes in any colour, all as often."""

    shapes: Mapping[int, str] = field(default_factory=lambda: CATEGORIES)  # by category id
    shares: Sequence[float] | None = None  # of the objects, in the order of `shapes`
    # Colours (red, green, blue) of category ids; the other classes have any
    colours: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Object:
    """A shape that was drawn."""

    category: int
    mask: Bitmap  # of the frame, whatever lies on top of it
    full_area: int  # pixels, with those outside the frame


def write_shapes(
    out: Path,
    *,
    train: int = 500,
    val: int = 100,
    size: tuple[int, int] = (128, 160),
    objects: tuple[int, int] = (1, 5),
    seed: int = 0,
    masks: bool = False,
) -> Path:
    """Writes `annotations/instances_{train,val}.json` and `images/{train,val}/*.jpg` below `out`;
    returns `out`.

    `size` is (height, width); landscape and portrait images alternate at random. `objects` is the
    least and the most that are drawn on an image. With `masks` each object has the run lengths of
    its whole shape, hidden parts included, as its `segmentation`. The pictures depend on the other
    arguments alone; where they are already there nothing happens, and where there is anything else
    a `UserError` says so.
    """
    if min(size) < 32 or not 0 <= objects[0] <= objects[1] or min(train, val) < 1:
        message = f"shapes of size {size}, {objects} objects an image, {train} + {val} images"
        raise UserError(
            message, "Sides of 32 pixels or more, objects (least, most), at least one image each."
        )
    # What the pictures depend on; stored in the annotation files.
    parameters = {
        "train": train,
        "val": val,
        "size": [*size],
        "objects": [*objects],
        "seed": seed,
        "version": VERSION,
    }
    parameters |= {"masks": True} if masks else {}
    if _already_there(out, parameters):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    # Into a folder beside it first: an interrupted run leaves nothing that looks complete.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside:
        part = Path(beside, out.name)
        for split, (name, count) in enumerate((("train", train), ("val", val))):
            _write_split(part, name, count, parameters, np.random.default_rng([seed, split]))
        if out.exists():
            out.rmdir()  # empty, or `_already_there` would have refused
        part.rename(out)
    return out


def _already_there(out: Path, parameters: dict[str, Any]) -> bool:
    """Whether `out` holds this very set; `UserError` where it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    remedy = "Choose another folder, or remove this one yourself."
    try:
        info = json.loads((out / "annotations" / "instances_val.json").read_text())["info"]
    except (OSError, ValueError, KeyError, TypeError):
        info = {}
    if not isinstance(info, dict) or info.get("description") != MARK:
        raise UserError(f"{out}: there is something else in this folder already", remedy)
    if info.get("parameters") != parameters:
        raise UserError(
            f"{out}: holds a shapes set made with other settings: {info.get('parameters')}", remedy
        )
    return True


def _write_split(
    out: Path, split: str, count: int, parameters: dict[str, Any], random: Random
) -> None:
    folder = out / "images" / split
    folder.mkdir(parents=True)
    (out / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        height, width = parameters["size"] if random.random() < 0.5 else parameters["size"][::-1]
        pixels, objects = draw_image(height, width, parameters["objects"], random)
        name, image_id = f"{split}_{index:05d}.jpg", index + 1
        Image.fromarray(pixels).save(folder / name, quality=92)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for category, mask in objects:
            row = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": category,
                "iscrowd": 0,
            }
            annotations.append(row | {"bbox": coco_box(mask), "area": int(mask.sum())})
            if "masks" in parameters:
                counts = encode(mask).decode()
                annotations[-1]["segmentation"] = {"size": [height, width], "counts": counts}
    content = {
        "info": {"description": MARK, "parameters": parameters},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in CATEGORIES.items()],
    }
    (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def draw_image(
    height: int,
    width: int,
    objects: tuple[int, int],
    random: Random,
    kinds: Kinds = Kinds(),
) -> tuple[NDArray[np.uint8], list[tuple[int, Bitmap]]]:
    """The pixels `(height, width, 3)` and, for each object that can be seen, (category id, mask).

    The mask is the whole shape inside the frame, hidden parts included, as people draw them.
    """
    # What is drawn, one over the other.
    canvas = _background(height, width, random)
    for _ in range(random.integers(1, 4)):
        _draw_clutter(canvas, random)
    drawn = [
        _draw_object(canvas, kinds, random)
        for _ in range(random.integers(objects[0], objects[1] + 1))
    ]
    if random.random() < 0.3:
        _draw_line(canvas, random)
    # What of it can be seen, and is annotated.
    covered = np.zeros((height, width), dtype=bool)
    annotated = []
    for shape in reversed(drawn):  # the last one lies on top
        visible = (shape.mask & ~covered).sum()
        covered |= shape.mask
        if visible > (1 - HIDDEN) * shape.full_area:
            annotated.append((shape.category, shape.mask))
    noisy = canvas + random.normal(0, random.uniform(0, 6), (height, width, 1))
    return noisy.round().clip(0, 255).astype(np.uint8), annotated[::-1]


def coco_box(mask: Bitmap) -> list[int]:
    """Left, top, width and height of what a mask `(H, W)` shows, which is not nothing."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def _draw_object(canvas: Canvas, kinds: Kinds, random: Random) -> _Object:
    height, width = canvas.shape[:2]
    category = int(random.choice(list(kinds.shapes), p=kinds.shares))
    name = kinds.shapes[category]
    radius = math.exp(random.uniform(math.log(SMALLEST), math.log(LARGEST))) * min(height, width)
    patch = _shape_mask(name, radius, random)
    # The centre is inside the frame, so that a good part of the object is.
    top, left = (
        round(random.uniform(0.08, 0.92) * side - len(patch) / 2) for side in (height, width)
    )
    mask = np.zeros((height, width), dtype=np.float32)
    y, x = slice(max(top, 0), top + len(patch)), slice(max(left, 0), left + len(patch))
    inside = mask[y, x]
    inside[:] = patch[y.start - top :, x.start - left :][: inside.shape[0], : inside.shape[1]]
    colour = (
        np.array(kinds.colours[category], dtype=np.float32)
        if category in kinds.colours
        else _colour_on(canvas[y, x][inside >= 0.5].mean(axis=0), random)
    )
    paint = _paint(MARKINGS[name], inside.shape, colour, random)
    canvas[y, x] += inside[..., None] * (paint - canvas[y, x])
    return _Object(category, mask >= 0.5, int((patch >= 0.5).sum()))


def _shape_mask(name: str, radius: float, random: Random) -> Mask:
    """Coverage of a turned, slightly squeezed shape in a square patch around it."""
    side = 2 * math.ceil(radius) + 2
    image = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    draw = ImageDraw.Draw(image)
    angle, squeeze = random.uniform(-TILT, TILT), random.uniform(0.75, 1.0)

    def polygon(points: NDArray[np.float64], fill: int) -> None:
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        placed = ((points * [1.0, squeeze]) @ turn.T * radius + side / 2) * SUPERSAMPLING
        draw.polygon([(float(x), float(y)) for x, y in placed], fill=fill)

    polygon(_outline(name), 255)
    if name == "ring":
        polygon(_outline(name) * random.uniform(0.45, 0.6), 0)
    return _coverage(image)


def _coverage(image: Image.Image) -> Mask:
    """0 to 1 from a supersampled 8-bit mask."""
    return np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32) / np.float32(255)


def _outline(name: str) -> NDArray[np.float64]:
    """Corners inside the unit circle."""
    corners = {"disc": 60, "ring": 60, "square": 4, "triangle": 3, "star": 10}[name]
    # Half a step on, a square's sides lie along the axes, so that squeezing it gives a rectangle
    # and no rhombus; a triangle and a star stand on their base.
    start = {"triangle": -math.pi / 2, "star": -math.pi / 2}.get(name, math.pi / corners)
    angles = start + np.arange(corners) * 2 * math.pi / corners
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if name == "star":
        points[1::2] *= 0.45
    return points


def _colour_on(behind: Canvas, random: Random) -> Canvas:
    """A colour that stands out from the mean colour `behind` it."""
    colour = _colour(random)
    while np.abs(colour - behind).max() < 70:
        colour = _colour(random)
    return colour


def _paint(marking: str, shape: tuple[int, ...], colour: Canvas, random: Random) -> Canvas:
    """A filling of that colour, and of one near it where the marking is."""
    # The same hue: it stays one thing
    other = colour + random.uniform(40, 80) * (-1 if colour.mean() > 127 else 1)
    marks = _marks(marking, shape[0], shape[1], random)[..., None]
    painted: Canvas = (colour + marks * (other - colour)).astype(np.float32)
    return painted


def _marks(marking: str, height: int, width: int, random: Random) -> Mask:
    """How much of each pixel has the second colour, `(height, width)` from 0 to 1."""
    if marking == "plain":
        return np.zeros((height, width), dtype=np.float32)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    wave = 2 * math.pi / random.uniform(6, 9)  # pixels from one stripe or dot to the next
    tilt = random.uniform(-TILT, TILT)
    along, across = x * math.cos(tilt) + y * math.sin(tilt), y * math.cos(tilt) - x * math.sin(tilt)
    rows, columns = np.sin(wave * across), np.sin(wave * along)
    circles = np.sin(wave * np.hypot(x - width / 2, y - height / 2))
    level = {"stripes": rows, "bars": columns, "dots": rows * columns - 0.2, "circles": circles}[
        marking
    ]
    marks: Mask = (level > 0).astype(np.float32)
    return marks


def _background(height: int, width: int, random: Random) -> Canvas:
    """A gradient between two colours with soft noise, and stripes or a finer noise on some."""
    first, second = _colour(random), _colour(random)
    canvas = first + _ramp(height, width, random)[..., None] * 0.6 * (second - first)
    canvas += _soft_noise(height, width, int(random.integers(3, 9)), random)[
        ..., None
    ] * random.uniform(0, 30)
    kind = random.integers(3)
    if kind == 0:
        stripes = np.sin(_ramp(height, width, random) * random.uniform(20, 80))
        canvas += stripes[..., None] * random.uniform(4, 14)
    elif kind == 1:
        canvas += _soft_noise(height, width, int(random.integers(16, 48)), random)[
            ..., None
        ] * random.uniform(4, 14)
    return canvas.astype(np.float32)


def _draw_clutter(canvas: Canvas, random: Random) -> None:
    if random.random() < 0.5:
        _draw_line(canvas, random)
    else:
        _draw_blob(canvas, random)


def _draw_line(canvas: Canvas, random: Random) -> None:
    """A thin bent line across the picture."""
    height, width = canvas.shape[:2]
    image = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    points = random.uniform(-0.1, 1.1, (random.integers(2, 5), 2)) * [image.width, image.height]
    thickness = int(random.integers(2, 3 * SUPERSAMPLING))
    ImageDraw.Draw(image).line(
        [(float(x), float(y)) for x, y in points], fill=255, width=thickness, joint="curve"
    )
    canvas += _coverage(image)[..., None] * (_colour(random) - canvas)


def _draw_blob(canvas: Canvas, random: Random) -> None:
    """A textured patch that fades out: something is there, but no object of ours."""
    height, width = canvas.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    centre = random.uniform(0, 1, 2) * [height, width]
    radius = random.uniform(0.08, 0.25) * min(height, width)
    fade = np.exp(-(((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / radius**2))[..., None]
    texture = _soft_noise(height, width, int(random.integers(12, 40)), random)[
        ..., None
    ] * random.uniform(20, 60)
    canvas += fade.astype(np.float32) * (0.6 * (_colour(random) - canvas) + texture)


def _colour(random: Random) -> Canvas:
    return random.uniform(10, 245, 3).astype(np.float32)


def _ramp(height: int, width: int, random: Random) -> Mask:
    """0 to 1 along a random direction."""
    angle = random.uniform(0, 2 * math.pi)
    y, x = np.arange(height)[:, None] * math.sin(angle), np.arange(width)[None] * math.cos(angle)
    values = x + y
    ramp: Mask = ((values - values.min()) / max(np.ptp(values), 1)).astype(np.float32)
    return ramp


def _soft_noise(height: int, width: int, cells: int, random: Random) -> Mask:
    """Smooth noise of unit variance at the grid points, `cells` of them along each side."""
    grid = Image.fromarray(random.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
