"""Everything that a check can find, one rule a code; and `Finding`, one row of its report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
Action = Literal["drop image", "drop box", "renumber", "merge", "none"]
# Leave out bad records, and images that lose an object ("boxes": these stay)
SkipBad = bool | Literal["boxes"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Rule(NamedTuple):
    """How severe a finding is, what the user can do,
    and what `drop_bad` and `fix` do to the record it names.
    """

    severity: Severity
    remedy: str
    action: Action = "none"


_RE_EXPORT = "Replace or re-export the file, or take the image out of the annotations."

IMAGES: dict[str, Rule] = {
    "malformed-image": Rule(
        "error", "Give it a `file_name` and an `id`, or take it out of the list.", "drop image"
    ),
    "missing-image": Rule(
        "error", "Put the file there, or correct the image folder or `file_name`.", "drop image"
    ),
    "renamed-file": Rule("note", "Nothing to do; a clean copy (`--fix`) has the real names."),
    "unclear-file": Rule(
        "warning", "Write the names as they are on disk, relative to the image folder."
    ),
    "unreadable-labels": Rule(
        "error",
        "Export the file again or remove it: what its image shows is unknown.",
        "drop image",
    ),
    "shared-labels": Rule(
        "error", "Give each image its own name and labels, or remove one of them.", "drop image"
    ),
    "unclear-labels": Rule(
        "error",
        ("Write `kpt_shape: [KEYPOINTS, 2 or 3]` into the yaml, or `kpt_shape: []` for polygons."),
        "drop image",
    ),
    "unlabelled-images": Rule(
        "warning", "Annotate them; background needs an annotation file without objects."
    ),
    "unreadable-image": Rule("error", _RE_EXPORT, "drop image"),
    "wrong-size": Rule(
        "error",
        "Write the file's width and height, and make sure that the boxes are in that frame.",
        "drop image",
    ),
    "duplicate-image-id": Rule(
        "error", "Give every image its own id: boxes cannot tell them apart.", "drop image"
    ),
    "duplicate-file": Rule(
        "error", "List the file once and give all its boxes that one image id.", "merge"
    ),
    "same-content": Rule("warning", "Keep one of them, with the boxes of both."),
    "shared-image": Rule(
        "warning",
        "Keep it in one split only: scores on images trained on say nothing.",
        "drop image",
    ),
    "unusual-mode": Rule("note", "Nothing to do: it is converted to 8-bit RGB."),
    "dark-16-bit": Rule(
        "warning", "Stretch the values to the full 16-bit range, or convert to 8 bits yourself."
    ),
    "doubtful-jpeg": Rule(
        "warning", "Look at the picture; replace it if a part is shifted or has other colours."
    ),
    "several-pictures": Rule(
        "note", "Nothing to do, unless the boxes are of another one: save that as its own file."
    ),
    "exif-rotated": Rule("note", "Nothing to do: the orientation is handled."),
    "exif-ambiguous": Rule(
        "warning", "Save the image upright, without the EXIF tag, and make sure that its boxes fit."
    ),
    "size-missing": Rule("note", "Nothing to do: height and width are read from the files."),
    "too-many-objects": Rule(
        "warning", "Train with that `-o`, or cut the images into smaller ones."
    ),
    "outside-folder": Rule(
        "note", "Nothing to do if these are the images you mean: a list or a link leads there."
    ),
    "images-without-boxes": Rule("note", "Nothing to do: they are used as background."),
}

BOXES: dict[str, Rule] = {
    "duplicate-annotation-id": Rule("error", "Give every annotation its own id.", "renumber"),
    "malformed-annotation": Rule("error", "Correct or remove the annotation.", "drop box"),
    "text-numbers": Rule("note", "Nothing to do: they are read as numbers."),
    "text-ids": Rule("note", "Nothing to do; results carry the numbers given here."),
    "ids-missing": Rule("note", "Nothing to do; results carry the numbers given here.", "renumber"),
    "outlined-boxes": Rule("note", "Nothing to do: the box around the segmentation is used."),
    "unknown-image": Rule("error", "Correct its `image_id`, or remove the annotation.", "drop box"),
    "unknown-category": Rule(
        "error", "Add the category, or correct the annotation's category.", "drop box"
    ),
    "bad-box": Rule("error", "Write four finite numbers, or remove the annotation.", "drop box"),
    "empty-box": Rule(
        "error", "Width and height must be above 0: correct or remove it.", "drop box"
    ),
    "outside-box": Rule(
        "error", "Correct it, or remove it: nothing of it is in the image.", "drop box"
    ),
    "malformed-label": Rule(
        "error", "Correct or remove the line: `class cx cy w h`, or a polygon.", "drop box"
    ),
    "clipped-box": Rule(
        "warning", "It is clipped to the image; correct it if that is not what you mean."
    ),
    "clipped-rounding": Rule("note", "Nothing to do: clipped to the image."),
    "duplicate-box": Rule(
        "warning", "Remove the copies: the detector would learn to predict it twice.", "drop box"
    ),
    "normalised-boxes": Rule(
        "warning", "COCO boxes are pixels: multiply by the image's width and height."
    ),
    "pixel-boxes": Rule(
        "warning", "YOLO boxes are shares of the image: divide by its width and height."
    ),
    "xyxy-boxes": Rule(
        "warning", "COCO boxes are (x, y, width, height): subtract the first corner."
    ),
    "missing-area": Rule("note", "Nothing to do: width * height is used."),
    "keypoints": Rule(
        "note", "Write `kpt_shape` into the yaml; `kpt_shape: []` if these are polygons."
    ),
    "skipped-shapes": Rule(
        "warning", "Draw boxes, polygons or circles where such a shape stands for an object."
    ),
    "label-without-image": Rule("warning", "Add the image, or remove the label file."),
    "difficult-objects": Rule(
        "note", "Nothing to do: trained on like the others, forgiven by `eval --metric voc`."
    ),
}

# Of objects' outlines; they matter where masks are learnt.
MASKS: dict[str, Rule] = {
    "missing-mask": Rule("warning", "Outline them too, or train on boxes alone."),
    "mask-size": Rule("warning", "Export the masks again, in the size of their images."),
    "empty-mask": Rule(
        "warning", "Outline the object again: three points or more, inside the image."
    ),
    "mask-outside": Rule(
        "warning", "It is cut at the image's edge; correct it if that is not what you mean."
    ),
    "mask-box": Rule("warning", "Correct the box or the outline: both are learnt."),
    "crossing-mask": Rule(
        "note", "Nothing to do, unless the part between the crossing sides belongs to the object."
    ),
}

CLASSES: dict[str, Rule] = {
    "duplicate-category-id": Rule(
        "error", "Give every category its own id, in its annotations too.", "drop box"
    ),
    "repeated-category": Rule("note", "Nothing to do: it is taken once."),
    "malformed-category": Rule(
        "warning", "Give it an `id` and a `name`, or remove it: it is left out."
    ),
    "similar-class-names": Rule(
        "warning", "Give both the same name and id where they mean the same."
    ),
    "class-count": Rule("warning", "Correct `nc`, or the list of `names`: the names count."),
    "class-mismatch": Rule("error", "Use one list of categories for all splits."),
    "unknown-class": Rule(
        "error", "Add the class to the training set's categories, or remove its boxes."
    ),
    "class-never-seen": Rule("warning", "Add examples, or remove the class: it cannot be learnt."),
    "class-only-in-val": Rule("warning", "Add training examples: its AP will be 0."),
    "duplicate-class-name": Rule("warning", "Merge the two categories, or name them differently."),
}

WHOLE: dict[str, Rule] = {
    "no-images": Rule("error", "Check that this is the right annotation file."),
    "no-annotations": Rule(
        "error", "Check that this is the right annotation file: there is nothing to learn from."
    ),
    "unused-files": Rule(
        "note", "Nothing to do if you know them; else name or move them so that they are found."
    ),
    "unused-annotations": Rule(
        "warning",
        ("Check that this is the right folder and that the lists, suffixes and sub-folders fit."),
    ),
    "federated-set": Rule(
        "note", "Nothing to do: AP is LVIS's, which leaves out what nobody looked for."
    ),
    "layout": Rule(
        "note", "Name the files yourself (`--train`, `--val`) if you mean something else."
    ),
}

# Codes of records that a reader cannot make sense of
MALFORMED = ("malformed-image", "malformed-annotation")

# In the order of the table.
RULES: dict[str, Rule] = {**WHOLE, **IMAGES, **BOXES, **MASKS, **CLASSES}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or worth knowing, and where it stands."""

    severity: Severity
    code: str  # a key of RULES
    split: str  # "train", "val", "test"; "" for the data set as a whole
    file: str  # the image, or the file that the record stands in
    id: int | None  # of an image, annotation or category, see `noun`
    what: str
    remedy: str
    line: int | None = None  # in a YOLO label file; number of the object in a VOC file
    count: int = 1  # records that this finding stands for
    row: int | None = None  # index of the image or box in the `RawDataset`; not part of the report
    other: int | None = None  # index of the record that it repeats; not part of the report

    @property
    def noun(self) -> str:
        """What `id` is the id of."""
        return (
            "image"
            if self.code in IMAGES
            else "annotation"
            if self.code in BOXES | MASKS
            else "category"
        )

    def to_dict(self) -> dict[str, Any]:
        """The finding as the JSON report holds it."""
        fields = asdict(self) | {"id_of": self.noun if self.id is not None else None}
        del fields["row"], fields["other"]
        return fields


def finding(
    code: str,
    split: str,
    file: Path | str,
    what: str,
    *,
    id: int | None = None,
    line: int | None = None,
    count: int = 1,
    row: int | None = None,
    other: int | None = None,
    remedy: str | None = None,
) -> Finding:
    """A finding with its rule's severity, and its remedy unless another one is given."""
    rule = RULES[code]
    return Finding(
        rule.severity,
        code,
        split,
        str(file),
        id,
        what,
        remedy or rule.remedy,
        line,
        count,
        row,
        other,
    )
