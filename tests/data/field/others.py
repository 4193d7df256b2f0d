"""labelme, VIA and CSV: what their tools write."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from csv import writer
from pathlib import Path
from typing import Any

from tests.data.field.cases import Arguments, Case, Finds, Reads, Refused
from tests.data.field.pictures import (
    HEIGHT,
    OBJECTS,
    PICTURES,
    SPLITS,
    TRUTH,
    WIDTH,
    Box,
    name_of,
    picture,
    save_all,
    write_json,
)

ONE_LESS = (PICTURES - 1, OBJECTS - len(TRUTH[0]))  # without the first picture


# labelme


def outline(box: Box) -> list[list[float]]:
    return [
        [box.x, box.y],
        [box.x + box.w, box.y],
        [box.x + box.w, box.y + box.h],
        [box.x, box.y + box.h],
    ]


def shape(box: Box, kind: str) -> dict[str, Any]:
    # From the lower right to the upper left
    points = outline(box)[2::-2] if kind == "rectangle" else outline(box)
    return {"label": box.name, "points": points, "shape_type": kind, "group_id": None, "flags": {}}


def labelme_file(file: Path, number: int, image: str = "") -> None:
    shapes = [shape(box, ("rectangle", "polygon")[number % 2]) for box in TRUTH[number]]
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    write_json(
        file, {"version": "5.4", "shapes": shapes, "imagePath": image or name_of(number), **size}
    )


def labelme(root: Path) -> Arguments:
    save_all(root)
    for number in range(PICTURES):
        labelme_file(root / name_of(number, ".json"), number)
    return {"data": root}


def labelme_splits(root: Path) -> Arguments:
    for split, numbers in SPLITS.items():
        save_all(root / split / "images", numbers)
        for number in numbers:
            labelme_file(
                root / split / "json" / name_of(number, ".json"),
                number,
                f"..\\images\\{name_of(number)}",
            )
    return {"data": root}


def labelme_folders(root: Path) -> Arguments:
    labelme_splits(root)
    return {split: root / split / "json" for split in SPLITS}


def labelme_skipped(root: Path) -> Arguments:
    arguments = labelme(root)
    points = [{"label": "cat", "points": [[1, 1]], "shape_type": "point"}]
    write_json(
        root / name_of(0, ".json"),
        {"shapes": [shape(b, "polygon") for b in TRUTH[0]] + points, "imagePath": ""},
    )
    return arguments


def labelme_groups(root: Path) -> Arguments:
    """Each object in two shapes of one group."""
    save_all(root)
    for number in range(PICTURES):
        halves = []
        for group, box in enumerate(TRUTH[number]):
            left = box._replace(w=box.w // 3)
            right = box._replace(x=box.x + box.w - box.w // 3, w=box.w // 3)
            halves += [shape(part, "rectangle") | {"group_id": group} for part in (left, right)]
        write_json(
            root / name_of(number, ".json"), {"shapes": halves, "imagePath": name_of(number)}
        )
    return {"data": root}


def labelme_embedded(root: Path) -> Arguments:
    labelme(root)
    for number in range(PICTURES):
        file = root / name_of(number, ".json")
        content = json.loads(file.read_text())
        write_json(
            file,
            content
            | {"imageData": base64.b64encode((root / name_of(number)).read_bytes()).decode()},
        )
        (root / name_of(number)).unlink()
    return {"data": root}


def labelme_broken(root: Path) -> Arguments:
    arguments = labelme(root)
    (root / name_of(0, ".json")).write_text('{"shapes": [')
    return arguments


# VIA


def via_content(
    numbers: Iterable[int], attributes: Callable[[Box], dict[str, Any]]
) -> dict[str, Any]:
    def region(box: Box, number: int) -> dict[str, Any]:
        rect = {"name": "rect", "x": box.x, "y": box.y, "width": box.w, "height": box.h}
        xs, ys = zip(*outline(box), strict=True)
        polygon = {"name": "polygon", "all_points_x": xs, "all_points_y": ys}
        return {
            "shape_attributes": (rect, polygon)[number % 2],
            "region_attributes": attributes(box),
        }

    return {
        f"{name_of(n)}1234": {
            "filename": name_of(n),
            "size": 1234,
            "regions": [region(b, n) for b in TRUTH[n]],
        }
        for n in numbers
    }


def via(
    attributes: Callable[[Box], dict[str, Any]], name: str = "via_project.json"
) -> Callable[[Path], Arguments]:
    def build(root: Path) -> Arguments:
        save_all(root / "images")
        content = via_content(range(PICTURES), attributes)
        write_json(
            root / name, {"_via_settings": {}, "_via_img_metadata": content, "_via_attributes": {}}
        )
        return {"data": root}

    return build


def via_csv(root: Path) -> Arguments:
    """A line a region, with JSON in its cells; of the last picture a line without any."""
    save_all(root)
    picture(()).save(root / "nothing.jpg")
    head = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
    with (root / "via_export.csv").open("w", newline="") as stream:
        stream.write(f"{head}\n")
        table = writer(stream)
        for row in via_content(range(PICTURES), lambda box: {"class": box.name}).values():
            for number, region in enumerate(row["regions"]):
                cells = [json.dumps(cell) for cell in region.values()]
                table.writerow([row["filename"], 1234, "{}", len(row["regions"]), number, *cells])
        table.writerow(["nothing.jpg", 1234, "{}", 0, 0, "{}", "{}"])
    return {"data": root}


def via_csv_file(root: Path) -> Arguments:
    via_csv(root)
    return {"train": root / "via_export.csv"}


def via_csv_broken(root: Path) -> Arguments:
    file = via_csv(root)["data"] / "via_export.csv"
    file.write_text(file.read_text().replace('""rect""', "rect", 1))
    return {"data": root}


def via_splits(root: Path) -> Arguments:
    """VIA 1: regions by number, a file beside the pictures of each split."""
    for split, numbers in SPLITS.items():
        save_all(root / split, numbers)
        content = via_content(numbers, lambda box: {"name": box.name})
        for row in content.values():
            row["regions"] = {str(i): region for i, region in enumerate(row["regions"])}
        write_json(root / split / "via_region_data.json", content)
    return {"data": root}


def via_files(root: Path) -> Arguments:
    via_splits(root)
    return {split: root / split / "via_region_data.json" for split in SPLITS}


def via_without_regions(root: Path) -> Arguments:
    file = via_splits(root)["data"] / "train" / "via_region_data.json"
    content = json.loads(file.read_text())
    content[f"{name_of(0)}1234"]["regions"] = None
    write_json(file, content)
    return {"data": root}


def via_unnamed(root: Path) -> Arguments:
    return via(lambda box: {} if box == TRUTH[0][0] else {"class": box.name})(root)


# CSV


def csv(
    pattern: str, head: str = "", images: str = "images", name: str = "labels.csv", extra: str = ""
) -> Callable[[Path], Arguments]:
    def build(root: Path) -> Arguments:
        save_all(root / images)
        rows = [
            pattern.format(
                n=name_of(n), s=name_of(n, ""), b=b, x2=b.x + b.w, y2=b.y + b.h, W=WIDTH, H=HEIGHT
            )
            for n in range(PICTURES)
            for b in TRUTH[n]
        ]
        (root / name).write_text("\n".join([*([head] if head else []), *rows, extra]))
        return {"data": root}

    return build


def csv_shares(root: Path) -> Arguments:
    save_all(root / "pics")
    rows = [
        f"{name_of(n, '')},xclick,{b.name},1,{b.x / WIDTH},{(b.x + b.w) / WIDTH},{b.y / HEIGHT},{(b.y + b.h) / HEIGHT}"
        for n in range(PICTURES)
        for b in TRUTH[n]
    ]
    (root / "train.csv").write_text(
        "\n".join(["ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax", *rows])
    )
    return {"data": root}


def csv_splits(root: Path) -> Arguments:
    csv("{n};{b.x};{b.y};{x2};{y2};{b.name}", "filename;xmin;ymin;xmax;ymax;class")(root)
    head, *rows = (root / "labels.csv").read_text().split()
    for split, numbers in SPLITS.items():
        own = [row for row in rows if int(row[1]) in numbers]
        (root / f"{split}_labels.csv").write_text("\n".join([head, *own]))
    (root / "labels.csv").unlink()
    return {"data": root}


def csv_files(root: Path) -> Arguments:
    csv_splits(root)
    return {split: root / f"{split}_labels.csv" for split in SPLITS}


def csv_two(root: Path) -> Arguments:
    arguments = csv(TUTORIAL, HEAD)(root)
    (root / "more.csv").write_text((root / "labels.csv").read_text())
    return arguments


def csv_of_a_spreadsheet(root: Path) -> Arguments:
    file = csv(TUTORIAL, HEAD)(root)["data"] / "labels.csv"
    file.write_bytes(file.read_text().replace("cat", "ca\xf1").encode("cp1252"))
    return {"data": root}


def csv_background(root: Path) -> Arguments:
    arguments = csv(RETINANET, extra="nothing.jpg,,,,,")(root)
    picture(()).save(root / "images" / "nothing.jpg")
    return arguments


HEAD = "filename,width,height,class,xmin,ymin,xmax,ymax"
TUTORIAL = "{n},{W},{H},{b.name},{b.x},{b.y},{x2},{y2}"
RETINANET = "/home/me/images/{n},{b.x},{b.y},{x2},{y2},{b.name}"
SIZES = "filename,width,height,class,xmin,ymin"
CORNER = Reads(finds=frozenset({"layout"}))
MAKE_SENSE_HEAD = (
    "label_name,bbox_x,bbox_y,bbox_width,bbox_height,image_name,image_width,image_height"
)
MAKE_SENSE = "{b.name},{b.x},{b.y},{b.w},{b.h},{n},{W},{H}"
SIMPLE = "filename,xmin,ymin,xmax,ymax,class"
BAD = frozenset({"bad-box"})
UNKNOWN = Finds(frozenset({"unreadable-labels"}), *ONE_LESS)

CASES = [
    Case("labelme", labelme, Reads()),
    Case("labelme_splits", labelme_splits, Reads()),
    Case("labelme_folders", labelme_folders, Reads()),
    Case("labelme_skipped", labelme_skipped, Reads(finds=frozenset({"skipped-shapes"}))),
    Case("labelme_groups", labelme_groups, Reads(finds=frozenset({"size-missing"}))),
    Case("labelme_embedded", labelme_embedded, Refused(("imageData", "Write each picture beside"))),
    Case("labelme_broken", labelme_broken, UNKNOWN),
    Case("via", via(lambda box: {"type": box.name}), Reads()),
    Case("via_train_json", via(lambda box: {"type": box.name}, "train.json"), Reads()),
    Case("via_boxes_ticked", via(lambda box: {"kind": {box.name: True}}), Reads()),
    Case(
        "via_two_attributes",
        via(lambda b: {"a": b.name, "b": "x"}),
        Refused(("a: ", "b: x", "class")),
    ),
    Case("via_class_of_two", via(lambda box: {"Class": box.name, "b": "x"}), Reads()),
    Case("via_csv", via_csv, Reads(images=PICTURES + 1)),
    Case("via_csv_file", via_csv_file, Reads(images=PICTURES + 1)),
    Case(
        "via_csv_broken",
        via_csv_broken,
        Finds(frozenset({"unreadable-labels"}), PICTURES, ONE_LESS[1]),
    ),
    Case("via_splits", via_splits, Reads()),
    Case("via_files", via_files, Reads()),
    Case("via_without_regions", via_without_regions, UNKNOWN),
    Case("via_unnamed", via_unnamed, UNKNOWN),
    Case("csv", csv("{n},{b.x},{b.y},{x2},{y2},{b.name}", SIMPLE), Reads()),
    Case(
        "csv_sizes",
        csv("{n},{b.x},{b.y},{b.w},{b.h},{b.name}", "filename,x,y,width,height,class"),
        CORNER,
    ),
    Case(
        "csv_sizes_of_pictures",
        csv("{n},{W},{H},{b.name},{b.x},{b.y}", SIZES),
        Refused(("the picture's", "xmax")),
    ),
    Case("csv_sizes_of_both", csv(MAKE_SENSE, MAKE_SENSE_HEAD), Reads()),
    Case("csv_tutorial", csv(TUTORIAL, HEAD), Reads()),
    Case("csv_retinanet", csv(RETINANET), Reads()),
    Case("csv_background", csv_background, Reads(images=PICTURES + 1)),
    Case("csv_open_images", csv_shares, Reads()),
    Case(
        "csv_of_a_spreadsheet",
        csv_of_a_spreadsheet,
        Refused(("labels.csv: not a text file in UTF-8", "save it")),
    ),
    Case("csv_of_nothing", csv("", HEAD), Refused(("labels.csv: lists no pictures",))),
    Case(
        "csv_huge", csv(TUTORIAL, HEAD, extra="p0.jpg,96,64,cat,1,2,1e308,4"), Finds(BAD, *ONE_LESS)
    ),
    Case("csv_splits", csv_splits, Reads()),
    Case("csv_files", csv_files, Reads()),
    Case("csv_two", csv_two, Refused(("labels.csv", "more.csv", "--train"))),
    Case("csv_bad_number", csv(TUTORIAL, HEAD, extra="p0.jpg,96,64,cat,1,2,x,4"), UNKNOWN),
    Case("csv_bad_name", csv(TUTORIAL, HEAD, extra="p0.jpg,96,64,,1,2,3,4"), UNKNOWN),
]
