"""Scores of single items: what they sum up to, how sure that is, and differences between two models on the
same items.

Whatever a score is (accuracy, chrF++, bits per byte), it is a function of sums over items. So all are
resampled the same way: the paired bootstrap (Efron and Tibshirani 1993; for translation Koehn 2004) draws
items with replacement, the same ones for both models.

Few items need two corrections. Items that all answer alike have no spread, though the next one might differ:
differences of accuracies are drawn with two items more, one that each model wins (Bonett and Price 2012).
Percentiles of few items are too narrow: they are expanded (Hesterberg 2015, "What Teachers Should Know about
the Bootstrap"). Both vanish with many items.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.special
from jaxtyping import Float

from babel_jax.languages import Resource, codes_of

RESAMPLES = 1_000
_DRAWN_AT_ONCE = 50
_OUTSIDE = 0.05  # the part of all intervals that may miss the true difference
Draws = Float[np.ndarray, "resamples"]


@dataclasses.dataclass(frozen=True)
class Items:
    """Of each item the columns that are summed, and the score of sums [..., columns]."""

    columns: Float[np.ndarray, "items columns"]
    score_of: Callable[[Float[np.ndarray, "*n columns"]], Float[np.ndarray, "*n"]]
    extremes: Float[np.ndarray, "2 columns"] | None = (
        None  # the best and the worst item that there can be, where there are such
    )

    @property
    def score(self) -> float:
        """The score over all items."""
        return float(self.score_of(self.columns.sum(0)))

    def resampled(self, name: str) -> Draws:
        """The scores of RESAMPLES draws; the same items are drawn wherever the name and the number of items
        are the same.
        """
        random = np.random.default_rng(zlib.crc32(name.encode()))
        number = len(self.columns)
        draws = []
        for _ in range(0, RESAMPLES, _DRAWN_AT_ONCE):
            times = random.multinomial(number, np.full(number, 1 / number), _DRAWN_AT_ONCE)
            draws.append(self.score_of(times.astype(np.float64) @ self.columns))
        return np.concatenate(draws)

    def with_extremes(self, best_first: bool) -> "Items":
        """With the best and the worst item added, or the worst and the best; as it is
        where there are none.
        """
        if self.extremes is None:
            return self
        added = self.extremes if best_first else self.extremes[::-1]
        return dataclasses.replace(self, columns=np.concatenate([self.columns, added]))


def accuracy(right: Sequence[float]) -> Items:
    """Percent of items that are right."""
    columns = np.stack([np.asarray(right, np.float64), np.ones(len(right))], 1)
    return Items(columns, lambda sums: 100 * _ratio(sums), extremes=np.array([[1.0, 1.0], [0.0, 1.0]]))


def bits_per_byte_of(bits: Sequence[float] | np.ndarray, bytes: Sequence[int]) -> Items:
    """Bits for each byte, over documents."""
    return Items(np.stack([np.asarray(bits, np.float64), np.asarray(bytes, np.float64)], 1), _ratio)


def chrf_plus_plus(references: Sequence[str], translations: Sequence[str]) -> Items:
    """chrF++ (Popović 2017) of a corpus, 0 to 100, as sacrebleu computes it: from counts of n-grams summed
    over sentences.
    """
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF(word_order=2)
    statistics = np.array(metric._extract_corpus_statistics(translations, [references]), np.float64)
    return Items(
        statistics, lambda sums: np.apply_along_axis(lambda own: metric._compute_f_score(list(own)), -1, sums)
    )


def _ratio(sums: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n"]:
    return sums[..., 0] / sums[..., 1]


# --- of tasks by language: {task: {language: [Items, ...]}}, where a score is the mean of its parts -------

Measured = Mapping[str, Mapping[str, Sequence[Items]]]


def scores_of(measured: Measured) -> dict[str, dict[str, dict[str, float | int]]]:
    """{task: {language: {score, stderr, n}}}; stderr is the deviation over the draws."""
    draws = _draws(measured)
    return {
        task: {
            code: {
                "score": float(np.mean([part.score for part in parts])),
                "stderr": float(draws[task][code].std()),
                "n": sum(len(part.columns) for part in parts),
            }
            for code, parts in by_language.items()
        }
        for task, by_language in measured.items()
    }


def means_of(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """Means over tasks of their means over languages: of all, and of each resource class; None where nothing
    was measured.
    """
    return {
        group: None if not (found := _grouped(scores, group)) else float(np.mean(found)) for group in GROUPS
    }


def differences(ours: Measured, theirs: Measured) -> dict[str, dict[str, dict[str, float | None]]]:
    """{task: {language or group: {difference, low, high, n}}} of ours against theirs, with the bounds of a
    95% interval of the paired bootstrap; under the task `all` the groups of `means_of`. `n` is the number of
    items, of several languages or tasks the smallest. `low` and `high` are None for one item whose score has
    no bounds (bits per byte, chrF++): nothing is known of its spread."""
    both = {
        task: [code for code in by_language if code in theirs.get(task, {})]
        for task, by_language in ours.items()
    }
    points = {
        task: {
            code: np.asarray(_mean_score(ours[task][code]) - _mean_score(theirs[task][code]))
            for code in codes
        }
        for task, codes in both.items()
        if codes
    }
    first, second = (
        _draws(_with_extremes(ours, best_first=True)),
        _draws(_with_extremes(theirs, best_first=False)),
    )
    draws = {
        task: {code: first[task][code] - second[task][code] for code in codes}
        for task, codes in both.items()
        if codes
    }
    counts = {
        task: {code: min(len(part.columns) for part in ours[task][code]) for code in codes}
        for task, codes in both.items()
        if codes
    }
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for task in points:
        found[task] = {
            code: _interval(points[task][code], draws[task][code], counts[task][code])
            for code in points[task]
        }
        found[task] |= _of_groups({task: points[task]}, {task: draws[task]}, {task: counts[task]})
    if len(points) > 1:
        found["all"] = _of_groups(points, draws, counts)
    return found


GROUPS = ("all", *(str(resource) for resource in Resource))


def _with_extremes(measured: Measured, best_first: bool) -> Measured:
    return {
        task: {
            code: [part.with_extremes(best_first) for part in parts] for code, parts in by_language.items()
        }
        for task, by_language in measured.items()
    }


def _of_groups(points: Mapping, draws: Mapping, counts: Mapping) -> dict[str, dict[str, float | None]]:
    """The intervals of the groups that have a language."""
    found = {}
    for group in GROUPS:
        if values := _grouped(points, group):
            fewest = min(int(np.min(number)) for number in _members(counts, group))
            found[group] = _interval(_mean(values), _mean(_grouped(draws, group)), fewest)
    return found


def _grouped(scores: Mapping[str, Mapping[str, float | Draws]], group: str) -> list:
    """For each task that has any language of the group, the mean over these."""
    return [_mean(values) for values in _members(scores, group)]


def _members(scores: Mapping[str, Mapping[str, Any]], group: str) -> list[list]:
    """For each task that has any language of the group, the values of these."""
    codes = None if group == "all" else codes_of(Resource(group))
    members = [
        [value for code, value in by_language.items() if codes is None or code in codes]
        for by_language in scores.values()
    ]
    return [values for values in members if values]


def _mean(values: Sequence) -> Draws:
    return np.mean(values, axis=0)


def _mean_score(parts: Sequence[Items]) -> float:
    return float(np.mean([part.score for part in parts]))


def _draws(measured: Measured) -> dict[str, dict[str, Draws]]:
    return {
        task: {
            # The same items in every language and direction: mostly they are one item translated, and drawn
            # apart, what they have in common would seem to average out.
            code: _mean([part.resampled(task) for part in parts])
            for code, parts in by_language.items()
        }
        for task, by_language in measured.items()
    }


def _interval(point: Draws, draws: Draws, items: int) -> dict[str, float | None]:
    if items == 1 and np.ptp(draws) == 0:
        return {"difference": float(point), "low": None, "high": None, "n": items}
    # Hesterberg's expanded percentiles: as much wider than those of many items as Student's t is, and the
    # spread of a sample is narrow.
    freedom = max(items - 1, 1)
    deviations = np.sqrt((freedom + 1) / freedom) * scipy.special.stdtrit(freedom, 1 - _OUTSIDE / 2)
    below = 100 * scipy.special.ndtr(-deviations)
    low, high = np.percentile(draws, [below, 100 - below])
    return {
        "difference": float(point),
        "low": float(min(low, point)),
        "high": float(max(high, point)),
        "n": items,
    }
