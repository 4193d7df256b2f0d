"""What every part of a recipe is: typed, frozen, closed to unknown names; and the ranges of its numbers."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from detrellis.errors import UserError

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class Config(BaseModel):
    """Frozen, and closed to unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def checked(cls, data: dict[str, Any]) -> Self:
        """From plain data; `UserError` for a value that does not fit, naming the field."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(p) for p in first["loc"])
            raise UserError(f"{place}: {first['msg'].lower()}, not {first['input']!r}") from None
