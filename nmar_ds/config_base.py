"""What all sections of the configuration are made of."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _usable_path(value: str) -> str:
    """Refuse what the operating system takes for no path: it would be an error far from here."""
    try:
        usable = value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half a surrogate pair
        usable = False
    if not usable:
        raise ValueError("cannot be a path, expected text that is not empty and has no zero byte")
    return value


PathText = Annotated[str, AfterValidator(_usable_path)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values are not coerced."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
    )
