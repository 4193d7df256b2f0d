"""What LVIS (Gupta et al., 2019) adds to COCO's format: classes are looked for in some images only,
and each image lists those that it certainly lacks and those of which not all objects are marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from detrellis.data.annotations import Federation
from detrellis.data.findings import Finding, finding
from detrellis.data.formats.coco_rows import CocoTable, Integers
from detrellis.data.records import RawDataset

ABSENT, PARTIAL = "neg_category_ids", "not_exhaustive_category_ids"


def federation_of(
    images: CocoTable, image_ids: Integers, categories: CocoTable, category_ids: Integers
) -> Federation | None:
    """The lists of all images; None of a file that has none."""
    if not any(ABSENT in row for row in images.rows):
        return None
    letters = [row.get("frequency") for row in categories.rows]
    frequency = {
        i: str(letter) for i, letter in zip(category_ids.tolist(), letters, strict=True) if letter
    }
    return Federation(
        _pairs(images, image_ids, ABSENT), _pairs(images, image_ids, PARTIAL), frequency
    )


def _pairs(images: CocoTable, image_ids: Integers, key: str) -> NDArray[np.int64]:
    """`(P, 2)` image and category ids; what is no list of numbers is none."""
    pairs = [
        (image, category)
        for image, row in zip(image_ids.tolist(), images.rows, strict=True)
        for category in _listed(row.get(key))
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _listed(value: object) -> list[int]:
    return [i for i in value if type(i) is int] if isinstance(value, list) else []


def federated_notes(raw: RawDataset) -> Iterator[Finding]:
    """That it is such a set, and how its classes are spread."""
    if raw.federation is None:
        return
    counts = Counter(raw.federation.frequency.values())
    spread = ", ".join(
        f"{counts[letter]} {name}"
        for letter, name in (("r", "rare"), ("c", "common"), ("f", "frequent"))
    )
    what = f"classes are looked for in some images only (LVIS): {spread}"
    yield finding("federated-set", raw.split, raw.source, what)
