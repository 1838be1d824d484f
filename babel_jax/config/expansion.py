"""The plan of new layers."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from babel_jax.config.settings import Choice, LocalPath, NonNegative, Positive, Seed, Settings

# What parameters are shifted or scaled by. With this bound they stay finite in each type that they may have:
# the largest float16 is 65,504, and noise is drawn at most 4.4 deviations from its mean.
Moderate = Annotated[float, Field(ge=-1e4, le=1e4)]


class Init(Choice):
    """How a new layer begins. The first three are those of the Babel report: an exact copy of its source, the
    copy plus Gaussian noise, all zeros.

    Beyond it: `average` is the mean of its source and the layer behind that; `identity` a copy that adds
    nothing at first, as its output projections are zero (LLaMA Pro, Wu et al. 2024); `scaled` a copy that
    shares the residual update with its source, each giving half.
    """

    COPY = "copy"
    NOISE = "noise"
    ZERO = "zero"
    AVERAGE = "average"
    IDENTITY = "identity"
    SCALED = "scaled"


class ExpansionSettings(Settings):
    """The plan of new layers: one of `preset`, `new_layers`, `insert_after`, `append` and `plan` (a file).

    `new_layers = 6` spreads six over the model, as `spread_layers` says.
    """

    preset: str | None = None
    new_layers: NonNegative = 0
    insert_after: tuple[NonNegative, ...] = ()
    append: NonNegative = 0
    plan: LocalPath | None = None
    init: Init = Init.COPY
    noise_mean: Moderate = 0.0001
    noise_std: Annotated[Moderate, Field(ge=0.0)] = 0.0001
    seed: Seed = 0

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [
            name for name in ("preset", "new_layers", "insert_after", "append", "plan") if getattr(self, name)
        ]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of preset, new_layers, insert_after, append and plan; given: "
                f"{', '.join(given) or 'none'}"
            )
        return self


class Moments(Choice):
    """What the Adam moments of a new layer begin with: those of its source layer, or zeros."""

    COPY = "copy"
    ZERO = "zero"


class Deepening(Settings):
    """An expansion in the middle of a run, before it takes the step `step` (counted over
    all stages, from 0).
    """

    step: Positive
    expansion: ExpansionSettings
    moments: Moments = Moments.COPY
