"""Every layout is recognised and gives the same images and boxes;
what is not recognised is explained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from detrellis.data.annotations import Annotations
from detrellis.data.doctor.check import check, prepare
from detrellis.data.doctor.drop import drop_bad
from detrellis.data.formats.voc_xml import parse_xml
from detrellis.data.layout import DataSource, resolve
from detrellis.data.records import to_annotations
from detrellis.errors import UserError
from tests.data.sets import (
    BOXES,
    COUNTS,
    HEIGHT,
    IDS,
    NAMES,
    WIDTH,
    CocoSet,
    image_name,
    picture,
    voc_xml,
    write_images,
    write_voc,
    write_yolo,
)

YAML = "names: [cat, dog, emu]\n"


def load(source: DataSource) -> dict[str, Annotations]:
    raws = source.load_all()
    classes = raws["train"].classes
    return {split: to_annotations(raw, classes) for split, raw in raws.items()}


def content(annotations: Annotations) -> set[tuple[object, ...]]:
    """(file name, class name, rounded box): what has to be the same in all layouts."""
    rows: set[tuple[object, ...]] = set()
    for image in range(len(annotations)):
        assert annotations.path(image).is_file()
        assert annotations.sizes[image].tolist() == [HEIGHT, WIDTH]
        for box in range(annotations.starts[image], annotations.starts[image + 1]):
            numbers = tuple(annotations.boxes[box].round(6).tolist())
            name = annotations.classes.names[annotations.labels[box]]
            rows.add((annotations.path(image).name, name, *numbers))
    return rows


def expected(split: str) -> set[tuple[object, ...]]:
    return {(image_name(split, image), NAMES[label], *box) for image, label, *box in BOXES[split]}


def coco(root: Path) -> dict[str, Path]:
    return {"data": CocoSet(root).write()}


def coco_2017(root: Path) -> dict[str, Path]:
    made = CocoSet(root)
    made.write()
    for split in COUNTS:
        made.file(split).rename(made.file(split).with_name(f"instances_{split}2017.json"))
        shutil.move(root / "images" / split, root / f"{split}2017")
    return {"data": root}


def coco_one_image_folder(root: Path) -> dict[str, Path]:
    made = CocoSet(root)
    made.write()
    for split in COUNTS:
        for number in range(COUNTS[split]):
            shutil.move(made.image(split, number), root / "images" / image_name(split, number))
        (root / "images" / split).rmdir()
        made.file(split).rename(root / f"{split}.json")
    return {"data": root}


def coco_deep_in_a_strange_place(root: Path) -> dict[str, Path]:
    made = CocoSet(root)
    made.write()
    (root / "raw").mkdir()
    shutil.move(root / "images", root / "raw" / "pictures")
    # The same names elsewhere must not be taken for this split's.
    return {"data": root}


def coco_named_files(root: Path) -> dict[str, Path]:
    made = CocoSet(root)
    made.write()
    for split in COUNTS:
        shutil.move(root / "images" / split, root / f"{split}_pictures")
        shutil.move(made.file(split), root / f"{split}-labels.json")
    named = {"train_images": root / "train_pictures", "val_images": root / "val_pictures"}
    return {"train": root / "train-labels.json", "val": root / "val-labels.json", **named}


def coco_named_files_without_images(root: Path) -> dict[str, Path]:
    made = CocoSet(root)
    made.write()
    return {"train": made.file("train"), "val": made.file("val")}


def coco_named_files_of_one_image_folder(root: Path) -> dict[str, Path]:
    coco_one_image_folder(root / "set")
    shutil.move(root / "set" / "images", root / "pictures")
    shutil.move(root / "set", root / "a" / "b" / "c" / "d")
    made = root / "a" / "b" / "c" / "d"
    return {
        "train": made / "train.json",
        "train_images": root / "pictures",
        "val": made / "val.json",
    }


def roboflow(root: Path) -> dict[str, Path]:
    made = CocoSet(root)
    made.write()
    for split, folder in (("train", "train"), ("val", "valid")):
        shutil.move(root / "images" / split, root / folder)
        shutil.move(made.file(split), root / folder / "_annotations.coco.json")
    return {"data": root}


def write_yolo_splits(root: Path, names: str = YAML, **places: str) -> dict[str, Path]:
    for split in COUNTS:
        write_yolo(root / "images" / split, root / "labels" / split, split)
    lines = [f"{key}: {value}" for key, value in places.items()]
    (root / "data.yaml").write_text(names + "\n".join(lines))
    return {"data": root}


def yolo(root: Path) -> dict[str, Path]:
    return write_yolo_splits(root, train="images/train", val="images/val")


def yolo_file(root: Path) -> dict[str, Path]:
    write_yolo_splits(root, train="images/train", val="images/val")
    return {"data": root / "data.yaml"}


def yolo_names_as_mapping(root: Path) -> dict[str, Path]:
    names = "names:\n  0: cat\n  1: dog\n  2: emu\n"
    return write_yolo_splits(root, names, path=str(root), train="images/train", val="images/val")


def yolo_of_another_machine(root: Path) -> dict[str, Path]:
    return write_yolo_splits(root, train="/content/set/images/train", val="../images/val")


def yolo_lists_of_folders(root: Path) -> dict[str, Path]:
    return write_yolo_splits(root, train="[images/train]", val="[images/val]")


def yolo_text_lists(root: Path) -> dict[str, Path]:
    arguments = write_yolo_splits(root, train="train.txt", val="val.txt")
    for split in COUNTS:
        names = [f"./images/{split}/{image_name(split, n)}" for n in range(COUNTS[split])]
        (root / f"{split}.txt").write_text("\n".join(names) + "\n")
    return arguments


def yolo_roboflow(root: Path) -> dict[str, Path]:
    for split, folder in (("train", "train"), ("val", "valid")):
        write_yolo(root / folder / "images", root / folder / "labels", split)
    (root / "data.yaml").write_text(
        YAML + "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
    )
    return {"data": root}


def yolo_class_list(root: Path) -> dict[str, Path]:
    for split in COUNTS:
        write_yolo(root / "images" / split, root / "labels" / split, split)
    (root / "classes.txt").write_text("cat\ndog\nemu\n")
    return {"data": root}


def voc(root: Path) -> dict[str, Path]:
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split in COUNTS:
        write_voc(root / "Annotations", root / "JPEGImages", split)
        listed = "".join(f"{split}_{n}\n" for n in range(COUNTS[split]))
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(listed)
    return {"data": root}


def voc_devkit(root: Path) -> dict[str, Path]:
    voc(root / "VOCdevkit" / "VOC2012")
    return {"data": root}


def voc_trainval_and_test(root: Path) -> dict[str, Path]:
    voc(root)
    lists = root / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "val.txt").rename(lists / "test.txt")
    return {"data": root}


def voc_folder_per_split(root: Path) -> dict[str, Path]:
    for split, folder in (("train", "train"), ("val", "valid")):
        write_voc(root / folder, root / folder, split)
    return {"data": root}


def voc_named_folders(root: Path) -> dict[str, Path]:
    for split in COUNTS:
        write_voc(root / f"{split}_xml", root / f"{split}_pictures", split)
    named = {"train_images": root / "train_pictures", "val_images": root / "val_pictures"}
    return {"train": root / "train_xml", "val": root / "val_xml", **named}


def voc_counting_from_0(root: Path) -> dict[str, Path]:
    for split, folder in (("train", "train"), ("val", "valid")):
        write_voc(root / folder, root / folder, split, first=0)
    return {"data": root}


LAYOUTS = [
    coco,
    coco_2017,
    coco_one_image_folder,
    coco_deep_in_a_strange_place,
    coco_named_files,
    coco_named_files_without_images,
    coco_named_files_of_one_image_folder,
    roboflow,
    yolo,
    yolo_file,
    yolo_names_as_mapping,
    yolo_of_another_machine,
    yolo_lists_of_folders,
    yolo_text_lists,
    yolo_roboflow,
    yolo_class_list,
    voc,
    voc_devkit,
    voc_trainval_and_test,
    voc_folder_per_split,
    voc_named_folders,
    voc_counting_from_0,
]


@pytest.mark.parametrize("build", LAYOUTS, ids=lambda f: f.__name__)
def test_every_layout_gives_the_same(
    tmp_path: Path, build: Callable[[Path], dict[str, Path]]
) -> None:
    source = resolve(**build(tmp_path))
    assert source.kind == build.__name__.split("_")[0].replace("roboflow", "coco")
    read = load(source)
    assert set(read) == {"train", "val"}
    for split, found in read.items():
        assert len(found) == COUNTS[split]  # images without boxes are kept
        assert content(found) == expected(split)
    ids = {"coco": IDS, "yolo": (0, 1, 2), "voc": (1, 2, 3)}[source.kind]
    assert read["train"].classes.ids == ids
    assert read["train"].classes.names == NAMES
    assert read["val"].classes is read["train"].classes


@pytest.mark.parametrize(
    "build", [coco, yolo_text_lists, voc, voc_folder_per_split], ids=lambda f: f.__name__
)
def test_a_source_survives_json_and_another_working_folder(
    tmp_path: Path, build: Callable[[Path], dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    source = resolve(**build(Path("set")))
    stored = json.dumps(source.to_dict())
    monkeypatch.chdir("/")
    assert DataSource.from_dict(json.loads(stored)) == source
    assert content(load(source)["train"]) == expected("train")


def test_train_only_has_no_val(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    made.write()
    made.file("val").unlink()
    assert set(resolve(data=tmp_path).splits) == {"train"}
    assert set(resolve(train=made.file("train")).splits) == {"train"}
    assert set(resolve(data=made.file("train")).splits) == {"train"}
    with pytest.raises(UserError, match="no split `val`"):
        resolve(data=tmp_path).load("val")


def test_equal_names_in_two_folders_are_not_confused(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    for split in COUNTS:
        for number in range(COUNTS[split]):
            made.image(split, number).rename(made.root / "images" / split / f"{number}.jpg")
            made.listed(number, split)["file_name"] = f"{number}.jpg"
    made.write()
    (tmp_path / "images").rename(tmp_path / "pictures")
    found = {split: files.images[0].name for split, files in resolve(data=tmp_path).splits.items()}
    assert found == {"train": "train", "val": "val"}


def test_other_image_folders_can_be_given_for_a_folder(tmp_path: Path) -> None:
    CocoSet(tmp_path / "set").write()
    write_images(tmp_path / "other", "train")
    source = resolve(data=tmp_path / "set", train_images=tmp_path / "other")
    assert source.splits["train"].images == (tmp_path / "other",)


def test_voc_without_lists_is_split_by_name(tmp_path: Path) -> None:
    write_images(tmp_path / "images", "train")
    xml = tmp_path / "voc_annotations"
    for split in COUNTS:
        write_voc(xml, tmp_path / "images", split)
    for data in (tmp_path, xml):
        raws = resolve(data=data).load_all()
        names = {split: set(raw.file_names) for split, raw in raws.items()}
        assert len(names["train"] | names["val"]) == sum(COUNTS.values())
        assert not names["train"] & names["val"]
        # Pinned: another version must not mix what a run kept apart.
        assert names["val"] == {"train_1.jpg", "train_3.jpg"}
        assert [f.code for f in raws["train"].findings] == ["layout"]
    (xml / "train_0.xml").unlink()
    left = resolve(data=tmp_path).load_all()
    assert {s: set(r.file_names) for s, r in left.items()} == {
        s: n - {"train_0.jpg"} for s, n in names.items()
    }


def test_voc_ids_do_not_depend_on_which_splits_are_read(tmp_path: Path) -> None:
    voc(tmp_path)
    source = resolve(data=tmp_path)
    assert source.load("val").categories == source.load_all()["val"].categories
    # A name that only val has comes last, and training does not list it.
    file = tmp_path / "Annotations" / "val_0.xml"
    file.write_text(file.read_text().replace("emu", "ant"))
    raws = source.load_all()
    assert [n for _, n in raws["train"].categories] == ["cat", "dog", "emu"]
    assert raws["val"].categories[3:] == ((4, "ant"),)


def test_voc_finds_images_by_name_when_filename_is_stale(tmp_path: Path) -> None:
    write_voc(tmp_path / "train", tmp_path / "train", "train")
    file = tmp_path / "train" / "train_1.xml"
    file.write_text(file.read_text().replace("train_1.jpg", r"C:\labels\train_0.jpg"))
    assert resolve(data=tmp_path).load("train").file_names[1] == "train_1.jpg"


def test_yolo_polygon_becomes_its_bounding_box(tmp_path: Path) -> None:
    arguments = yolo(tmp_path)
    (tmp_path / "labels" / "train" / "train_0.txt").write_text(
        "1 0.25 0.5 0.5 0.25 0.75 0.5 0.5 0.75\n"
    )
    raw = resolve(**arguments).load("train")
    assert np.allclose(raw.boxes[0], [0.25 * WIDTH, 0.25 * HEIGHT, 0.5 * WIDTH, 0.5 * HEIGHT])
    assert raw.box_categories[0] == 1


def test_yolo_keypoints_are_left_out(tmp_path: Path) -> None:
    arguments = yolo(tmp_path)
    yaml = tmp_path / "data.yaml"
    yaml.write_text(yaml.read_text() + "\nkpt_shape: [2, 3]\n")
    (tmp_path / "labels" / "train" / "train_0.txt").write_text(
        "1 0.5 0.5 0.5 0.25 0.1 0.1 2 0.9 0.9 2\n"
    )
    raw = resolve(**arguments).load("train")
    assert np.allclose(raw.boxes[0], [0.25 * WIDTH, 0.375 * HEIGHT, 0.5 * WIDTH, 0.25 * HEIGHT])


def test_nothing_recognised_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "labels.csv").write_text("a,b")
    with pytest.raises(UserError) as error:
        resolve(data=tmp_path)
    for word in ("instances_train.json", "data.yaml", "Annotations", "photos/", "labels.csv"):
        assert word in error.value.message
    assert "--train" in error.value.remedy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no data set is given"),
        ({"data": Path("gone")}, "gone: no such file or folder"),
        ({"train": Path("gone.json")}, r"gone\.json: no such file or folder"),
        ({"data": Path("a"), "train": Path("b")}, "both"),
        ({"data": Path("notes.txt")}, r"notes\.txt: neither a folder"),
        ({"train": Path("notes.txt"), "val": Path("folder")}, "one is a file"),
        ({"train": Path("folder")}, "no XML files"),
        ({"train": Path("train.json")}, r"its images were not found; looked for 'a\.jpg'"),
        (
            {"train": Path("train.json"), "train_images": Path("gone")},
            "gone: no such folder of images",
        ),
    ],
)
def test_what_cannot_be_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Path], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("notes.txt").write_text("hello")
    Path("train.json").write_text('{"images": [{"file_name": "a.jpg"}]}')
    with pytest.raises(UserError, match=message):
        resolve(**arguments)


def test_two_candidates_are_not_guessed_between(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    made.write()
    shutil.copy(made.file("train"), made.file("train").with_name("instances_train2017.json"))
    with pytest.raises(UserError, match="more than one file for `train`"):
        resolve(data=tmp_path)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: [cat\ntrain: x", "malformed yaml"),
        ("- a\n- b", "not a yaml mapping"),
        ("names: [cat, dog, emu]\nval: images/val", "no `train:`"),
        ("train: images/train", "`names:` is missing"),
        ("names: cat\ntrain: images/train", "`names:` is 'cat'"),
        ("names: [cat]\ntrain: images/gone", "`train: images/gone` is not there"),
    ],
)
def test_yaml_mistakes_are_named(tmp_path: Path, yaml: str, message: str) -> None:
    write_yolo_splits(tmp_path)
    (tmp_path / "data.yaml").write_text(yaml)
    with pytest.raises(UserError, match=message) as error:
        resolve(data=tmp_path / "data.yaml").load("train")
    assert "data.yaml" in error.value.message


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (b"<annotation><object>", "malformed XML"),
        (b"<annotation><object/></annotation>", "object 1 has no <name>"),
        (b"<html></html>", "XML of another kind"),
        (b"", "the file is empty"),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "'klingon'"),
        (b'<?xml version="1.0" encoding="gb2312"?><annotation>\xff\xff</annotation>', "'gb2312'"),
        (
            b"<annotation><object><name>c\xfft</name></object></annotation>",
            "object 1 is not in UTF-8",
        ),
        (None, "no such file"),
    ],
)
def test_a_bad_xml_file_costs_its_picture_alone(
    tmp_path: Path, xml: bytes | None, message: str
) -> None:
    arguments = voc(tmp_path)
    file = tmp_path / "Annotations" / "train_1.xml"
    file.unlink() if xml is None else file.write_bytes(xml)
    raw = resolve(**arguments).load("train")
    assert [(f.code, f.file, f.row) for f in raw.findings] == [("unreadable-labels", str(file), 1)]
    assert message in raw.findings[0].what
    kept, counts = drop_bad(raw, raw.findings)
    assert counts == {"unreadable-labels": 1}
    assert "train_1.jpg" not in kept.file_names
    assert len(kept) == COUNTS["train"] - 1


@pytest.mark.parametrize(
    ("encoding", "declared"),
    [
        ("gb18030", "gb2312"),
        ("gbk", "GBK"),
        ("cp932", "Shift_JIS"),
        ("utf-16", "utf-16"),
        ("utf-8", "utf-16"),  # as .NET's StringWriter leaves it
        ("utf-8-sig", "utf-8"),
        ("cp1252", "windows-1252"),
        ("latin-1", "ISO-8859-1"),
    ],
)
def test_xml_is_read_in_its_encoding(tmp_path: Path, encoding: str, declared: str) -> None:
    name = "café" if encoding in ("cp1252", "latin-1") else "狗"
    xml = f'<?xml version="1.0" encoding="{declared}"?>{voc_xml("a.jpg", BOXES["train"][:2])}'.replace(
        "cat", name
    )
    (tmp_path / "a.xml").write_bytes(xml.encode(encoding))
    parsed = parse_xml(tmp_path / "a.xml")
    assert parsed.problem == ""
    assert [item.name for item in parsed.objects] == [name, "dog"]


@pytest.mark.parametrize(
    ("body", "corners"),
    [
        (
            "<robndbox><cx>20</cx><cy>10</cy><w>8</w><h>4</h><angle>1.5707963</angle></robndbox>",
            (18, 6, 22, 14),
        ),
        (
            "<polygon><pt><x>3</x><y>9</y></pt><pt><x>7</x><y>2</y></pt></polygon>",
            (3, 2, 7, 9),
        ),
        ("<polygon><x1>3</x1><y1>9</y1><x2>7</x2><y2>2</y2></polygon>", (3, 2, 7, 9)),
        ("<robndbox><cx>20</cx><cy>10</cy></robndbox>", None),
        ("<point/>", None),
    ],
)
def test_the_box_around_other_shapes_of_xml(
    tmp_path: Path, body: str, corners: tuple[int, ...] | None
) -> None:
    xml = f"<annotation><object><name>cat</name>{body}</object></annotation>"
    (tmp_path / "a.xml").write_text(xml)
    (item,) = parse_xml(tmp_path / "a.xml").objects
    if corners is None:
        assert not np.isfinite(item.corners).any()  # bad-box
    else:
        assert item.edges
        assert np.allclose(item.corners, corners, atol=1e-5)


@pytest.mark.parametrize(("plain", "edges"), [(0, True), (98, True), (99, False)])
def test_corners_with_decimals_are_edges_unless_they_are_rare(
    tmp_path: Path, plain: int, edges: bool
) -> None:
    """VOC's own files have a few decimals among thousands of whole numbers."""
    write_images(tmp_path, "train")
    decimal = voc_xml("train_0.jpg", BOXES["train"][:1]).replace("<xmin>5<", "<xmin>5.5<")
    (tmp_path / "train_0.xml").write_text(decimal)
    (tmp_path / "train_1.xml").write_text(voc_xml("train_1.jpg", BOXES["train"][:1] * plain))
    raw = resolve(train=tmp_path).load("train")
    assert raw.boxes[0].tolist() == ([5.5, 7, 8.5, 7] if edges else [4.5, 6, 9.5, 8])


