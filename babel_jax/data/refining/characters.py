"""The kinds of the characters of a text, counted without a loop in Python: a table of all code points is
indexed by a whole text.
"""

import functools
import itertools
import sys
import unicodedata
from enum import IntEnum

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt32, UInt64

from babel_jax.scripts import WITHOUT_SPACES

CodePoints = UInt32[np.ndarray, "characters"]


class Kind(IntEnum):
    """The kinds of characters that the rules distinguish. `_KINDS` maps Unicode's general categories to
    them.
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
    # By category these are control characters; in a text they separate words.
    kinds[[ord(space) for space in "\t\n\r\v\f"]] = Kind.SPACE
    kinds[0xFFFD] = Kind.DAMAGED
    return kinds


# Unicode's "stream-safe" text (UAX 15) has at most 30 combining marks in a row. The time of normal forms is
# quadratic in such a run.
MAX_MARKS = 64


def with_short_runs_of_marks(text: str) -> str:
    """The text with at most MAX_MARKS combining marks in a row; the same object if it has no longer run."""
    if text.isascii() or len(text) <= MAX_MARKS:
        return text
    # marks_before[i] is the number of marks before character i. A character is one mark too many if it and
    # the MAX_MARKS characters before it are all marks.
    is_mark = _combining()[code_points(text)]
    marks_before = np.concatenate([[0], np.cumsum(is_mark)])
    too_many = marks_before[MAX_MARKS + 1 :] - marks_before[: -MAX_MARKS - 1] > MAX_MARKS
    if not too_many.any():
        return text
    kept = np.ones(len(text), bool)
    kept[MAX_MARKS:] = ~too_many
    return "".join(itertools.compress(text, kept))


def nfc(text: str) -> str:
    """The text in Unicode's NFC, in time linear in its length; marks beyond MAX_MARKS in a row are
    removed.
    """
    text = with_short_runs_of_marks(text)
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


@functools.cache
def _combining() -> Bool[np.ndarray, "1114112"]:
    """True for the code points that normal forms sort: those with a canonical combining class other
    than 0.
    """
    return np.fromiter(
        (unicodedata.combining(chr(number)) != 0 for number in range(sys.maxunicode + 1)),
        bool,
        sys.maxunicode + 1,
    )


def code_points(text: str) -> CodePoints:
    """The code points of a text. Half of a surrogate pair, which JSON can express, counts as one."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def kinds(points: CodePoints) -> UInt8[np.ndarray, "characters"]:
    """The `Kind` of each code point."""
    result: UInt8[np.ndarray, "characters"] = _table()[points]
    return result


def clusters(
    points: CodePoints, of: UInt8[np.ndarray, "characters"]
) -> tuple[UInt64[np.ndarray, "clusters"], Int64[np.ndarray, "clusters"]]:
    """Hashes and lengths of the grapheme clusters that are no space: a character with the marks and joiners
    after it (about UAX 29).

    A run of letters and digits of a script with spaces, such as a Latin name in Japanese text, is one
    cluster.
    """
    is_spaced_script = ~_without_spaces()[points >> _STEP_BITS]
    is_word = ((of == Kind.LETTER) | (of == Kind.DIGIT)) & is_spaced_script

    # A character continues the cluster before it if it is a mark, a joiner, or within a word.
    continues = (of == Kind.MARK) | (of == Kind.FORMAT)
    continues[1:] |= is_word[1:] & is_word[:-1]
    kept = of != Kind.SPACE
    points, starts = points[kept], np.flatnonzero(~continues[kept])
    if not len(starts):
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    points, starts = points[starts[0] :], starts - starts[0]

    # The hash is a sum over the characters, each mixed with its position in the cluster.
    lengths = np.diff(starts, append=len(points))
    positions = (np.arange(len(points)) - np.repeat(starts, lengths)).astype(np.uint64)
    return np.add.reduceat(mixed(points + (positions << np.uint64(32))), starts), lengths


_STEP_BITS = 4  # WITHOUT_SPACES is in steps of 16 code points


@functools.cache
def _without_spaces() -> Bool[np.ndarray, "steps"]:
    steps = np.zeros((sys.maxunicode + 1) >> _STEP_BITS, bool)
    for first, last in WITHOUT_SPACES:
        steps[first >> _STEP_BITS : (last >> _STEP_BITS) + 1] = True
    return steps


def mixed(numbers: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """Each number spread over 64 bits (the finalizer of MurmurHash3, Appleby 2011)."""
    numbers = numbers ^ (numbers >> np.uint64(33))
    numbers *= np.uint64(0xFF51AFD7ED558CCD)
    numbers ^= numbers >> np.uint64(33)
    numbers *= np.uint64(0xC4CEB9FE1A85EC53)
    numbers ^= numbers >> np.uint64(33)
    return numbers


def ngrams(units: UInt64[np.ndarray, "units"], size: int) -> UInt64[np.ndarray, "ngrams"]:
    """A hash of each run of `size` units; empty if there are fewer units."""
    count = len(units) - size + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    hashes = units[:count].astype(np.uint64)
    for offset in range(1, size):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += units[offset : offset + count]
    return mixed(hashes)
