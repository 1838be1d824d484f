"""The settings of the text, of the prepared datasets, and of the mixture of a stage."""

import itertools
import re
import string
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
from babel_jax.config.languages import by_our_codes
from babel_jax.config.settings import (
    Choice,
    Fraction,
    LocalPath,
    ModelPath,
    NonNegative,
    Positive,
    PositiveFloat,
    Settings,
)
from babel_jax.languages import language

# The ends of the names of lists of files.
LIST_SUFFIXES = (".paths", ".paths.gz", ".map", ".urls")
# A source with one of these as its text_key has conversations: lists of messages.
CONVERSATION_KEYS = ("messages", "conversations")


class BadRows(Choice):
    """What to do with a row that cannot be read: stop with an error, or count it and continue."""

    REFUSE = "refuse"
    SKIP = "skip"


class Reducer(Choice):
    """One number of a list of numbers."""

    MEAN = "mean"
    MIN = "min"
    MAX = "max"
    MEDIAN = "median"


class Parallel(Settings):
    """A text and its translation in one row, and the document that is made of both."""

    text_key: str
    """The key of the translation; `text_key` of the source is that of the text."""
    language: str
    """The language of the translation, such as `en`."""
    template: str = "{text}\n\n{translation}"
    """The document, with `{text}`, `{translation}`, `{language}` and `{other}` (the languages' names)."""
    swap: bool = True
    """Half of the documents, chosen by their ids, have the translation first: in the template both texts
    and both languages change places.
    """

    @field_validator("language")
    @classmethod
    def _known(cls, code: str) -> str:
        return language(code).code

    @field_validator("template")
    @classmethod
    def _has_both(cls, template: str) -> str:
        # The names in the braces of the template.
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        if not {"text", "translation"} <= set(names) <= {"text", "translation", "language", "other"}:
            raise ValueError(
                "a template has {text} and {translation}, and may have {language} and {other}; given "
                f"{template!r}"
            )
        return template


def comparison(asked: str) -> tuple[str, float] | None:
    """The operator and the number of a condition such as ">0.9"; None for any other text."""
    match = re.fullmatch(r"(<=|>=|<|>)\s*(-?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)", asked)
    return None if match is None else (match[1], float(match[2]))


