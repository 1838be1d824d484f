"""Rows of text from files and datasets. Each row that cannot be used is counted, with its location."""

import dataclasses
import itertools
import math
import operator
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from babel_jax.config import BadRows, Source
from babel_jax.config.data import CONVERSATION_KEYS, Parallel, Reducer, comparison
from babel_jax.data.sources.conversations import conversation_text
from babel_jax.data.sources.records import parts, read_records
from babel_jax.data.sources.streams import KIND_KEY, MAX_DOCUMENT_BYTES, BadRowError, too_long
from babel_jax.draws import Purpose, unit_draw
from babel_jax.errors import BadInput
from babel_jax.languages import language

MAX_LOCATED = 20
LONGEST_WORD = 1 << 18  # letters and digits; BPE takes over a second for each MiB of one word
# Tried at the starts of words alone, so that the search is linear.
_TOO_LONG_WORD = re.compile(rf"(?<!\w)\w{{{LONGEST_WORD + 1}}}")
# File names contain the kind.
_KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")
_KEYS_NAMED = 10
_LARGEST_SCORE = 1e38


@dataclasses.dataclass(frozen=True)
class Row:
    """One document.

    - id: the row's id, or FILE:LINE if it has none
    - kind: the row's kind, or its source's
    - score: a quality score, if the row has one
    - source: the label of the text's source; rows that differ only here are equal
    """

    id: str
    text: str
    kind: str
    score: float | None = None
    source: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass
class RowCounts:
    """Counts of reading: all rows, bad rows (with the locations of the first ones), and rows of white space
    only.
    """

    rows: int = 0
    bad: int = 0
    empty: int = 0
    located: list[str] = dataclasses.field(default_factory=list)

    def refuse(self, location: str, problem: BadRowError, bad_rows: BadRows) -> None:
        """Counts a bad row. Raises BadInput with its location if bad rows are refused."""
        if bad_rows is BadRows.REFUSE:
            raise BadInput(
                f"{location}: {problem}; repair or remove the row (a run may skip such rows: "
                'data.bad_rows = "skip")'
            ) from None
        self.bad += 1
        if len(self.located) < MAX_LOCATED:
            self.located.append(f"{location}: {problem}")

    def add(self, other: "RowCounts") -> None:
        """Adds the counts of another reading."""
        self.rows += other.rows
        self.bad += other.bad
        self.empty += other.empty
        self.located = (self.located + other.located)[:MAX_LOCATED]


def rows_of_all(sources: Iterable[Source], bad_rows: BadRows) -> Iterator[Row]:
    """The usable rows of several sources, one after the other; see `read_rows`."""
    for source in sources:
        yield from read_rows(source, bad_rows, RowCounts())


def read_rows(
    source: Source,
    bad_rows: BadRows,
    counts: RowCounts,
    part: str | None = None,
    check: Callable[[str], None] | None = None,
) -> Iterator[Row]:
    """The usable rows of a source, or of one of its `parts`, in the order of its files' names; updates
    `counts` as it reads.

    A bad row is skipped and counted, or refused with BadInput that names its location. Bad rows are:
    unreadable JSON, no text, text that is no string or not UTF-8, an impossible id, kind or score, more than
    16 MiB. A missing, corrupt or truncated file always raises BadInput. Rows that differ from `source.where`
    are skipped without a count. `check` raises ValueError for a text that makes its row a bad one.
    """
    if not _KIND.fullmatch(source.kind):
        raise BadInput(
            f"data.sources: kind = {source.kind!r}; a kind is up to 64 lower-case letters, digits and _, "
            "such as web"
        )
    chosen = [part] if part is not None else parts(source)
    # One file after the other: only one is open at a time.
    records = itertools.chain.from_iterable(read_records(source, name) for name in chosen)
    for location, record in records:
        if source.where and isinstance(record, dict) and not _is_wanted(record, source):
            continue
        counts.rows += 1
        try:
            row = _row(record, location, source)
            if check is not None:
                _checked(row.text, check)
        except BadRowError as problem:
            counts.refuse(location, problem, bad_rows)
            continue
        if row.text.isspace() or not row.text:
            counts.empty += 1
            continue
        yield row


def _checked(text: str, check: Callable[[str], None]) -> None:
    try:
        check(text)
    except ValueError as problem:
        raise BadRowError(str(problem)) from None


_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def _is_wanted(record: dict[str, Any], source: Source) -> bool:
    for key, asked in source.where.items():
        # A condition is a comparison, such as ">= 3", or a text that must be equal.
        value, compared = record.get(key), comparison(asked)
        if compared is None:
            if _as_text(value) != asked:
                return False
            continue
        sign, bound = compared
        number = reduced(value, source.score_of)
        # A row without a number meets no comparison.
        if not isinstance(number, int | float) or isinstance(number, bool):
            return False
        if not _COMPARE[sign](number, bound):
            return False
    return True


