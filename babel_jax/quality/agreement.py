"""How well scores agree with a judge's."""

import numpy as np
from jaxtyping import Bool, Float


def ranks(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places]


def spearman(one: Float[np.ndarray, "n"], other: Float[np.ndarray, "n"]) -> float:
    """Spearman's rank correlation; not a number where one of the two is all the same."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def roc_auc(scores: Float[np.ndarray, "n"], good: Bool[np.ndarray, "n"]) -> float:
    """The chance that a good text has the higher score of a good and a bad one, ties counting half (Mann and Whitney); not a number
    where all are of one kind."""
    number = int(good.sum())
    if number in (0, len(good)):
        return float("nan")
    return float((ranks(scores)[good].sum() - number * (number + 1) / 2) / (number * (len(good) - number)))


def quantile_grid(values: Float[np.ndarray, "n"], points: int = 101) -> list[float]:
    """The values below which 0, 1, .. 100% of `values` are."""
    return np.quantile(values, np.linspace(0.0, 1.0, points)).tolist()


def quantile_of(values: Float[np.ndarray, "n"], grid: list[float]) -> Float[np.ndarray, "n"]:
    """Which part of the values that made the grid is below each value: from 0 to 1."""
    # Equal values in the grid (few different scores) stand for the middle of their span, not for its end.
    edges, places = np.unique(grid, return_inverse=True)
    parts = np.bincount(places, np.linspace(0.0, 1.0, len(grid))) / np.bincount(places)
    return np.interp(values, edges, parts)