class Source(Settings):
    """Text rows of one language: files, a TFDS dataset, or a Hugging Face dataset; exactly one of `path`,
    `tfds` and `huggingface`.

    Instead of all this, `catalogue = "madlad-400"` means the sources of that name in catalogue.toml, in
    all its languages or in `language`.
    """

    language: str
    """The code of the language, such as `sw`."""
    path: LocalPath | None = None
    """Files; globs are allowed. .jsonl or .txt (plain, .gz or .zst), .parquet, .warc or .wet (plain or
    .gz), on a disk, on the hub (hf://datasets/OWNER/NAME/...), on a web server (https://), or on any
    file system of fsspec (gs://, s3://). A .paths, .paths.gz, .map or .urls file is a list of files.
    """
    only: str | None = None
    """Of a list of files, only those whose addresses end in this glob: `only = "/10_*.jsonl.zst"`."""
    tfds: str | None = None
    """The name of a TFDS dataset."""
    tfds_split: str = "train"
    """The split of the TFDS dataset."""
    tfds_folder: LocalPath | None = None
    """The `data_dir` of TFDS."""
    huggingface: str | None = None
    """The name of a dataset on the Hugging Face hub."""
    huggingface_config: str | None = None
    """Its configuration."""
    huggingface_split: str = "train"
    """Its split."""
    revision: str | None = None
    """The branch, tag or commit of a dataset on the hub. Default: `main`, whose commit `babel prepare`
    keeps: the folder that was begun with it is finished with it.
    """
    kind: str = "web"
    """The kind of rows that have no `kind` of their own, such as `web`, `textbook`, `curated`."""
    text_key: str = "text"
    """The key of the text in a row. `messages` and `conversations` hold conversations."""
    id_key: str = "id"
    """The key of a row's id."""
    score_key: str = "score"
    """The key of a row's score of quality."""
    score_of: Reducer = Reducer.MEAN
    """The score of a row whose score is a list of numbers, as of several annotators or pages: their
    `mean`, `min`, `max` or `median`.
    """
    parallel: Parallel | None = None
    """A translation in each row: both texts become one document. Its kind is `parallel`, unless the source
    names another.
    """
    name: str | None = None
    """Shown in reports. Default: the path or dataset."""
    licence: str | None = None
    """Shown beside the name."""
    weight: PositiveFloat = 1.0
    """Of duplicates in several sources, the copy of the source with the highest weight stays, if
    `data.deduplication` is given, else the first. It has no effect on the mixture. Unit: any.
    """
    where: dict[str, str] = {}
    """Only rows with these values are read, for files with many languages: `where = { kind = "textbook"
    }`. A comparison with a number is written `">0.9"`, `">=3"`, `"<10"` or `"<=2.5"`; a list of numbers
    is compared by `score_of`.
    """
    # After `_expanded`, values are no JSON any more, for which strict validation accepts lists and strings.
    off: Annotated[tuple[Annotated[Rule, Field(strict=False)], ...], Field(strict=False)] = ()
    """Rules of `data.cleaning` that do not apply to this source: `off = ["repetition"]` keeps manuals that
    repeat themselves.
    """

    @field_validator("language")
    @classmethod
    def _known(cls, code: str) -> str:
        return language(code).code

    @field_validator("where")
    @classmethod
    def _comparable(cls, where: dict[str, str]) -> dict[str, str]:
        for key, asked in where.items():
            if asked.startswith(("<", ">")) and comparison(asked) is None:
                raise ValueError(f'{key} = {asked!r}: not a comparison with a number, such as ">0.9"')
        return where

    @model_validator(mode="before")
    @classmethod
    def _of_kind_parallel(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("parallel") is not None and "kind" not in given:
            return {**given, "kind": "parallel"}
        return given

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.only is not None and not (self.path or "").endswith(LIST_SUFFIXES):
            raise ValueError(f"only chooses of a list of files ({', '.join(LIST_SUFFIXES)}); path is no list")
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

    Digests of all files that were read show later if text has changed; see
    [cleaning](../reference/cleaning.md).
    """

    folder: LocalPath
    """The folder of prepared data, on disk or in a bucket."""
    tokenizer: ModelPath | None = None
    """A model folder, a model on the hub (OWNER/NAME), a tokenizer.json or a SentencePiece .model file.
    Default: the run's model folder.
    """
    add_bos_token: bool | None = None
    """Each document begins with the tokenizer's bos_token, in training and evaluation. Default: as the
    tokenizer does (Llama, Gemma and Mistral: yes; Qwen: no). Conversations begin as the chat template
    says.
    """
    seq_len: Positive = 4096
    """The length of a window. Unit: tokens."""
    bad_rows: BadRows = BadRows.REFUSE
    """A row that cannot be read is an error, or is counted and left out."""
    heldout_fraction: Fraction = 0.02
    """The part of the documents of each language that is not trained on, to measure with."""
    heldout_bytes: Positive = 200_000
    """The most held-out text of each language. Unit: bytes."""
    conversations: bool = False
    """The sources have lists of messages; the chat template of the tokenizer's folder turns them into
    text. For `babel sft`.
    """
    chat_template: LocalPath | None = None
    """A file with a chat template, instead of that of the tokenizer's folder."""
    cleaning: CleaningSettings | None = None
    """Rules that drop documents. Without it, text is unchanged."""
    decontamination: DecontaminationSettings | None = None
    """Drops documents that contain evaluation items."""
    deduplication: DeduplicationSettings | None = None
    """Drops equal and nearly equal documents. Without it, only rows of equal text are dropped."""
    engine: Engine = Engine.LOCAL
    """Where the tasks run: in processes of this machine, or on a Ray cluster that shares its file system."""
    workers: NonNegative = 1
    """Processes that work at a time (0: one for each core; on Ray always the whole cluster). The result
    does not depend on their number. Unit: processes.
    """
    shard_documents: Positive = 100_000
    """The most documents in a cleaned shard, and so a bound on the memory of a worker. Unit: documents."""
    sources: tuple[Source, ...] = ()
    """The text."""

    @field_validator("sources", mode="before")
    @classmethod
    def _expanded(cls, sources: Any) -> Any:
        """Replaces entries of the catalogue by their sources."""
        if not isinstance(sources, list):
            return sources
        expanded = (expand(given, Source.model_fields) for given in sources)
        return tuple(itertools.chain.from_iterable(expanded))

    @model_validator(mode="after")
    def _of_one_form(self) -> Self:
        for source in self.sources:
            # The key of the text decides if a source has conversations, and all sources must agree with
            # `conversations`.
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
    """The shares of a stage, in tokens; padding does not count."""

    strategy: Strategy = Strategy.EQUAL
    """How tokens are shared among languages: `equal` as far as the text allows, `temperature` in
    proportion to supply ** (1 / temperature), `weights` as given.
    """
    temperature: PositiveFloat = 1.0
    """With `strategy = "temperature"`: 1 is in proportion to the text, a high number is nearly equal.
    Unit: none.
    """
    languages: tuple[str, ...] = ()
    """The languages that take part. Default: all with data."""
    weights: dict[str, PositiveFloat] = {}
    """The weight of each language, with `strategy = "weights"`. Unit: any, in proportion."""
    max_epochs: PositiveFloat = 4.0
    """The most passes over one dataset; the others get the rest. Unit: passes."""
    curated: dict[str, Fraction] = {}
    """A language's share of all tokens, in total: `curated = { en = 0.3 }` makes 30% of the stage English,
    taken from the kind `curated` (else `textbook`, else any) as far as there is enough of it. Unit:
    part of all tokens.
    """
    curated_extra: dict[str, Fraction] = {}
    """A share in addition to the language's own part: with two languages of equal parts, `curated_extra =
    { en = 0.3 }` makes 30% + 35% English. Unit: part of all tokens.
    """
    low_resource_multiplier: PositiveFloat = 1.0
    """Multiplies the weight of low-resource languages. Unit: factor."""
    textbook_multiplier: PositiveFloat = 1.0
    """Multiplies the weight of the kind `textbook` within every language. Unit: factor."""

    @field_validator("languages", mode="after")
    @classmethod
    def _ours(cls, codes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(language(code).code for code in codes))

    @field_validator("weights", "curated", "curated_extra", mode="after")
    @classmethod
    def _by_our_codes(cls, shares: dict[str, float]) -> dict[str, float]:
        return by_our_codes(shares)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.strategy is Strategy.WEIGHTS) != bool(self.weights):
            raise ValueError('strategy = "weights" and a table of weights go together')
        if both := sorted(self.curated.keys() & self.curated_extra.keys()):
            raise ValueError(
                f"curated and curated_extra both name {', '.join(both)}; curated is a total, curated_extra "
                "comes on top"
            )
        # At 1 or more nothing would be left for the other languages and kinds.
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
