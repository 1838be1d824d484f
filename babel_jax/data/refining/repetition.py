"""The fraction of a text that repeats: the measures of Gopher's filters (Rae et al. 2021, arXiv 2112.11446,
table A1), for any script.

Spaces separate words. In a script without spaces, a word is a number of characters (scripts.py).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt64

from babel_jax.data.refining.characters import ngrams


def repeated_fractions(pieces: Sequence[str]) -> tuple[float, float]:
    """The fraction of lines (or paragraphs) equal to an earlier one, and the fraction of the characters in
    them.
    """
    seen: set[str] = set()
    repeated = characters = 0
    for piece in pieces:
        if piece in seen:
            repeated += 1
            characters += len(piece)
        seen.add(piece)
    total = sum(map(len, pieces))
    return (repeated / len(pieces), characters / total) if total else (0.0, 0.0)


def commonest_ngram(
    units: UInt64[np.ndarray, "units"], lengths: Int64[np.ndarray, "units"], size: int
) -> float:
    """The fraction of characters in all copies of the n-gram that covers most; 0 if none occurs twice."""
    hashes = ngrams(units, size)
    if len(hashes) < 2:
        return 0.0
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    if np.max(counts) == 1:
        return 0.0
    # ends[i] is the number of characters before unit i, so a difference is the length of an n-gram.
    ends = np.concatenate([[0], np.cumsum(lengths)])
    covered = np.where(counts > 1, counts * (ends[first + size] - ends[first]), 0)
    return float(covered.max() / ends[-1])


def repeated_ngrams(
    units: UInt64[np.ndarray, "units"], lengths: Int64[np.ndarray, "units"], size: int
) -> float:
    """The fraction of characters that are in an n-gram which occurs more than once; each character counts
    once.
    """
    hashes = ngrams(units, size)
    if len(hashes) < 2:
        return 0.0
    # Sorted, equal n-grams are neighbours.
    order = np.argsort(hashes, kind="stable")
    same = hashes[order][1:] == hashes[order][:-1]
    if not same.any():
        return 0.0
    has_equal = np.concatenate([[False], same]) | np.concatenate([same, [False]])
    starts = order[has_equal]

    # +1 where a repeated n-gram starts and -1 after its end: a running sum above 0 means covered.
    changes = np.zeros(len(units) + 1, np.int64)
    np.add.at(changes, starts, 1)
    np.add.at(changes, starts + size, -1)
    is_covered = np.cumsum(changes)[:-1] > 0
    return int(lengths[is_covered].sum()) / int(lengths.sum())
