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
    """The chance that a good text has the higher score of a good and a bad one, ties counting half (Mann and
    Whitney); not a number where all are of one kind."""
    number = int(good.sum())
    if number in (0, len(good)):
        return float("nan")
    return float((ranks(scores)[good].sum() - number * (number + 1) / 2) / (number * (len(good) - number)))


def quantile_grid(values: Float[np.ndarray, "n"], points: int = 101) -> list[float]:
    """The values below which 0, 1, .. 100% of `values` are."""
    return np.quantile(values, np.linspace(0.0, 1.0, points)).tolist()


def quantile_of(values: Float[np.ndarray, "n"], grid: list[float]) -> Float[np.ndarray, "n"]:
    """Which part of the values that made the grid is below each value, from 0 to 1; of those equal to it half
    counts.
    """
    made = np.asarray(grid)
    left, right = np.searchsorted(made, values, "left"), np.searchsorted(made, values, "right")
    below, above = np.clip(left - 1, 0, len(made) - 1), np.clip(left, 0, len(made) - 1)
    span = made[above] - made[below]
    between = below + np.divide(values - made[below], span, out=np.zeros(len(values)), where=span > 0)
    return np.where(right > left, (left + right - 1) / 2, between) / (len(made) - 1)
