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
    """The new layers: exactly one of `preset`, `new_layers`, `insert_after`, `append` and `plan` says where
    they are.
    """

    preset: str | None = None
    """The positions of a released model: `babel-9b` (28 to 34 layers) or `babel-83b` (80 to 92)."""
    new_layers: NonNegative = 0
    """Spreads so many new layers over the model: a copy after every other layer from the middle on, as the
    presets do. Unit: layers.
    """
    insert_after: tuple[NonNegative, ...] = ()
    """Copies these layers, counted from 0; each copy follows its layer. Unit: numbers of layers."""
    append: NonNegative = 0
    """Repeats the last so many layers after the model. Unit: layers."""
    plan: LocalPath | None = None
    """A plan file: for each layer its source and how it begins; `babel expand --save-plan` writes one."""
    init: Init = Init.COPY
    """How a new layer begins; see [how to choose](../how-to/choose.md#init)."""
    noise_mean: Moderate = 0.0001
    """The mean of the noise, with `init = "noise"`. Unit: added to each weight."""
    noise_std: Annotated[Moderate, Field(ge=0.0)] = 0.0001
    """The standard deviation of the noise, with `init = "noise"`. Unit: as the weights."""
    seed: Seed = 0
    """The seed of the noise."""

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
    """An expansion during a run."""

    step: Positive
    """The expansion is made before this step, counted over all stages from 0. Unit: steps."""
    expansion: ExpansionSettings
    """The new layers."""
    moments: Moments = Moments.COPY
    """The Adam moments of the new layers: copied from their source layers, or zero."""
