"""When two data sets mean the same class: equal names, or names that stand for each other."""

from __future__ import annotations

# Objects365's names, of both its versions, and those of COCO that mean the same and are not equal.
OBJECTS365_AS_COCO = {
    "bowl/basin": "bowl",
    "dinning table": "dining table",
    "hair dryer": "hair drier",
    "handbag/satchel": "handbag",
    "luggage": "suitcase",
    "moniter/tv": "tv",
    "monitor/tv": "tv",
    "orange/tangerine": "orange",
    "other balls": "sports ball",
    "skiboard": "skis",
    "stuffed toy": "teddy bear",
    "wild bird": "bird",
}


def plain_name(name: str) -> str:
    """A name without the case, blanks and underscores in which data sets differ."""
    return " ".join(name.replace("_", " ").split()).casefold()


def same_meaning(name: str) -> str:
    """What a plain name that differs between data sets is called here; others as they are."""
    return OBJECTS365_AS_COCO.get(name, name)
