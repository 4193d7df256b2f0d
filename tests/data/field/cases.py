"""What a case is, and what may be expected of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.data.field.pictures import OBJECTS, PICTURES

# Of `resolve`: {"data": folder}, or {"train": file, "train_images": folder, ...}
Arguments = dict[str, Path]


@dataclass(frozen=True)
class Reads:
    """All is read, in all splits together, and every box is right;
    there are no errors, but `finds` among the rest.
    """

    images: int = PICTURES
    boxes: int = OBJECTS
    finds: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Finds:
    """The full check has an error or warning of each of these codes;
    `images` and `boxes` are left by `--skip-bad`.
    """

    codes: frozenset[str]
    images: int = PICTURES
    boxes: int = OBJECTS


@dataclass(frozen=True)
class Refused:
    """A `UserError` whose message or remedy holds each of the words."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """One kind of data set. `build` fills the empty folder that it is given and says how the set is
    named.
    """

    name: str
    build: Callable[[Path], Arguments]
    expects: Reads | Finds | Refused
    # Why it does not yet behave so: then its tests must fail, and whoever makes it behave takes
    # this away.
    pending: str = ""
