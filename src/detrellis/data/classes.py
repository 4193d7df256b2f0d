"""`ClassMap`: the one place where data-set ids, class indices 0..C-1 and names meet.

It is built from the annotation file, stored in every checkpoint and result, and never typed by a
user: ids with gaps, 0-based, 1-based and unused classes are all the same to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detrellis.errors import UserError


@dataclass(frozen=True)
class ClassMap:
    """Class index `i` is the data set's `ids[i]`, called `names[i]`. Ids ascend."""

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.names):
            raise UserError(f"{len(self.ids)} category ids but {len(self.names)} names")
        if len(set(self.ids)) != len(self.ids):
            twice = sorted({i for i in self.ids if self.ids.count(i) > 1})
            raise UserError(
                f"category id {twice[0]} is defined more than once",
                "Give every category its own id.",
            )

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def from_categories(cls, categories: Iterable[Mapping[str, Any]]) -> ClassMap:
        """The map of COCO's `categories`: `[{"id": 3, "name": "cat"}, ...]` in any order."""
        rows = sorted((int(c["id"]), str(c.get("name", c["id"]))) for c in categories)
        return cls(tuple(i for i, _ in rows), tuple(n for _, n in rows))

    def indices(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Class indices of data-set ids, of the same shape;
        -1 for an id that the map does not hold.
        """
        if not len(self.ids):
            return np.full(ids.shape, -1, dtype=np.int64)
        known = np.asarray(self.ids, dtype=np.int64)
        place = np.searchsorted(known, ids).clip(max=len(known) - 1)
        return np.where(known[place] == ids, place, -1).astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        """The map as JSON holds it."""
        return {"ids": list(self.ids), "names": list(self.names)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ClassMap:
        """The map that `to_dict` gave."""
        return cls(tuple(int(i) for i in data["ids"]), tuple(str(n) for n in data["names"]))
