"""YOLO: lists, yaml files and label files as tools write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.data.field.cases import Arguments, Case, Finds, Reads, Refused
from tests.data.field.pictures import (
    CLASSES,
    HEIGHT,
    OBJECTS,
    PICTURES,
    SPLITS,
    TRUTH,
    WIDTH,
    YAML,
    Box,
    name_of,
    picture,
    save,
    save_all,
    write_labels,
    yolo_lines,
    yolo_set,
)

ONE_LESS = (PICTURES - 1, OBJECTS - len(TRUTH[0]))  # without the first picture


def plain(root: Path) -> Arguments:
    return {"data": yolo_set(root)}


def flat(root: Path) -> Arguments:
    """As LabelImg leaves it: all in one folder."""
    save_all(root)
    write_labels(root)
    (root / "classes.txt").write_text("cat\ndog\n")
    return {"data": root}


def nameless(root: Path) -> Arguments:
    yolo_set(root)
    (root / "data.yaml").unlink()
    return {"data": root}


def notebook_copies(root: Path) -> Arguments:
    yolo_set(root)
    for number in SPLITS["train"]:
        save(number, root / "images" / "train" / ".ipynb_checkpoints" / f"p{number}-checkpoint.jpg")
    return {"data": root}


def jfif(root: Path) -> Arguments:
    yolo_set(root)
    for number in SPLITS["train"][:2]:
        file = root / "images" / "train" / name_of(number)
        file.rename(file.with_suffix(".jfif"))
    stereo = root / "images" / "train" / name_of(2, ".mpo")
    save(2, stereo, save_all=True, append_images=[picture(())])
    stereo.with_suffix(".jpg").unlink()
    return {"data": root}


def same_name(root: Path) -> Arguments:
    """In two folders, with the label file of one beside them."""
    yolo_set(root)
    save(3, root / "images" / "train" / "more" / name_of(0))
    return {"data": root}


def with_yaml(yaml: str) -> Callable[[Path], Arguments]:
    return lambda root: {"data": yolo_set(root, yaml)}


def label_files(spoil: Callable[[Path], object]) -> Callable[[Path], Arguments]:
    """Each label file of training is spoilt."""

    def build(root: Path) -> Arguments:
        yolo_set(root)
        for number in SPLITS["train"]:
            spoil(root / "labels" / "train" / name_of(number, ".txt"))
        return {"data": root}

    return build


def first_label(content: bytes) -> Callable[[Path], Arguments]:
    """The first picture's label file holds something else."""

    def build(root: Path) -> Arguments:
        yolo_set(root)
        (root / "labels" / "train" / name_of(0, ".txt")).write_bytes(content)
        return {"data": root}

    return build


def labels_in(new: str) -> Callable[[Path], Arguments]:
    """The folder `labels/` has another name, or the files lie beside the images."""

    def build(root: Path) -> Arguments:
        yolo_set(root)
        for split, numbers in SPLITS.items():
            for number in numbers:
                target = root / new.format(split) / name_of(number, ".txt")
                target.parent.mkdir(parents=True, exist_ok=True)
                (root / "labels" / split / name_of(number, ".txt")).rename(target)
        return {"data": root}

    return build


def flat_with_labels(root: Path) -> Arguments:
    """Pictures at the top, their labels in a folder."""
    save_all(root)
    write_labels(root / "labels")
    (root / "classes.txt").write_text("cat\r\ndog\r\n")
    return {"data": root}


def flat_splits(root: Path, second: str = "cat\ndog\n") -> Arguments:
    """`train/` and `val/` as LabelImg leaves a folder."""
    for (split, numbers), names in zip(SPLITS.items(), ("cat\ndog\n", second), strict=True):
        save_all(root / split, numbers)
        write_labels(root / split, numbers)
        (root / split / "classes.txt").write_text(names)
    return {"data": root}