_REDUCE: dict[Reducer, Callable[[list[float]], float]] = {
    Reducer.MEAN: statistics.fmean,
    Reducer.MIN: min,
    Reducer.MAX: max,
    Reducer.MEDIAN: statistics.median,
}


def reduced(value: Any, how: Reducer) -> Any:
    """One number of a list of numbers; None for a list without any; any other value as it is."""
    if not isinstance(value, list | tuple):
        return value
    numbers = [number for number in value if number is not None]
    if not numbers:
        return None
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        return value
    return _REDUCE[how](numbers)


def _as_text(value: Any) -> Any:
    """A value in the form of settings: where = { year = "2024" } also matches the number 2024."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _row(record: Any, location: str, source: Source) -> Row:
    """The row of a record. Raises BadRowError for one that cannot be used."""
    if isinstance(record, BadRowError):
        raise record
    if not isinstance(record, dict):
        raise BadRowError(f"a JSON object is needed, not {type(record).__name__}")
    if source.text_key not in record:
        keys = ", ".join(map(str, itertools.islice(record, _KEYS_NAMED)))
        more = f" and {len(record) - _KEYS_NAMED} more" if len(record) > _KEYS_NAMED else ""
        raise BadRowError(f"no {source.text_key!r}; its keys are {keys or 'none'}{more}")
    if record[source.text_key] is None:
        raise BadRowError(f"{source.text_key!r} is null")

    # Id, kind and score may be missing.
    identifier = record.get(source.id_key)
    if identifier is None:
        identifier = f"{Path(location).name}"
    elif isinstance(identifier, int) and not isinstance(identifier, bool):
        identifier = str(identifier)
    kind = record.get(KIND_KEY)
    kind = source.kind if kind is None else _string(kind, KIND_KEY)
    if not _KIND.fullmatch(kind):
        raise BadRowError(f"{KIND_KEY} {kind[:80]!r} is not of up to 64 lower-case letters, digits and _")
    score = _score(reduced(record.get(source.score_key), source.score_of), source.score_key)

    # Sizes are checked before the text is turned into anything else.
    text = record[source.text_key]
    if isinstance(text, str | bytes) and len(text) >= MAX_DOCUMENT_BYTES:
        raise too_long()
    if source.text_key in CONVERSATION_KEYS:
        try:
            text = conversation_text(text)
        except ValueError as problem:
            raise BadRowError(str(problem)) from None
    text = _string(text, source.text_key)
    if source.parallel is not None:
        text = _with_translation(text, record, _string(identifier, source.id_key), source, source.parallel)
    if len(text) > LONGEST_WORD and _TOO_LONG_WORD.search(text):
        raise BadRowError(f"a word of more than {LONGEST_WORD:,} letters, which no language has")
    return Row(_string(identifier, source.id_key), text, kind, score, source.label)


def _with_translation(
    text: str, record: dict[str, Any], identifier: str, source: Source, parallel: Parallel
) -> str:
    """One document of a text and its translation. Raises BadRowError without a translation."""
    translation = record.get(parallel.text_key)
    if translation is None:
        raise BadRowError(f"no {parallel.text_key!r}, which parallel.text_key names")
    other = _string(translation, parallel.text_key)
    if not text.strip() or not other.strip():
        return ""
    if len(text) + len(other) >= MAX_DOCUMENT_BYTES:
        raise too_long()
    # Names of languages, as the template writes them; a swap exchanges them with the texts.
    names = language(source.language).name, language(parallel.language).name
    if parallel.swap and unit_draw(Purpose.PARALLEL, identifier) < 0.5:
        text, other, names = other, text, names[::-1]
    return parallel.template.format(text=text, translation=other, language=names[0], other=names[1])


def _score(value: Any, key: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, float | int) or isinstance(value, bool):
        raise BadRowError(f"{key} {value!r} is not a number")
    try:
        score = float(value)
    # A whole number of JSON may be larger than any float.
    except OverflowError:
        score = math.inf
    # Shards keep scores in 32 bits.
    if not abs(score) <= _LARGEST_SCORE:
        raise BadRowError(f"{key} is not a finite number of up to {_LARGEST_SCORE:g}")
    return score


def _string(value: Any, key: str) -> str:
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if isinstance(value, str):
            # JSON can express half of a surrogate pair, which is no text.
            value.encode("utf-8")
            return value
    except UnicodeError as error:
        raise BadRowError(f"{key!r} is not UTF-8 ({error.reason})") from None  # type: ignore[attr-defined]
    raise BadRowError(f"{key!r} is not a string but {type(value).__name__}")
