"""The settings of the text, of the prepared datasets, and of the mixture of a stage."""

import itertools
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from babel_jax.config.catalogue import expand
from babel_jax.config.cleaning import (
    CleaningSettings,
    DecontaminationSettings,
    DeduplicationSettings,
    Engine,
    Rule,
)
from babel_jax.config.settings import (
    Choice,
    Fraction,
    LocalPath,
    NonNegative,
    Positive,
    PositiveFloat,
    Settings,
)
from babel_jax.languages import language

# A source with one of these as its text_key has conversations: lists of messages.
CONVERSATION_KEYS = ("messages", "conversations")


class BadRows(Choice):
    """What to do with a row that cannot be read: stop with an error, or count it and continue."""

    REFUSE = "refuse"
    SKIP = "skip"


class Source(Settings):
    """Text rows of one language: files (`path`, globs allowed), a TFDS dataset, or a Hugging Face dataset by
    name.

    Files: .jsonl or .txt (plain, .gz or .zst), .parquet, and .warc or .wet (plain or .gz), on a disk or on
    any file system of fsspec (gs://, s3://, hf://).

    - kind: for rows that have no `kind`
    - name: shown in reports (default: the path or dataset); licence: shown beside it
    - where: only rows with these values are read, for files with many languages
    - off: rules of data.cleaning that do not apply to this source. For example, `where = { kind = "textbook"
      }` and `off = ["repetition"]` keep manuals that repeat themselves
    - weight: of duplicates in several sources, the copy of the source with the highest weight stays, if
      data.deduplication is given, else the first. It has no effect on the mixture
    - catalogue: instead of all this, `catalogue = "madlad-400"` means the sources of that name in
      catalogue.toml
    """

    language: str
    path: LocalPath | None = None
    tfds: str | None = None
    tfds_split: str = "train"
    tfds_folder: LocalPath | None = None
    huggingface: str | None = None
    huggingface_config: str | None = None
    huggingface_split: str = "train"
    kind: str = "web"
    text_key: str = "text"
    id_key: str = "id"
    score_key: str = "score"
    name: str | None = None
    licence: str | None = None
    weight: PositiveFloat = 1.0
    where: dict[str, str] = {}
    # After `_expanded`, values are no JSON any more, for which strict validation accepts lists and strings.
    off: Annotated[tuple[Annotated[Rule, Field(strict=False)], ...], Field(strict=False)] = ()

    @field_validator("language")
    @classmethod
    def _known(cls, code: str) -> str:
        return language(code).code

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(origin is not None for origin in (self.path, self.tfds, self.huggingface)) != 1:
            raise ValueError("give exactly one of path, tfds and huggingface")
        return self

    @property
    def label(self) -> str:
        """The name of the source in reports."""
        dataset = self.tfds or "/".join(filter(None, (self.huggingface, self.huggingface_config)))
        return self.name or self.path or dataset


class DataSettings(Settings):
    """The prepared datasets: their folder, and how `babel prepare` makes them.

    - tokenizer: a model folder, a tokenizer.json or a SentencePiece .model file; default: the run's model
      folder
    - add_bos_token: if each document begins with the tokenizer's bos_token, in training and evaluation;
      default: as the tokenizer does (Llama, Gemma and Mistral: yes; Qwen: no). Conversations begin as the
      chat template says
    - conversations: the sources have lists of messages (text_key "messages" or "conversations"). The chat
      template of the tokenizer's folder, or the file `chat_template`, turns them into text
    - cleaning, deduplication: without `cleaning`, text is unchanged; without `deduplication`, only rows of
      equal text are dropped
    - workers: processes that work at a time (0: one for each core; on Ray always the whole cluster); the
      result does not depend on their number
    - shard_documents: the most documents in a cleaned shard, and so a bound on the memory of a worker

    Digests of all files that were read show later if text has changed; see docs/reference/cleaning.md.
    """

    folder: LocalPath
    tokenizer: LocalPath | None = None
    add_bos_token: bool | None = None
    seq_len: Positive = 4096
    bad_rows: BadRows = BadRows.REFUSE
    heldout_fraction: Fraction = 0.02
    heldout_bytes: Positive = 200_000
    conversations: bool = False
    chat_template: LocalPath | None = None
    cleaning: CleaningSettings | None = None
    decontamination: DecontaminationSettings | None = None
    deduplication: DeduplicationSettings | None = None
    engine: Engine = Engine.LOCAL
    workers: NonNegative = 1
    shard_documents: Positive = 100_000
    sources: tuple[Source, ...] = ()

    @field_validator("sources", mode="before")
    @classmethod
    def _expanded(cls, sources: Any) -> Any:
        """Replaces entries of the catalogue by their sources."""
        if not isinstance(sources, list):
            return sources
        return tuple(itertools.chain.from_iterable(map(expand, sources)))

    @model_validator(mode="after")
    def _of_one_form(self) -> Self:
        for source in self.sources:
            if (source.text_key in CONVERSATION_KEYS) != self.conversations:
                raise ValueError(
                    f"conversations = {str(self.conversations).lower()} and a source with text_key = "
                    f"{source.text_key!r}: conversations are read from {' or '.join(CONVERSATION_KEYS)}, "
                    "text from anything else"
                )
        if self.conversations and (self.cleaning or self.decontamination or self.deduplication):
            raise ValueError(
                "cleaning, decontamination and deduplication are of text; leave them out with conversations "
                "= true"
            )
        return self


class Strategy(Choice):
    """How a mixture shares its tokens among languages: as equally as the text allows (water-filling), in
    proportion to supply ** (1 / temperature), or by explicit weights.
    """

    EQUAL = "equal"
    TEMPERATURE = "temperature"
    WEIGHTS = "weights"


class MixtureSettings(Settings):
    """The shares of a stage, in tokens; padding does not count.

    - languages: those that take part; empty means all with data
    - weights: the weight of each language (strategy `weights`)
    - max_epochs: the most passes over one dataset; the others get the rest
    - curated: a language's share of all tokens, in total: curated = { en = 0.3 } makes 30% of the stage
      English, taken from the kind `curated` (else `textbook`, else any) as far as there is enough of it
    - curated_extra: a share in addition to the language's own part: with two languages of equal parts,
      curated_extra = { en = 0.3 } makes 30% + 35% English
    - low_resource_multiplier, textbook_multiplier: raise the weight of low-resource languages, and of the
      kind `textbook` within every language
    """

    strategy: Strategy = Strategy.EQUAL
    temperature: PositiveFloat = 1.0
    languages: tuple[str, ...] = ()
    weights: dict[str, PositiveFloat] = {}
    max_epochs: PositiveFloat = 4.0
    curated: dict[str, Fraction] = {}
    curated_extra: dict[str, Fraction] = {}
    low_resource_multiplier: PositiveFloat = 1.0
    textbook_multiplier: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for code in (*self.languages, *self.weights, *self.curated_languages):
            language(code)
        if (self.strategy is Strategy.WEIGHTS) != bool(self.weights):
            raise ValueError('strategy = "weights" and a table of weights go together')
        if both := sorted(self.curated.keys() & self.curated_extra.keys()):
            raise ValueError(
                f"curated and curated_extra both name {', '.join(both)}; curated is a total, curated_extra "
                "comes on top"
            )
        total = sum(self.curated.values()) + sum(self.curated_extra.values())
        if total >= 1.0:
            raise ValueError(
                f"the shares of curated and curated_extra add up to {total:g}; they must stay below 1"
            )
        return self

    @property
    def curated_languages(self) -> tuple[str, ...]:
        """The languages that `curated` and `curated_extra` name."""
        return *self.curated, *self.curated_extra