def test_a_set_can_name_its_images(tmp_path: Path) -> None:
    """Where the pictures are not near,
    `--train-images` helps beside `--data`, as the message says.
    """
    write_voc(tmp_path / "a" / "b" / "c" / "set" / "xml", tmp_path / "far" / "away", "train")
    with pytest.raises(UserError, match="train_0"):
        resolve(data=tmp_path / "a" / "b" / "c" / "set")
    source = resolve(
        data=tmp_path / "a" / "b" / "c" / "set", train_images=tmp_path / "far" / "away"
    )
    assert "missing-image" not in {f.code for f in check(source, fast=True).errors}


def test_xml_without_size_is_measured(tmp_path: Path) -> None:
    arguments = voc(tmp_path)
    file = tmp_path / "Annotations" / "train_1.xml"
    file.write_text(file.read_text().replace("<width>48</width>", ""))
    raw = resolve(**arguments).load("train")
    assert raw.sizes[1].tolist() == [HEIGHT, WIDTH]
    assert [f.code for f in raw.findings] == ["size-missing"]


# Folders as people have them


def moved(made: CocoSet, split: str, to: str) -> Path:
    target = made.root / to
    target.parent.mkdir(parents=True, exist_ok=True)
    made.file(split).rename(target)
    return target


def one_coco_file(root: Path, name: str) -> Path:
    """A COCO file of this name, and JSON files that are not COCO's."""
    made = CocoSet(root)
    made.write()
    made.file("val").unlink()
    (root / "package.json").write_text('{"images": 3}')
    (root / "a.json").write_text("[]")
    moved(made, "train", name)
    return root


