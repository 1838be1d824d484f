"""The settings of `babel prepare` before tokenization: cleaning, decontamination, deduplication, and the
machines.
"""

from typing import Self

from pydantic import model_validator

from babel_jax.config.settings import Choice, Fraction, LocalPath, NonNegative, Positive, Settings


class Rule(Choice):
    """The reasons why cleaning drops a document.

    Each is a threshold of `CleaningSettings`; data/refining/cleaning.py has their sources.
    """

    CHARACTERS = "characters"
    ENCODING = "encoding"
    DIGITS = "digits"
    LETTERS = "letters"
    WORDS = "words"
    SYMBOLS = "symbols"
    BULLETS = "bullets"
    ELLIPSES = "ellipses"
    PLACEHOLDER = "placeholder"
    LINES = "lines"
    PARAGRAPHS = "paragraphs"
    REPETITION = "repetition"
    LANGUAGE = "language"


class CleaningSettings(Settings):
    """The rules that drop documents, and the changes to the text of the others. `off` disables rules; `off`
    of a source disables them for that source. The rules are for prose: lists of messages, manuals and code
    often repeat too much.

    Text is normalized to NFC, without control characters. Then a document is dropped if it has fewer than
    `min_characters` characters; more than these fractions of digits (the report's two rules), of lines that
    begin with a bullet or end in an ellipsis, of characters in repeated lines, paragraphs and word n-grams (n
    = 2, 3, 4: the most common n-gram; n = 5 to 10: all that occur twice); fewer letters; or a lower
    probability of its language than `min_language_probability`. `mask_personal_data` replaces e-mail
    addresses, phone and card numbers by their kind, such as [email]. `keep_dropped` writes the dropped
    documents to `dropped/` with the reason.
    """

    off: tuple[Rule, ...] = ()
    min_characters: NonNegative = 100
    max_damaged_fraction: Fraction = 0.002
    max_digit_fraction: Fraction = 0.3
    min_letter_fraction: Fraction = 0.6
    min_word_fraction: Fraction = 0.8
    max_symbols_per_word: Fraction = 0.1
    max_bullet_lines: Fraction = 0.9
    max_ellipsis_lines: Fraction = 0.3
    max_repeated_lines: Fraction = 0.3
    max_repeated_line_characters: Fraction = 0.2
    max_repeated_paragraphs: Fraction = 0.3
    max_repeated_paragraph_characters: Fraction = 0.2
    max_commonest_ngram: tuple[Fraction, Fraction, Fraction] = (0.20, 0.18, 0.16)
    max_repeated_ngrams: tuple[Fraction, Fraction, Fraction, Fraction, Fraction, Fraction] = (
        0.15,
        0.14,
        0.13,
        0.12,
        0.11,
        0.10,
    )
    min_language_probability: Fraction = 0.1
    mask_personal_data: bool = True
    keep_dropped: bool = False


class DecontaminationSettings(Settings):
    """Files of evaluation items (.jsonl, .txt or .parquet). Documents of any source that share a run of this
    many letters and digits with them are dropped.

    `characters` counts letters and digits, not spaces and punctuation. In documents in Chinese, Japanese and
    Korean, whose characters carry more information, `dense_characters` are enough if at least half of them
    are such characters.
    """

    paths: tuple[LocalPath, ...]
    characters: Positive = 50
    dense_characters: Positive = 20


class DeduplicationSettings(Settings):
    """Of several documents of one language with the same text, or by MinHash with at least `similarity` of
    equal shingles, one stays.

    It is the document with the highest weight of its source, then the highest score, then the longest, then
    the first. A shingle has `shingle` characters. `bands` of `rows` MinHash values each find pairs; all bands
    * rows values verify them. With `near = false`, only equal texts are duplicates. `bucket_documents` is the
    most documents that one pairing task holds.
    """

    near: bool = True
    similarity: Fraction = 0.8
    shingle: Positive = 5
    bands: Positive = 20
    rows: Positive = 6
    bucket_documents: Positive = 4_000_000

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.near and self.similarity == 0:
            raise ValueError(
                "similarity = 0 would make all documents duplicates; give a number above 0, or near = false"
            )
        return self


class Engine(Choice):
    """Where the tasks of `babel prepare` run: in processes of this machine, or on a Ray cluster that shares
    its file system.
    """

    LOCAL = "local"
    RAY = "ray"
