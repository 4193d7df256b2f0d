"""Detections as label files, for the tools in which people correct them:
what each format's files say.

| format | boxes | masks | scores |
| --- | --- | --- | --- |
| coco | corners and sizes | polygons | `score` of each annotation |
| yolo | shares of the picture | the largest polygon of each | none: trainers take no sixth field |
| voc | whole pixels from 1, both in the box | none | an attribute `score`, as CVAT writes attributes |
| csv | corners | none | a column |
| labelstudio | percent of the picture | the largest polygon of each | of each region, and their mean |
| cvat | corners | run lengths | an attribute `score` |

Polygons run along the edges of the mask's pixels, simplified by up to `TOLERANCE`; they fill holes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote
from xml.etree import ElementTree as ET

import numpy as np
import yaml

from detrellis.arguments import LabelFormat
from detrellis.data.classes import ClassMap
from detrellis.predictions.record import Prediction
from detrellis.rle import Bitmap, polygons, simplified

IMAGES = "images"  # the folder of the pictures, but for VOC's
LEAST = 0.5  # pixels: a narrower or lower box is left out
TOLERANCE = 0.8  # pixels by which a polygon may miss the mask's edge


class LabelledObject(NamedTuple):
    """One detection."""

    label: int  # class index
    category: int  # the data set's id of the class
    name: str
    score: float
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels
    mask: Bitmap | None

    def outlines(self) -> list[list[float]]:
        """The polygons around the mask, the largest first;
        none where there is no mask, or an empty one.
        """
        rings = (
            []
            if self.mask is None
            else [simplified(ring, TOLERANCE) for ring in polygons(self.mask)]
        )
        return sorted(rings, key=_extent, reverse=True)


@dataclass(frozen=True)
class LabelledPicture:
    """A picture of a label set, and what is detected in it."""

    file: str  # below the folder of pictures, "/" between folders
    image_id: int
    prediction: Prediction

    def objects(self) -> Iterator[LabelledObject]:
        """The detections, best first."""
        prediction = self.prediction
        for i, (x1, y1, x2, y2) in enumerate(prediction.boxes):
            if min(x2 - x1, y2 - y1) >= LEAST:
                mask = None if prediction.runs is None else prediction.mask(i)
                columns = (
                    prediction.labels[i],
                    prediction.category_ids[i],
                    prediction.names[i],
                    prediction.scores[i],
                )
                yield LabelledObject(*columns, (x1, y1, x2, y2), mask)


Files = Mapping[str, str]  # the text of each file by its name
Pictures = Sequence[LabelledPicture]


def coco(pictures: Pictures, classes: ClassMap) -> Files:
    """`annotations/instances_default.json`, as CVAT calls it."""
    rows: list[dict[str, Any]] = []
    for picture in pictures:
        for each in picture.objects():
            x1, y1, x2, y2 = each.box
            area = (x2 - x1) * (y2 - y1) if each.mask is None else int(each.mask.sum())
            rows.append(
                {
                    "id": len(rows) + 1,
                    "image_id": picture.image_id,
                    "category_id": each.category,
                    "bbox": _rounded((x1, y1, x2 - x1, y2 - y1)),
                    "area": round(area, 2),
                    "iscrowd": 0,
                    "segmentation": each.outlines(),
                    "score": round(each.score, 4),
                }
            )
    images = []
    for picture in pictures:
        height, width = picture.prediction.size
        images.append(
            {"id": picture.image_id, "file_name": picture.file, "height": height, "width": width}
        )
    categories = [
        {"id": i, "name": name} for i, name in zip(classes.ids, classes.names, strict=True)
    ]
    content = {"images": images, "annotations": rows, "categories": categories}
    return {"annotations/instances_default.json": json.dumps(content)}


def yolo(pictures: Pictures, classes: ClassMap) -> Files:
    """`data.yaml`, and `labels/NAME.txt` for each picture:
    a line a box, or a polygon where there is a mask.
    """
    names = yaml.safe_dump(
        {"names": dict(enumerate(classes.names))}, allow_unicode=True, sort_keys=False
    )
    head = f"# Before training: `val:` with pictures that are not in train.\ntrain: {IMAGES}\n"
    files = {"data.yaml": head + names}
    for picture in pictures:
        height, width = picture.prediction.size
        lines = []
        for each in picture.objects():
            x1, y1, x2, y2 = each.box
            shape = next(iter(each.outlines()), [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
            shares = [value / (height if i % 2 else width) for i, value in enumerate(shape)]
            lines.append(" ".join([str(each.label), *(f"{share:.6f}" for share in shares)]) + "\n")
        files[f"labels/{PurePosixPath(picture.file).with_suffix('.txt')}"] = "".join(lines)
    return files


def voc(pictures: Pictures, classes: ClassMap) -> Files:
    """`Annotations/NAME.xml` for each picture, and `ImageSets/Main/train.txt`, which lists all."""
    files = {}
    for picture in pictures:
        height, width = picture.prediction.size
        size = {"width": width, "height": height, "depth": 3}
        root = ET.Element("annotation")
        _fill(
            root,
            {"folder": "JPEGImages", "filename": PurePosixPath(picture.file).name, "size": size},
        )
        _fill(root, {"segmented": 0})
        for each in picture.objects():
            x1, y1, x2, y2 = (round(value) for value in each.box)
            left, top = min(x1, width - 1) + 1, min(y1, height - 1) + 1
            corners = {"xmin": left, "ymin": top, "xmax": max(x2, left), "ymax": max(y2, top)}
            row = {
                "name": each.name,
                "pose": "Unspecified",
                "truncated": 0,
                "difficult": 0,
                "bndbox": corners,
            }
            score = {"attribute": {"name": "score", "value": f"{each.score:.4f}"}}
            _fill(ET.SubElement(root, "object"), row | {"attributes": score})
        files[f"Annotations/{PurePosixPath(picture.file).with_suffix('.xml')}"] = _xml(root)
    names = [f"{PurePosixPath(picture.file).with_suffix('')}\n" for picture in pictures]
    return files | {"ImageSets/Main/train.txt": "".join(names)}


def csv_boxes(pictures: Pictures, classes: ClassMap) -> Files:
    """`train_labels.csv`: a line an object;
    one with the name alone for a picture in which nothing was detected.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["filename", "xmin", "ymin", "xmax", "ymax", "class", "score"])
    for picture in pictures:
        rows = [
            [picture.file, *_rounded(o.box), o.name, round(o.score, 4)] for o in picture.objects()
        ]
        writer.writerows(rows or [[picture.file, "", "", "", "", "", ""]])
    return {"train_labels.csv": text.getvalue()}


