"""What the characters of a text are, counted without a loop in Python: one table of all code points, looked
up for a whole text.
"""

import functools
import itertools
import sys
import unicodedata
from enum import IntEnum

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt32, UInt64

# Words are not separated in these; so many characters (grapheme clusters) stand for a word of other languages
# in counts and n-grams. Means of words in segmented text: 1.5 to 2 characters in Chinese and Japanese, about
# 4 clusters in Thai and Burmese.
CHARACTERS_A_WORD = {"zh": 2, "ja": 2, "th": 4, "my": 4}

CodePoints = UInt32[np.ndarray, "characters"]


class Kind(IntEnum):
    """The kinds that the rules tell apart; of Unicode's general categories those in
    `_KINDS`, and the rest.
    """

    OTHER = 0
    LETTER = 1
    MARK = 2
    DIGIT = 3
    NUMBER = 4
    SPACE = 5
    PUNCTUATION = 6
    SYMBOL = 7
    FORMAT = 8
    DAMAGED = 9


_KINDS = {
    "L": Kind.LETTER,
    "M": Kind.MARK,
    "N": Kind.NUMBER,
    "Z": Kind.SPACE,
    "P": Kind.PUNCTUATION,
    "S": Kind.SYMBOL,
}


@functools.cache
def _table() -> UInt8[np.ndarray, "1114112"]:
    kinds = np.zeros(sys.maxunicode + 1, np.uint8)
    for number in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(number))
        if category == "Nd":
            kinds[number] = Kind.DIGIT
        elif category == "Cf":
            kinds[number] = Kind.FORMAT
        else:
            kinds[number] = _KINDS.get(category[0], Kind.OTHER)
    kinds[[ord(space) for space in "\t\n\r\v\f"]] = Kind.SPACE
    kinds[0xFFFD] = Kind.DAMAGED
    return kinds


# Unicode's "stream-safe" text (UAX 15) has at most 30 combining marks in a row. The time of normal forms is
# quadratic in such a run.
MAX_MARKS = 64


def with_short_runs_of_marks(text: str) -> str:
    """The text with at most MAX_MARKS combining marks in a row; the same object where it
    has no longer run.
    """
    if text.isascii() or len(text) <= MAX_MARKS:
        return text
    is_mark = _combining()[code_points(text)]
    before = np.concatenate([[0], np.cumsum(is_mark)])
    too_many = before[MAX_MARKS + 1 :] - before[: -MAX_MARKS - 1] > MAX_MARKS
    if not too_many.any():
        return text
    kept = np.ones(len(text), bool)
    kept[MAX_MARKS:] = ~too_many
    return "".join(itertools.compress(text, kept))


def nfc(text: str) -> str:
    """The text in Unicode's NFC, in time linear in its length: what exceeds MAX_MARKS combining marks in a
    row is left out.
    """
    text = with_short_runs_of_marks(text)
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


@functools.cache
def _combining() -> Bool[np.ndarray, "1114112"]:
    """Which code points normal forms sort: those of a canonical combining class other than 0."""
    return np.fromiter(
        (unicodedata.combining(chr(number)) != 0 for number in range(sys.maxunicode + 1)),
        bool,
        sys.maxunicode + 1,
    )


def code_points(text: str) -> CodePoints:
    """The code points of a text; half of a surrogate pair, which JSON can spell, is one."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def kinds(points: CodePoints) -> UInt8[np.ndarray, "characters"]:
    """The `Kind` of each."""
    return _table()[points]


def clusters(
    points: CodePoints, of: UInt8[np.ndarray, "characters"]
) -> tuple[UInt64[np.ndarray, "clusters"], Int64[np.ndarray, "clusters"]]:
    """Hashes and lengths of the grapheme clusters that are no space: a character with the marks and joiners
    behind it (about UAX 29).

    A run of letters and digits of a script that does separate words, such as a Latin name in Japanese, is
    one.
    """
    is_word = ((of == Kind.LETTER) | (of == Kind.DIGIT)) & ~_without_spaces()[
        np.minimum(points >> 7, _LAST_BLOCK)
    ]
    goes_on = (of == Kind.MARK) | (of == Kind.FORMAT)
    goes_on[1:] |= is_word[1:] & is_word[:-1]
    kept = of != Kind.SPACE
    points, starts = points[kept], np.flatnonzero(~goes_on[kept])
    if not len(starts):
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    points, starts = points[starts[0] :], starts - starts[0]
    lengths = np.diff(starts, append=len(points))
    places = (np.arange(len(points)) - np.repeat(starts, lengths)).astype(np.uint64)
    return np.add.reduceat(mixed(points + (places << np.uint64(32))), starts), lengths


# Blocks of 128 code points that hold the letters of scripts written without spaces: Thai and Lao, Burmese,
# Khmer, kana and Chinese characters, and their compatibility forms.
_SCRIPTS_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x107F),
    (0x1780, 0x17FF),
    (0x2E80, 0x9FFF),
    (0xAA00, 0xAA7F),
    (0xF900, 0xFAFF),
)
_LAST_BLOCK = 0x20000 >> 7


@functools.cache
def _without_spaces() -> Bool[np.ndarray, "blocks"]:
    blocks = np.zeros(_LAST_BLOCK + 1, bool)
    for first, last in _SCRIPTS_WITHOUT_SPACES:
        blocks[first >> 7 : (last >> 7) + 1] = True
    blocks[_LAST_BLOCK] = True  # the rarer Chinese characters, from U+20000 on
    return blocks


def mixed(numbers: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """Each number spread over 64 bits (the finalizer of MurmurHash3, Appleby 2011)."""
    numbers = numbers ^ (numbers >> np.uint64(33))
    numbers *= np.uint64(0xFF51AFD7ED558CCD)
    numbers ^= numbers >> np.uint64(33)
    numbers *= np.uint64(0xC4CEB9FE1A85EC53)
    numbers ^= numbers >> np.uint64(33)
    return numbers


def ngrams(units: UInt64[np.ndarray, "units"], size: int) -> UInt64[np.ndarray, "ngrams"]:
    """A hash of each run of `size` units; none where there are fewer units."""
    count = len(units) - size + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    hashes = units[:count].astype(np.uint64)
    for place in range(1, size):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += units[place : place + count]
    return mixed(hashes)