@pytest.mark.parametrize(
    "name",
    [
        "annotations/instances_default.json",
        "result.json",
        "labels.json",
        "_annotations.json",
        "coco.json",
        "Annotations/all.json",
        "labels/export.json",
    ],
)
def test_one_coco_file_of_any_name_is_for_training_and_validation(
    tmp_path: Path, name: str
) -> None:
    read = load(resolve(data=one_coco_file(tmp_path, name)))
    parts = [content(read[split]) for split in ("train", "val")]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == expected("train")


@pytest.mark.parametrize(
    "name", ["annotations/train_v2_final.json", "labels-train.json", "train.json"]
)
def test_one_coco_file_that_is_called_train_is_for_training_alone(
    tmp_path: Path, name: str
) -> None:
    read = load(resolve(data=one_coco_file(tmp_path, name)))
    assert {split: content(found) for split, found in read.items()} == {"train": expected("train")}


def test_names_tell_the_splits_of_several_coco_files(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    made.write()
    moved(made, "train", "annotations/my-train-v2.json")
    moved(made, "val", "annotations/coco_VALID_final.json")
    read = load(resolve(data=tmp_path))
    assert {split: content(found) for split, found in read.items()} == {
        s: expected(s) for s in ("train", "val")
    }


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a.json", "b.json"), ["several COCO files", "a.json", "b.json"]),
        (
            ("my_train_1.json", "my_train_2.json"),
            ["several COCO files", "my_train_1.json", "my_train_2.json"],
        ),
        (
            ("my_val.json", "my_test.json"),
            ["no COCO file for training, only", "my_val.json", "my_test.json"],
        ),
    ],
)
def test_several_coco_files_that_cannot_be_told_apart_are_listed(
    tmp_path: Path, names: tuple[str, str], words: list[str]
) -> None:
    made = CocoSet(tmp_path)
    made.write()
    for split, name in zip(COUNTS, names, strict=True):
        moved(made, split, name)
    with pytest.raises(UserError) as error:
        resolve(data=tmp_path)
    for word in words:
        assert word in error.value.message
    # The remedy
    assert content(load(resolve(train=tmp_path / names[0]))["train"]) == expected("train")


