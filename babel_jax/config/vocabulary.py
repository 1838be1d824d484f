"""The settings of a larger vocabulary."""

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from babel_jax.config.settings import Choice, Fraction, LocalPath, ModelPath, Positive, Settings
from babel_jax.languages import language


class Shares(Choice):
    """How new tokens are shared: `equal` gives each language the same number. `savings` always takes the
    token that saves most, each language's text counting the same.
    """

    EQUAL = "equal"
    SAVINGS = "savings"


class Marks(Choice):
    """Combining marks (vowel signs of Burmese, Tamil, Hindi ..): `split` leaves the pre-tokenizer as it is;
    `join` changes it so that marks belong to words, as Qwen3.5's does.
    """

    SPLIT = "split"
    JOIN = "join"


class RowInit(Choice):
    """The first values of a new token's row. `parts`: the mean of the rows of the old tokens that the new
    token stands for. `all`: the mean of all old rows. `donor`: a sparse sum of old rows, by orthogonal
    matching pursuit against the embedding of a donor model.
    """

    PARTS = "parts"
    ALL = "all"
    DONOR = "donor"


class VocabularySettings(Settings):
    """New tokens for some languages, before the first step and before new layers."""

    languages: Annotated[tuple[str, ...], Field(min_length=1)]
    """The languages that get new tokens, by their codes. Unit: codes."""
    tokens: Positive
    """The number of new tokens. Unit: tokens."""
    shares: Shares = Shares.EQUAL
    """How the new tokens are shared among the languages."""
    protect: tuple[str, ...] = ("en",)
    """Languages whose words stay in the tokens that they are in. Unit: codes."""
    tolerance: Fraction = 0.001
    """The part of the words of protected languages that may change all the same, since a language of the same
    letters could get no token else.
    """
    least: Positive = 5
    """A new token occurs at least so often in its language's text when it is learned. Unit: occurrences."""
    marks: Marks = Marks.SPLIT
    """What becomes of combining marks; see [the vocabulary](../how-to/vocabulary.md#marks)."""
    reuse_unused: bool = False
    """New tokens first take the ids that no token has below the last one, and ids of tokens that no text
    gives.
    """
    init: RowInit = RowInit.PARTS
    """The first values of the new rows."""
    donor: ModelPath | None = None
    """With `init = "donor"`: a model of any family, with its tokenizer and safetensors files; a folder, a
    bucket's URL or a name on the hub.
    """
    multiple: Positive = 128
    """The rows of larger tables are a multiple of this number, so that any mesh divides them. Unit: rows."""
    data: LocalPath | None = None
    """A folder of xx.jsonl text to learn from. Default: `data.sources` of the run."""
    max_bytes: Positive = 50_000_000
    """The most text to learn from, of each language. Unit: bytes."""

    @field_validator("languages", "protect")
    @classmethod
    def _codes(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(language(name).code for name in names)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if len(set(self.languages)) < len(self.languages):
            raise ValueError(f"languages: one is named twice: {', '.join(self.languages)}")
        both = sorted(set(self.languages) & set(self.protect))
        if both:
            raise ValueError(
                f"protect: {', '.join(both)} is among languages too; a protected language gets no tokens"
            )
        if (self.init is RowInit.DONOR) != (self.donor is not None):
            raise ValueError('init = "donor" needs donor, and donor has no effect without it')
        return self
