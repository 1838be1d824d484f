"""Finds documents that contain evaluation items: they share a run of letters and digits as long as a
sentence, in any script.

GPT-3 (Brown et al. 2020, appendix C) used 13 common words; languages without spaces have no words to count.
"""

import functools
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt64

from babel_jax.config import DecontaminationSettings, Source
from babel_jax.data.refining.characters import (
    CodePoints,
    Kind,
    code_points,
    kinds,
    ngrams,
    with_short_runs_of_marks,
)
from babel_jax.data.sources.parquet import parquet_rows
from babel_jax.data.sources.records import parts, read_records
from babel_jax.data.sources.streams import BadRowError
from babel_jax.errors import BadInput
from babel_jax.languages import LANGUAGES

_DENSE = ("Hans", "Hant", "Hani", "Jpan", "Hang", "Kore")  # scripts
_FIRST_DENSE = 0x2E80  # Chinese radicals; Chinese characters, kana and Hangul syllables have higher numbers
_FILTER_BITS = 24


Runs = dict[bool, UInt64[np.ndarray, "ngrams"]]


class EvaluationText:
    """The n-grams of evaluation files, to find documents that share one."""

    def __init__(self, settings: DecontaminationSettings):
        """Reads the files: every string of JSON lines and Parquet rows, every paragraph of text files.

        Raises BadInput as `read_records` does.
        """
        self._settings = settings
        # By False and True, as in `Runs`: hashes of items, and for each array the number of its file.
        item_hashes: dict[bool, list[UInt64[np.ndarray, "ngrams"]]] = {False: [], True: []}
        file_numbers: dict[bool, list[int]] = {False: [], True: []}
        self.files: list[str] = []
        for path in settings.paths:
            for part in parts(Source(language="en", path=path)):
                is_empty = True
                for text in _strings_of(part):
                    for dense, hashes in runs_of_item(text, self._settings).items():
                        if len(hashes):
                            is_empty = False
                            item_hashes[dense].append(hashes)
                            file_numbers[dense].append(len(self.files))
                if is_empty:
                    raise BadInput(
                        f"{part}: no text of {settings.characters} letters or more "
                        f"({settings.dense_characters} in Chinese, Japanese and Korean); name files of "
                        "evaluation items"
                    )
                self.files.append(part)
        self._tables = {dense: _Table.of(item_hashes[dense], file_numbers[dense]) for dense in (False, True)}

    def file_of(self, text: str, language: str) -> str | None:
        """The first evaluation file that has a run in common with a document; None if there is none."""
        runs = runs_of_document(text, language, self._settings)
        for dense, hashes in runs.items():
            number = self._tables[dense].first_file(hashes)
            if number is not None:
                return self.files[number]
        return None


class _Table:
    """n-grams and the file of each, sorted by n-gram.

    A table of bits, indexed by the first bits of an n-gram, quickly excludes most n-grams that no file has.
    """

    def __init__(self, hashes: UInt64[np.ndarray, "n"], files: np.ndarray):
        self._hashes, self._files = hashes, files
        self._filter: Bool[np.ndarray, "16777216"] = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[hashes >> np.uint64(64 - _FILTER_BITS)] = True

    @classmethod
    def of(cls, item_hashes: list[UInt64[np.ndarray, "n"]], file_numbers: list[int]) -> "_Table":
        """A table of the hashes of items; `file_numbers` has the file of each item."""
        all_hashes = np.concatenate([np.empty(0, np.uint64), *item_hashes])
        files = np.repeat(np.array(file_numbers, np.int64), [len(hashes) for hashes in item_hashes])
        hashes, first = np.unique(all_hashes, return_index=True)
        return cls(hashes, files[first])

    def first_file(self, hashes: UInt64[np.ndarray, "n"]) -> int | None:
        # The bits exclude most hashes of a document before the slower binary search.
        possible = hashes[self._filter[hashes >> np.uint64(64 - _FILTER_BITS)]]
        if not len(possible) or not len(self._hashes):
            return None
        indices = np.minimum(np.searchsorted(self._hashes, possible), len(self._hashes) - 1)
        same = self._hashes[indices] == possible
        return int(self._files[indices[same]].min()) if same.any() else None


def runs_of_item(text: str, settings: DecontaminationSettings) -> Runs:
    """Hashes of all runs of letters and digits of an evaluation item.

    True: runs of `dense_characters` characters of which at least half are Chinese, Japanese or Korean. False:
    runs of `characters` characters.
    """
    # Short runs identify a text only if most of it is in Chinese, Japanese or Korean script.
    folded = fold(text)
    dense = ngrams(folded.astype(np.uint64), settings.dense_characters)
    return {
        True: dense[_is_dense(folded, settings.dense_characters)],
        False: ngrams(folded.astype(np.uint64), settings.characters),
    }


def runs_of_document(text: str, language: str, settings: DecontaminationSettings) -> Runs:
    """Hashes of the runs of a document, to compare with the hashes of items. Under True only for a language
    in a Chinese, Japanese or Korean script.
    """
    folded = fold(text).astype(np.uint64)
    runs = {True: ngrams(folded, settings.dense_characters)} if LANGUAGES[language].script in _DENSE else {}
    return {**runs, False: ngrams(folded, settings.characters)}


def fold(text: str) -> CodePoints:
    """The letters, marks and digits of a text as code points, in lower case and in one Unicode form (NFKC).

    So spaces, punctuation and the composition of letters make no difference. Documents and evaluation items
    both pass through this function, before personal data is masked.
    """
    text = unicodedata.normalize("NFKC", with_short_runs_of_marks(text)).casefold()
    # Casefolding can split letters: U+0130 becomes i and a mark.
    points = code_points(unicodedata.normalize("NFKC", text))
    point_kinds = kinds(points)
    result: CodePoints = points[
        (point_kinds == Kind.LETTER) | (point_kinds == Kind.MARK) | (point_kinds == Kind.DIGIT)
    ]
    return result


def _is_dense(points: CodePoints, size: int) -> Bool[np.ndarray, "ngrams"]:
    """True for n-grams that have at least half Chinese, Japanese or Korean letters. Other n-grams of this
    length, such as "United States of America", are too short to identify a document.
    """
    before = np.concatenate([[0], np.cumsum(points >= _FIRST_DENSE)])
    result: Bool[np.ndarray, "ngrams"] = 2 * (before[size:] - before[:-size]) >= size
    return result


@functools.lru_cache(maxsize=1)
def evaluation_text(settings: DecontaminationSettings) -> EvaluationText:
    """`EvaluationText` of the settings, read once for all documents of a process."""
    return EvaluationText(settings)


def _strings_of(part: str) -> Iterator[str]:
    """Every string of a file.

    Raises BadInput for a row that cannot be read: its items would be missed.
    """
    rows = (
        parquet_rows(part)
        if Path(part).suffix == ".parquet"
        else read_records(Source(language="en", path=part), part)
    )
    for location, record in rows:
        if isinstance(record, BadRowError):
            raise BadInput(f"{location}: {record}; repair or remove the row of evaluation items")
        yield from _strings(record)


def _strings(record: Any) -> Iterator[str]:
    # A list of the values that remain, and no recursion: objects and lists may be nested to any depth.
    waiting = [record]
    while waiting:
        value = waiting.pop()
        if isinstance(value, bytes):
            yield value.decode("utf-8", "replace")
        elif isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