def labelstudio(pictures: Pictures, classes: ClassMap) -> Files:
    """`tasks.json` with predictions, and `config.xml`, the labelling interface that they fit.

    Pictures are named as Label Studio serves local files, below the folder that these files are in.
    """
    masks = any(picture.prediction.runs is not None for picture in pictures)
    kind = "polygonlabels" if masks else "rectanglelabels"
    view = ET.Element("View")
    ET.SubElement(view, "Image", name="image", value="$image")
    control = ET.SubElement(
        view, "PolygonLabels" if masks else "RectangleLabels", name="label", toName="image"
    )
    for name in classes.names:
        ET.SubElement(control, "Label", value=name)
    tasks = []
    for picture in pictures:
        regions = [_region(each, picture.prediction.size, kind) for each in picture.objects()]
        prediction: dict[str, Any] = {"model_version": "detrellis", "result": regions}
        if regions:
            prediction["score"] = round(
                sum(region["score"] for region in regions) / len(regions), 4
            )
        url = f"/data/local-files/?d={quote(f'{IMAGES}/{picture.file}')}"
        tasks.append({"data": {"image": url}, "predictions": [prediction]})
    return {"tasks.json": json.dumps(tasks), "config.xml": _xml(view)}


def _region(each: LabelledObject, size: tuple[int, int], kind: str) -> dict[str, Any]:
    """An object as Label Studio has it, in percent of the picture's width and height."""
    height, width = size
    if kind == "polygonlabels":
        x1, y1, x2, y2 = each.box
        outline = next(iter(each.outlines()), [x1, y1, x2, y1, x2, y2, x1, y2])
        points = [
            [100 * x / width, 100 * y / height]
            for x, y in zip(outline[::2], outline[1::2], strict=True)
        ]
        value: dict[str, Any] = {"points": points, "closed": True}
    else:
        x1, y1, x2, y2 = (
            100 * v / side for v, side in zip(each.box, (width, height) * 2, strict=True)
        )
        value = {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1, "rotation": 0}
    return {
        "type": kind,
        "from_name": "label",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "score": round(each.score, 4),
        "value": value | {kind: [each.name]},
    }