def yaml_apart(root: Path) -> Arguments:
    """The yaml in a folder of its own, its paths relative to the one above."""
    yolo_set(root)
    (root / "cfg").mkdir()
    (root / "data.yaml").rename(root / "cfg" / "data.yaml")
    return {"data": root}


def same_stem(root: Path) -> Arguments:
    yolo_set(root)
    picture((), 9).save(root / "images" / "train" / name_of(0, ".png"))
    return {"data": root}


def listed(
    pattern: str, yaml: str = "names: [cat, dog]\ntrain: train.txt\nval: val.txt\n"
) -> Callable[..., Arguments]:
    """`train.txt` and `val.txt` with a line a picture."""

    def build(root: Path) -> Arguments:
        yolo_set(root, yaml)
        for split, numbers in SPLITS.items():
            (root / f"{split}.txt").write_text(
                "".join(pattern.format(split, name_of(n)) + "\n" for n in numbers)
            )
        return {"data": root}

    return build


def lines(form: Callable[[Box], Sequence[float]]) -> Callable[[Path], Arguments]:
    """Label files of another form: `form` gives what follows the class."""

    def build(root: Path) -> Arguments:
        yolo_set(root)
        for split, numbers in SPLITS.items():
            for number in numbers:
                rows = ((CLASSES.index(b.name), *form(b)) for b in TRUTH[number])
                text = "".join(" ".join(f"{value:.6g}" for value in row) + "\n" for row in rows)
                (root / "labels" / split / name_of(number, ".txt")).write_text(text)
        return {"data": root}

    return build


def shares(box: Box) -> tuple[float, float, float, float]:
    return (box.x + box.w / 2) / WIDTH, (box.y + box.h / 2) / HEIGHT, box.w / WIDTH, box.h / HEIGHT


def keypoints(*flags: int) -> Callable[[Box], list[float]]:
    """Five points in the box, each with one of the flags behind it, where there are flags."""
    places = ((0.5, 0.1), (0.2, 0.8), (0.8, 0.3), (0.1, 0.4), (0.6, 0.9))

    def form(box: Box) -> list[float]:
        row = [*shares(box)]
        for number, (x, y) in enumerate(places):
            row += [
                (box.x + x * box.w) / WIDTH,
                (box.y + y * box.h) / HEIGHT,
                *flags[number : number + 1],
            ]
        return row

    return form


def corners(box: Box) -> list[float]:
    points = ((0, 0), (1, 0), (1, 1), (0, 1))
    return [
        v for x, y in points for v in ((box.x + x * box.w) / WIDTH, (box.y + y * box.h) / HEIGHT)
    ]


def outline(box: Box) -> list[float]:
    points = ((0, 0.5), (0.25, 0), (0.75, 0), (1, 0.5), (0.75, 1), (0.25, 1))
    return [
        v for x, y in points for v in ((box.x + x * box.w) / WIDTH, (box.y + y * box.h) / HEIGHT)
    ]


def one_keypoint(box: Box) -> list[float]:
    return [*shares(box), *shares(box)[:2]]


UNKNOWN = Finds(frozenset({"unreadable-labels"}), *ONE_LESS)
ODD_LINE = Finds(frozenset({"malformed-label"}), *ONE_LESS)
RENAMED = Reads(finds=frozenset({"renamed-file"}))
POSE = Reads(finds=frozenset({"keypoints"}))
GOOD = yolo_lines(0).encode()

