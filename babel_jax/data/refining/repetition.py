"""How much of a text repeats: the measures of Gopher's filters (Rae et al. 2021, arXiv 2112.11446, table A1),
in any script.

Words are what stands between spaces; where a language writes none, a word is so many characters
(`CHARACTERS_A_WORD`).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt64

from babel_jax.data.refining.characters import ngrams


def repeated_fractions(pieces: Sequence[str]) -> tuple[float, float]:
    """Of lines or paragraphs, what fraction stood there before, and what fraction of the characters is in
    those.
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
    """The fraction of characters in all places of the n-gram that covers most; 0 where none occurs twice."""
    hashes = ngrams(units, size)
    if len(hashes) < 2:
        return 0.0
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    if np.max(counts) == 1:
        return 0.0
    sums = np.concatenate([[0], np.cumsum(lengths)])
    covered = np.where(counts > 1, counts * (sums[first + size] - sums[first]), 0)
    return float(covered.max() / sums[-1])


def repeated_ngrams(
    units: UInt64[np.ndarray, "units"], lengths: Int64[np.ndarray, "units"], size: int
) -> float:
    """The fraction of characters that lie in an n-gram which occurs more than once, each counted once."""
    hashes = ngrams(units, size)
    if len(hashes) < 2:
        return 0.0
    order = np.argsort(hashes, kind="stable")
    same = hashes[order][1:] == hashes[order][:-1]
    if not same.any():
        return 0.0
    repeated = np.zeros(len(units) + 1, np.int64)
    places = order[np.concatenate([[False], same]) | np.concatenate([same, [False]])]
    np.add.at(repeated, places, 1)
    np.add.at(repeated, places + size, -1)
    return int(lengths[np.cumsum(repeated)[:-1] > 0].sum()) / int(lengths.sum())
