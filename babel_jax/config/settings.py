"""The base class of all settings, and the types of their values."""

import math
import os
from enum import StrEnum
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema

from babel_jax.hub.names import hub_name


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _absolute_or_on_hub(location: str) -> str:
    return location if hub_name(location) is not None else _absolute(location)


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending; messages name them as the valid choices."""
    lower = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    upper = [number // divisor for divisor in reversed(lower)]
    return lower + upper[upper[:1] == lower[-1:] :]


LocalPath = Annotated[str, AfterValidator(_absolute), Field(json_schema_extra={"format": "path"})]
# A path, or the name of a model on the hub.
ModelPath = Annotated[str, AfterValidator(_absolute_or_on_hub), Field(json_schema_extra={"format": "path"})]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# File systems take names of up to 255 bytes, and each name gets suffixes.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Choice(StrEnum):
    """The base of settings that are one of several words.

    A plain string is accepted too: `ExpansionSettings(append=2, init="noise")`.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        # All settings are validated strictly. There pydantic accepts only members of the enumeration, unless
        # the field is not strict.
        return cast(CoreSchema, {**handler(source), "strict": False})


class Settings(BaseModel):
    """The base of all settings: frozen, strict about types, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