def test_a_json_file_of_any_name_in_a_folder_per_split(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    made.write()
    for split, folder in (("train", "Train"), ("val", "valid")):
        shutil.move(tmp_path / "images" / split, tmp_path / folder / "data")
        moved(made, split, f"{folder}/labels.json")
    read = load(resolve(data=tmp_path))
    assert {split: content(found) for split, found in read.items()} == {
        s: expected(s) for s in ("train", "val")
    }


def test_a_data_set_one_folder_deeper_is_found_if_it_is_the_only_one(tmp_path: Path) -> None:
    roboflow(tmp_path / "Project-1")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "README.txt").write_text("hello")
    source = resolve(data=tmp_path)
    assert content(load(source)["train"]) == expected("train")
    assert source.folder == tmp_path
    yolo(tmp_path / "Project-2")
    with pytest.raises(UserError, match="more than one data set: Project-1, Project-2"):
        resolve(data=tmp_path)


def copied(made: CocoSet, folders: dict[str, bool]) -> None:
    """Every image in several folders, in those that say False with other pixels."""
    old = made.root / "images" / "train"
    for folder, same in folders.items():
        (made.root / folder).mkdir(parents=True)
        for number, file in enumerate(sorted(old.iterdir())):
            if same:
                shutil.copy(file, made.root / folder / file.name)
            else:
                picture(500 + number + 7 * sum(folder.encode())).save(
                    made.root / folder / file.name
                )
    shutil.rmtree(made.root / "images")