def cvat(pictures: Pictures, classes: ClassMap) -> Files:
    """`annotations.xml` ("CVAT for images 1.1"),
    and `labels.json` for a new project's labels ("Raw").
    """
    root = ET.Element("annotations")
    ET.SubElement(root, "version").text = "1.1"
    for number, picture in enumerate(pictures):
        height, width = picture.prediction.size
        size = {"width": str(width), "height": str(height)}
        image = ET.SubElement(root, "image", {"id": str(number), "name": picture.file} | size)
        for each in picture.objects():
            shape = {"label": each.name, "source": "auto", "occluded": "0", "z_order": "0"}
            element = ET.SubElement(image, *_cvat_shape(each, shape))
            ET.SubElement(element, "attribute", name="score").text = f"{each.score:.4f}"
    score = {
        "name": "score",
        "input_type": "text",
        "mutable": False,
        "default_value": "",
        "values": [""],
    }
    labels = [{"name": name, "attributes": [score]} for name in classes.names]
    return {"annotations.xml": _xml(root), "labels.json": json.dumps(labels, indent=1)}


def _cvat_shape(each: LabelledObject, shape: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The element: a box, or a mask,
    whose run lengths go row by row through the box around it, outside first.
    """
    if each.mask is None or not each.mask.any():
        corners = zip(("xtl", "ytl", "xbr", "ybr"), each.box, strict=True)
        return "box", shape | {key: f"{value:.2f}" for key, value in corners}
    rows, columns = np.flatnonzero(each.mask.any(axis=1)), np.flatnonzero(each.mask.any(axis=0))
    part = each.mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    flat = np.concatenate([[False], part.ravel(), [not part[-1, -1]]])
    lengths = np.diff(np.flatnonzero(np.diff(flat)), prepend=0)
    place = {"left": columns[0], "top": rows[0], "width": part.shape[1], "height": part.shape[0]}
    runs = ", ".join(map(str, lengths.tolist()))
    return "mask", shape | {key: str(value) for key, value in place.items()} | {"rle": runs}


FORMATS: Mapping[LabelFormat, Callable[[Pictures, ClassMap], Files]] = {
    "coco": coco,
    "yolo": yolo,
    "voc": voc,
    "csv": csv_boxes,
    "labelstudio": labelstudio,
    "cvat": cvat,
}


def _fill(parent: ET.Element, values: Mapping[str, Any]) -> None:
    """Elements of these names, with texts or further elements."""
    for name, value in values.items():
        element = ET.SubElement(parent, name)
        if isinstance(value, Mapping):
            _fill(element, value)
        else:
            element.text = str(value)


def _xml(root: ET.Element) -> str:
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]


def _extent(ring: Sequence[float]) -> float:
    """The area inside a polygon."""
    x, y = np.array(ring[::2]), np.array(ring[1::2])
    return abs(float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())) / 2
