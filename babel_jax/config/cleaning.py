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
    """The rules that drop documents, and the changes to the text of the others. The rules are for prose:
    lists of messages, manuals and code often repeat too much.

    Text is normalized to NFC, without control characters. Then a document is dropped if it breaks a rule.
    `off` of a source disables rules for that source.
    """

    off: tuple[Rule, ...] = ()
    """Rules that are disabled."""
    min_characters: NonNegative = 100
    """The fewest characters of a document (rule `characters`). Unit: characters."""
    max_damaged_fraction: Fraction = 0.002
    """Damaged characters, of all (rule `encoding`)."""
    max_digit_fraction: Fraction = 0.3
    """Digits, of all characters (rule `digits`)."""
    min_letter_fraction: Fraction = 0.6
    """Letters, of all characters (rule `letters`)."""
    min_word_fraction: Fraction = 0.8
    """Words with a letter, of all words (rule `words`)."""
    max_symbols_per_word: Fraction = 0.1
    """Symbols such as # and ellipses, for each word (rule `symbols`)."""
    max_bullet_lines: Fraction = 0.9
    """Lines that begin with a bullet (rule `bullets`)."""
    max_ellipsis_lines: Fraction = 0.3
    """Lines that end in an ellipsis (rule `ellipses`)."""
    max_repeated_lines: Fraction = 0.3
    """Repeated lines, of all lines (rule `lines`)."""
    max_repeated_line_characters: Fraction = 0.2
    """Characters in repeated lines (rule `lines`)."""
    max_repeated_paragraphs: Fraction = 0.3
    """Repeated paragraphs, of all paragraphs (rule `paragraphs`)."""
    max_repeated_paragraph_characters: Fraction = 0.2
    """Characters in repeated paragraphs (rule `paragraphs`)."""
    max_commonest_ngram: tuple[Fraction, Fraction, Fraction] = (0.20, 0.18, 0.16)
    """Characters in the most common n-gram of words, for n = 2, 3, 4 (rule `repetition`). Unit: fraction."""
    max_repeated_ngrams: tuple[Fraction, Fraction, Fraction, Fraction, Fraction, Fraction] = (
        0.15,
        0.14,
        0.13,
        0.12,
        0.11,
        0.10,
    )
    """Characters in n-grams of words that occur twice, for n = 5 to 10 (rule `repetition`). Unit:
    fraction.
    """
    min_language_probability: Fraction = 0.1
    """The least probability of the language that the source names (rule `language`)."""
    language_model: LocalPath | None = None
    """A model in fastText's format (.bin, .ftz) that identifies languages, such as GlotLID or OpenLID.
    Default: py3langid, which knows 142 languages. Where neither knows a language, the label of its source is
    trusted, and the counts say so.
    """
    mask_personal_data: bool = True
    """Replaces e-mail addresses, phone and card numbers by their kind, such as [email]."""
    keep_dropped: bool = False
    """Writes the dropped documents to `dropped/` with the reason."""


class DecontaminationSettings(Settings):
    """Evaluation items. Documents of any source that share a run of so many letters and digits with them are
    dropped.
    """

    paths: tuple[LocalPath, ...]
    """Files of evaluation items (.jsonl, .txt or .parquet)."""
    characters: Positive = 50
    """The length of the shared run; spaces and punctuation do not count. Unit: letters and digits."""
    dense_characters: Positive = 20
    """The same in documents of which at least half is Chinese, Japanese or Korean, whose characters carry
    more information. Unit: letters and digits.
    """


class DeduplicationSettings(Settings):
    """Of several documents of one language with nearly the same text, one stays: the document with the
    highest weight of its source, then the highest score, then the longest, then the first.
    """

    near: bool = True
    """Nearly equal texts are duplicates too, not only equal ones."""
    similarity: Fraction = 0.8
    """The part of equal shingles, estimated by MinHash, from which on two documents are duplicates."""
    shingle: Positive = 5
    """The length of a shingle. Unit: characters."""
    bands: Positive = 20
    """Bands of MinHash values, each of which finds pairs. Unit: bands."""
    rows: Positive = 6
    """MinHash values of a band; all bands * rows values verify a pair. Unit: values."""
    bucket_documents: Positive = 4_000_000
    """The most documents that one pairing task holds. Unit: documents."""

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
