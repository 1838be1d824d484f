"""What a tokenizer costs each language, measured on text."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from babel_jax.data.sources.rows import Row
from babel_jax.vocabulary.editable import Kind, Vocabulary
from babel_jax.vocabulary.reach import Unreachable, unreachable

WINDOW_TOKENS = 4_096
ENGLISH = "en"
_BATCH = 1_000  # texts that are encoded together


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one language.

    relative: its tokens divided by English's, on rows that both have under one id (`parallel_rows` of them);
    None without such rows. single_byte: the part of the tokens that are one byte of a longer character.
    window_bytes: the UTF-8 bytes of text in a window of 4,096 tokens. window_english: the tokens of English
    that say as much as such a window; None without parallel rows.
    """

    bytes: int
    characters: int
    tokens: int
    tokens_per_byte: float
    tokens_per_character: float
    parallel_rows: int
    relative: float | None
    single_byte: float
    window_bytes: float
    window_english: float | None


@dataclasses.dataclass(frozen=True)
class VocabularyCost:
    """A whole tokenizer: its entries, the number of entries that the text does not use, the entries that no
    text gives, whether words are split at combining marks, and the cost of each language.
    """

    kind: Kind
    entries: int
    added: int
    unused: int
    dead: Unreachable
    splits_marks: bool
    languages: Mapping[str, Cost]


def vocabulary_cost(
    vocabulary: Vocabulary, rows: Mapping[str, Sequence[Row]], splits_marks: bool
) -> VocabularyCost:
    """Encodes all rows of each language. Languages without any text are left out."""
    used: Counter[int] = Counter()
    sizes: dict[str, list[int]] = {}
    single = _single_bytes(vocabulary)
    singles: dict[str, int] = {}
    for code, documents in rows.items():
        counts: Counter[int] = Counter()
        sizes[code] = []
        for start in range(0, len(documents), _BATCH):
            texts = [row.text for row in documents[start : start + _BATCH]]
            for ids in vocabulary.tokenizer.encode_batch(texts):
                sizes[code].append(len(ids))
                counts.update(ids)
        singles[code] = sum(counts[number] for number in single)
        used.update(counts)

    # The tokens of each English row by its id; translations have the same id.
    english: dict[str | None, int] = {}
    for row, size in zip(rows.get(ENGLISH, ()), sizes.get(ENGLISH, ()), strict=True):
        english[row.id] = size
    costs = {}
    for code, documents in rows.items():
        if sum(sizes[code]):
            costs[code] = _cost(documents, sizes[code], singles[code], english)
    return VocabularyCost(
        vocabulary.kind,
        len(vocabulary.ids),
        len(vocabulary.added),
        sum(number not in used for number in vocabulary.ids.values()),
        unreachable(vocabulary, used),
        splits_marks,
        costs,
    )


def _cost(
    documents: Sequence[Row], sizes: Sequence[int], singles: int, english: Mapping[str | None, int]
) -> Cost:
    # Rows with one id say the same, so their tokens can be compared; bytes of two scripts cannot.
    own = theirs = parallel = 0
    for row, size in zip(documents, sizes, strict=True):
        if row.id is not None and english.get(row.id):
            own, theirs, parallel = own + size, theirs + english[row.id], parallel + 1
    relative = own / theirs if theirs else None
    tokens = sum(sizes)
    content = sum(len(row.text.encode()) for row in documents)
    characters = sum(len(row.text) for row in documents)
    return Cost(
        content,
        characters,
        tokens,
        tokens / content,
        tokens / characters,
        parallel,
        relative,
        singles / tokens,
        WINDOW_TOKENS * content / tokens,
        WINDOW_TOKENS / relative if relative else None,
    )


def _single_bytes(vocabulary: Vocabulary) -> set[int]:
    """The ids of tokens that are one byte of a character of several bytes."""
    found = set()
    for text, number in vocabulary.ids.items():
        content = vocabulary.bytes_of(text)
        if len(content) == 1 and content[0] >= 0x80:
            found.add(number)
    return found
