"""The settings of new layers."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from babel_jax.config.settings import Choice, LocalPath, NonNegative, Positive, Seed, Settings

# A number by which parameters are shifted or scaled. Within this bound they stay finite in every dtype: the
# largest float16 is 65,504, and noise is at most 4.4 standard deviations from its mean.
Moderate = Annotated[float, Field(ge=-1e4, le=1e4)]


class Init(Choice):
    """The initial parameters of a new layer. The first three are in the Babel report: an exact copy of its
    source layer, the copy plus Gaussian noise, all zeros.

    The others: `average` is the mean of its source layer and the next layer. `identity` is a copy that adds
    nothing at first, because its output projections are zero (LLaMA Pro, Wu et al. 2024). `scaled` is a copy
    that shares the residual update with its source: each adds half.
    """

    COPY = "copy"
    NOISE = "noise"
    ZERO = "zero"
    AVERAGE = "average"
    IDENTITY = "identity"
    SCALED = "scaled"


class ExpansionSettings(Settings):
    """The new layers: one of `preset`, `new_layers`, `insert_after`, `append` and `plan` (a plan file).

    `new_layers = 6` spreads six layers over the model: see `spread_layers`.
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
    """The initial Adam moments of a new layer: those of its source layer, or zeros."""

    COPY = "copy"
    ZERO = "zero"


class Deepening(Settings):
    """An expansion during a run, before the step `step` (counted over all stages, from 0)."""

    step: Positive
    expansion: ExpansionSettings
    moments: Moments = Moments.COPY