CASES = [
    Case("yolo_flat", flat, Reads()),
    Case("yolo_flat_labels", flat_with_labels, Reads()),
    Case("yolo_flat_splits", flat_splits, Reads()),
    Case(
        "yolo_classes_differ",
        lambda root: flat_splits(root, "dog\ncat\n"),
        Refused(("val/classes.txt", "differ")),
    ),
    Case("yolo_yaml_apart", yaml_apart, Reads()),
    Case(
        "yolo_yaml_twice",
        with_yaml(f"{YAML}names: [dog]\n"),
        Refused(("`names:` is there twice", "1 and 4")),
    ),
    Case("yolo_label_flat", labels_in("labels"), Reads()),
    Case("yolo_nameless", nameless, Refused(("labels/train/p0.txt", "classes.txt"))),
    Case("yolo", plain, Reads()),
    Case("yolo_ipynb", notebook_copies, Reads()),
    Case("yolo_jfif", jfif, Reads()),
    Case("yolo_yaml_backslash", with_yaml(YAML.replace("/", "\\")), Reads()),
    Case("yolo_yaml_path", with_yaml(f"path: /content/drive/MyDrive/set\n{YAML}"), Reads()),
    Case("yolo_yaml_absolute", with_yaml(YAML.replace("images", "C:\\me\\set\\images")), Reads()),
    Case("yolo_yaml_null", with_yaml(f"{YAML}test: null\nkpt_shape: null\n"), Reads()),
    Case("yolo_nc", with_yaml(f"nc: 3\n{YAML}"), Reads(finds=frozenset({"class-count"}))),
    Case("yolo_label_TXT", label_files(lambda f: f.rename(f.with_suffix(".TXT"))), Reads()),
    Case("yolo_label_case", label_files(lambda f: f.rename(f.with_name(f.name.upper()))), Reads()),
    Case(
        "yolo_label_utf16",
        label_files(lambda f: f.write_text(f.read_text(), encoding="utf-16")),
        Reads(),
    ),
    Case(
        "yolo_label_bom",
        label_files(lambda f: f.write_text(f.read_text(), encoding="utf-8-sig")),
        Reads(),
    ),
    Case("yolo_label_folder", labels_in("label/{}"), Reads()),
    Case("yolo_label_beside", labels_in("images/{}"), Reads()),
    Case("yolo_label_inside", labels_in("images/{}/labels"), Reads()),
    Case("yolo_label_binary", first_label(bytes(range(128, 256))), UNKNOWN),
    Case("yolo_header", first_label(b"class x y w h\n" + GOOD), ODD_LINE),
    Case("yolo_commas", first_label(GOOD.replace(b" ", b",")), ODD_LINE),
    Case("yolo_confidence", first_label(GOOD.replace(b"\n", b" 0.9\n")), ODD_LINE),
    Case(
        "yolo_negative",
        first_label(b"-1 0.5 0.5 0.1 0.1"),
        Finds(frozenset({"unknown-category"}), *ONE_LESS),
    ),
    Case(
        "yolo_beyond_names",
        first_label(b"2 0.5 0.5 0.1 0.1"),
        Finds(frozenset({"unknown-category"}), *ONE_LESS),
    ),
    Case("yolo_nan", first_label(b"0 nan 0.5 0.1 0.1"), Finds(frozenset({"bad-box"}), *ONE_LESS)),
    Case("yolo_same_name", same_name, Finds(frozenset({"shared-labels"}), *ONE_LESS)),
    Case("yolo_same_stem", same_stem, Finds(frozenset({"shared-labels"}), *ONE_LESS)),
    Case("yolo_list_abs", listed("/content/drive/set/images/{}/{}"), RENAMED),
    Case("yolo_list_backslash", listed("images\\{}\\{}"), RENAMED),
    Case("yolo_list_windows", listed("D:\\data\\set\\images\\{}\\{}"), RENAMED),
    Case("yolo_list_other_root", listed("data/images/{}/{}"), Reads()),
    Case("yolo_pose_v2", lines(keypoints(2, 2, 2, 2, 2)), POSE),
    Case("yolo_pose_v1", lines(keypoints(1, 1, 0, 1, 1)), POSE),
    Case("yolo_pose_bare", lines(keypoints()), POSE),
    Case("yolo_obb", lines(corners), Reads()),
    Case("yolo_polygons", lines(outline), Reads()),
]