@pytest.mark.parametrize(
    ("folders", "taken", "why"),
    [
        (("Annotated", "Pictures"), "Pictures", "drawn"),
        (("depth", "photos"), "photos", "drawn"),
        (("a/masks", "a/rgb"), "a/rgb", "drawn"),
        (("somewhere", "my images"), "my images", "its name says pictures"),
        (("x/training", "x/testing"), "x/training", "its name says the split"),
    ],
)
def test_names_decide_between_folders_that_all_have_the_images(
    tmp_path: Path, folders: tuple[str, ...], taken: str, why: str
) -> None:
    made = CocoSet(tmp_path)
    made.write()
    made.file("val").unlink()
    copied(made, dict.fromkeys(folders, False))
    source = resolve(data=tmp_path)
    assert source.splits["train"].images == (tmp_path / taken,)
    (note,) = source.load("train").findings
    other = next(f for f in folders if f != taken)
    assert f"images of the same names are in {other} too; {taken} is read" in note.what
    assert why in note.what


def test_folders_between_which_nothing_decides_are_refused(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    made.write()
    made.file("val").unlink()
    copied(made, {"one": False, "two": False})
    with pytest.raises(UserError) as error:
        resolve(data=tmp_path)
    for word in ("more than one folder", str(tmp_path / "one"), str(tmp_path / "two")):
        assert word in error.value.message
    assert "--train-images" in error.value.remedy
    source = resolve(data=tmp_path, train_images=tmp_path / "two")  # the remedy
    assert source.splits["train"].images == (tmp_path / "two",)


def test_copies_of_the_same_images_are_no_choice(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    made.write()
    made.file("val").unlink()
    copied(made, {"one": True, "two": True})
    source = resolve(data=tmp_path)
    assert content(load(source)["train"]) == expected("train")
    assert "the same files" in source.load("train").findings[0].what


def test_a_usual_name_counts_in_any_case(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    made.write()
    made.file("val").unlink()
    copied(made, {"Annotated": False, "Images": True})
    assert resolve(data=tmp_path).splits["train"].images == (tmp_path / "Images",)


def test_an_image_folder_can_be_named_where_none_is_found(tmp_path: Path) -> None:
    made = CocoSet(tmp_path / "set")
    made.write()
    shutil.move(tmp_path / "set" / "images", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"its images were not found; looked for 'train_0\.jpg'"):
        resolve(data=tmp_path / "set")
    folders = {f"{split}_images": tmp_path / "elsewhere" / split for split in COUNTS}
    read = load(resolve(data=tmp_path / "set", **folders))
    assert {split: content(found) for split, found in read.items()} == {
        s: expected(s) for s in ("train", "val")
    }


def test_images_of_a_suffix_that_is_not_read_are_told(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    made.write()
    for file in (tmp_path / "images" / "train").iterdir():
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(UserError) as error:
        resolve(data=tmp_path)
    assert "train_0.heic, but images of this suffix are not read" in error.value.message


def test_nothing_recognised_counts_the_files_of_each_folder(tmp_path: Path) -> None:
    for name in (
        "notes/a.xml",
        "notes/b.xml",
        "notes/c.csv",
        "notes/.d.xml",
        "pics/p.jpg",
        "pics/q.jfif",
        "all.csv",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        resolve(data=tmp_path)
    for line in (
        "here: 1 .csv (all.csv)",
        "notes/: 2 .xml (a.xml,b.xml), 1 .csv (c.csv)",
        "pics/: 2 images",
    ):
        assert line in error.value.message
    for word in ("--train FILE", "--train FOLDER", "--train-images"):
        assert word in error.value.remedy


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        (
            {"val": Path("v.json")},
            "only v.json is given, as --val",
            "Give --train too; or this file as --train",
        ),
        (
            {"data": Path("https://example.org/set.zip")},
            "a URL, not a file or folder",
            "Download it first",
        ),
        (
            {"train": Path("s3://bucket/train.json")},
            "a URL, not a file or folder",
            "Download it first",
        ),
        (
            {"train_images": Path(".")},
            "only --train-images given, but no annotations",
            "--data FOLDER",
        ),
    ],
)
def test_what_is_no_data_set_says_what_to_give(
    arguments: dict[str, Path], message: str, remedy: str
) -> None:
    with pytest.raises(UserError) as error:
        resolve(**arguments)
    assert message in error.value.message
    assert remedy in error.value.remedy


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "set.tar.gz").touch()
    with pytest.raises(UserError, match="an archive") as error:
        resolve(data=tmp_path / "set.tar.gz")
    assert "Unpack it" in error.value.remedy


def test_what_is_not_read_is_counted_by_suffix(tmp_path: Path) -> None:
    made = CocoSet(tmp_path)
    made.write()
    for name in (
        "more/x.jpg",
        "more/y.JPG",
        "more/.z.jpg",
        "raw.zip",
        "annotations/captions.json",
        "LICENSE",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    source = resolve(data=tmp_path)
    (found,) = (f for f in check(source, fast=True).findings if f.code == "unused-files")
    assert (found.severity, found.count, found.split) == ("note", 5, "")
    assert found.what.startswith("5 files in this folder are not used: 2 .jpg (more/x.jpg, ...), ")
    for told in (
        "1 .zip (raw.zip)",
        "1 .json (annotations/captions.json)",
        "1 without a suffix (LICENSE)",
    ):
        assert told in found.what
    assert "unused-files" not in {f.code for f in prepare(source)[3].findings}
    assert "unused-files" not in {
        f.code for f in check(source, fast=True, splits=["train"]).findings
    }


def test_linked_folders_and_files_are_used(tmp_path: Path) -> None:
    CocoSet(tmp_path / "real").write()
    (tmp_path / "set" / "annotations").mkdir(parents=True)
    for name in (
        "images",
        *(f"annotations/{f.name}" for f in (tmp_path / "real" / "annotations").iterdir()),
    ):
        (tmp_path / "set" / name).symlink_to(tmp_path / "real" / name)
    assert "unused-files" not in {
        f.code for f in check(resolve(data=tmp_path / "set"), fast=True).findings
    }


def test_more_labels_left_out_than_read_is_a_warning_of_training_too(tmp_path: Path) -> None:
    arguments = yolo(tmp_path)
    source = resolve(**arguments)
    assert "unused-annotations" not in {f.code for f in prepare(source)[3].findings}
    (tmp_path / "labels" / "more").mkdir()
    for number in range(8):
        (tmp_path / "labels" / "more" / f"{number}.TXT").touch()
    (found,) = (f for f in prepare(source)[3].findings if f.code == "unused-annotations")
    assert found.severity == "warning"
    assert found.what == "8 of 14 annotation files are not used: labels/more/0.TXT, ..."


@pytest.mark.parametrize("build", [coco, yolo, voc], ids=lambda f: f.__name__)
def test_names_that_differ_in_case_are_one_slip(
    tmp_path: Path, build: Callable[[Path], dict[str, Path]]
) -> None:
    arguments = build(tmp_path)
    for file in tmp_path.rglob("*"):
        if file.suffix in (".json", ".xml", ".yaml"):
            file.write_text(file.read_text().replace("emu", "Cat"))
    (found, *_) = (
        f
        for f in check(resolve(**arguments), fast=True).findings
        if f.code == "similar-class-names"
    )
    assert found.severity == "warning"
    for name in ("'cat' (id ", "'Cat' (id ", "2 boxes", "1 boxes"):
        assert name in found.what


@pytest.mark.parametrize("build", LAYOUTS, ids=lambda f: f.__name__)
def test_a_part_of_training_can_be_held_out_of_every_layout(
    tmp_path: Path, build: Callable[[Path], dict[str, Path]]
) -> None:
    source = resolve(**build(tmp_path))
    with pytest.raises(UserError, match="has images to validate on already"):
        source.held_out()
    alone = replace(source, splits={"train": source.splits["train"]})
    train, val = load(alone.held_out()).values()
    assert len(train) + len(val) == COUNTS["train"]
    assert not content(train) & content(val)
    assert content(train) | content(val) == expected("train")
    assert content(load(alone.held_out().as_whole())["train"]) == expected("train")
