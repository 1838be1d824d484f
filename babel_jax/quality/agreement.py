"""The agreement of scores with a judge's."""

import numpy as np
from jaxtyping import Bool, Float


def ranks(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Ranks from 1; equal values share the mean of their ranks."""
    # `last` is the highest rank of each value's run of equal values; half of the run is taken off for the
    # mean.
    _, indices, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[indices]


def spearman(left: Float[np.ndarray, "n"], right: Float[np.ndarray, "n"]) -> float:
    """Spearman's rank correlation; NaN if one side has only equal values."""
    if len(left) < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return float("nan")
    return float(np.corrcoef(ranks(left), ranks(right))[0, 1])


def roc_auc(scores: Float[np.ndarray, "n"], good: Bool[np.ndarray, "n"]) -> float:
    """The probability that a good text has a higher score than a bad one; ties count half (Mann and Whitney).
    NaN if all are good or all are bad.
    """
    number = int(good.sum())
    if number in (0, len(good)):
        return float("nan")
    return float((ranks(scores)[good].sum() - number * (number + 1) / 2) / (number * (len(good) - number)))


def quantile_grid(values: Float[np.ndarray, "n"], points: int = 101) -> list[float]:
    """The values below which 0, 1, .. 100% of `values` are."""
    result: list[float] = np.quantile(values, np.linspace(0.0, 1.0, points)).tolist()
    return result


def quantile_of(values: Float[np.ndarray, "n"], grid: list[float]) -> Float[np.ndarray, "n"]:
    """For each value, the fraction (0 to 1) of lower values among the values that the grid was made from.
    Equal values count half.
    """
    # Between two points of the grid the fraction is interpolated; `right > left` means a value on a point.
    grid_values = np.asarray(grid)
    left, right = np.searchsorted(grid_values, values, "left"), np.searchsorted(grid_values, values, "right")
    below, above = np.clip(left - 1, 0, len(grid_values) - 1), np.clip(left, 0, len(grid_values) - 1)
    span = grid_values[above] - grid_values[below]
    between = below + np.divide(values - grid_values[below], span, out=np.zeros(len(values)), where=span > 0)
    return np.where(right > left, (left + right - 1) / 2, between) / (len(grid_values) - 1)
