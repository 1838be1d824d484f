"""Finding documents that hold evaluation items: a run of letters and digits in common, as long as a sentence,
in any script.

GPT-3 (Brown et al. 2020, appendix C) took 13 words in common for an overlap; languages without spaces have no
words to count.
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
from babel_jax.data.sources.records import parquet_rows, parts, read_records
from babel_jax.data.sources.streams import BadRowError
from babel_jax.errors import BadInput

_DENSE = ("zh", "ja", "ko")
_FIRST_DENSE = 0x2E80  # Chinese radicals; behind them stand the Chinese characters, kana and Hangul syllables
_FILTER_BITS = 24


Runs = dict[bool, UInt64[np.ndarray, "ngrams"]]


class EvaluationText:
    """The n-grams of evaluation files, to look documents up in."""

    def __init__(self, settings: DecontaminationSettings):
        """Reads the files: of JSON lines and parquet rows every string, of text every paragraph.

        Raises BadInput as `read_records` does.
        """
        self._settings = settings
        found: dict[bool, list[UInt64[np.ndarray, "ngrams"]]] = {False: [], True: []}
        files: dict[bool, list[int]] = {False: [], True: []}
        self.files: list[str] = []
        for path in settings.paths:
            for part in parts(Source(language="en", path=path)):
                before = sum(map(len, found.values()))
                for text in _strings_of(part):
                    for dense, hashes in runs_of_item(text, self._settings).items():
                        if len(hashes):
                            found[dense].append(hashes)
                            files[dense].append(len(self.files))
                if sum(map(len, found.values())) == before:
                    raise BadInput(
                        f"{part}: no text of {settings.characters} letters or more "
                        f"({settings.dense_characters} in Chinese, Japanese and "
                        "Korean); name files of evaluation items"
                    )
                self.files.append(part)
        self._tables = {dense: _Table.of(found[dense], files[dense]) for dense in found}

    def file_of(self, text: str, language: str) -> str | None:
        """The first evaluation file with which a document has a run in common."""
        runs = runs_of_document(text, language, self._settings)
        found = [self._tables[dense].first_file(hashes) for dense, hashes in runs.items()]
        return next((self.files[number] for number in found if number is not None), None)


class _Table:
    """n-grams and the file of each, sorted; a bit for the first bits of each says at once that most n-grams
    are not among them.
    """

    def __init__(self, hashes: UInt64[np.ndarray, "n"], files: np.ndarray):
        self._hashes, self._files = hashes, files
        self._filter: Bool[np.ndarray, "16777216"] = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[hashes >> np.uint64(64 - _FILTER_BITS)] = True

    @classmethod
    def of(cls, found: list[UInt64[np.ndarray, "n"]], files: list[int]) -> "_Table":
        hashes = np.concatenate([np.empty(0, np.uint64), *found])
        owners = np.repeat(np.array(files, np.int64), [len(one) for one in found])
        hashes, first = np.unique(hashes, return_index=True)
        return cls(hashes, owners[first])

    def first_file(self, hashes: UInt64[np.ndarray, "n"]) -> int | None:
        possible = hashes[self._filter[hashes >> np.uint64(64 - _FILTER_BITS)]]
        if not len(possible) or not len(self._hashes):
            return None
        places = np.minimum(np.searchsorted(self._hashes, possible), len(self._hashes) - 1)
        same = self._hashes[places] == possible
        return int(self._files[places[same]].min()) if same.any() else None


def runs_of_item(text: str, settings: DecontaminationSettings) -> Runs:
    """Hashes of all runs of letters and digits of an evaluation item: by whether they are runs of
    `dense_characters`, half of which are Chinese, Japanese or Korean."""
    folded = fold(text)
    dense = ngrams(folded.astype(np.uint64), settings.dense_characters)
    return {
        True: dense[_is_dense(folded, settings.dense_characters)],
        False: ngrams(folded.astype(np.uint64), settings.characters),
    }


def runs_of_document(text: str, language: str, settings: DecontaminationSettings) -> Runs:
    """Hashes of the runs of a document, to be looked for among those of items; dense ones in languages of
    dense characters alone.
    """
    folded = fold(text).astype(np.uint64)
    runs = {True: ngrams(folded, settings.dense_characters)} if language in _DENSE else {}
    return {**runs, False: ngrams(folded, settings.characters)}


def fold(text: str) -> CodePoints:
    """The letters, marks and digits of a text in small letters and in one form of Unicode (NFKC), as code
    points.

    Spacing, punctuation and the way in which a keyboard composes letters make no difference. Documents and
    evaluation items go through this function alone, before anything is masked.
    """
    text = unicodedata.normalize("NFKC", with_short_runs_of_marks(text)).casefold()
    # Casefolding can take letters apart: U+0130 becomes i and a mark.
    points = code_points(unicodedata.normalize("NFKC", text))
    of = kinds(points)
    return points[(of == Kind.LETTER) | (of == Kind.MARK) | (of == Kind.DIGIT)]


def _is_dense(points: CodePoints, size: int) -> Bool[np.ndarray, "ngrams"]:
    """Which n-grams are half of Chinese, Japanese or Korean letters: "United States of America" says no more
    there than elsewhere.
    """
    before = np.concatenate([[0], np.cumsum(points >= _FIRST_DENSE)])
    return 2 * (before[size:] - before[:-size]) >= size


@functools.lru_cache(maxsize=1)
def evaluation_text(settings: DecontaminationSettings) -> EvaluationText:
    """`EvaluationText` of settings, read once for all the documents of a process."""
    return EvaluationText(settings)


def _strings_of(part: str) -> Iterator[str]:
    """Every string of a file.

    Raises BadInput for a row that cannot be read: what it holds would not be looked for.
    """
    rows = (
        parquet_rows(part)
        if Path(part).suffix == ".parquet"
        else read_records(Source(language="en", path=part), part)
    )
    for place, record in rows:
        if isinstance(record, BadRowError):
            raise BadInput(f"{place}: {record}; repair or remove the row of evaluation items")
        yield from _strings(record)


def _strings(record: Any) -> Iterator[str]:
    waiting = [record]
    while waiting:
        value = waiting.pop()
        if isinstance(value, bytes):
            yield value.decode("utf-8", "replace")
        elif isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
