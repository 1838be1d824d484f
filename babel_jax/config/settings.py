"""What all settings share: the base class, and the types of values."""

import math
import os
from enum import StrEnum
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def divisors(number: int) -> list[int]:
    """All that divide `number`, ascending: the valid choices that messages name."""
    lower = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    upper = [number // divisor for divisor in reversed(lower)]
    return lower + upper[upper[:1] == lower[-1:] :]


LocalPath = Annotated[str, AfterValidator(_absolute)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Choice(StrEnum):
    """Base of all settings that are one of some words.

    A plain string is taken too: `ExpansionSettings(append=2, init="noise")`.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        # In strict validation, which all settings have, pydantic otherwise takes members of the enumeration
        # alone.
        return cast(CoreSchema, {**handler(source), "strict": False})


class Settings(BaseModel):
    """Base of all settings: frozen, strict about types, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
