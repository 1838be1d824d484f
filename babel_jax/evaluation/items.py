"""Scores of items: their sums, their uncertainty, and differences between two models on the same items.

Every score here (accuracy, chrF++, bits per byte) is a function of sums over items. So all are resampled in
the same way: the paired bootstrap (Efron and Tibshirani 1993; for translation Koehn 2004) draws items with
replacement, the same items for both models.

Few items need two corrections; with many items, both vanish. If all items have the same answer, the draws
have no spread, although the next item might differ. So differences of accuracies are drawn with two more
items: one that only ours wins, one that only theirs wins (Bonett and Price 2012). And percentiles of few
items are too narrow, so they are expanded (Hesterberg 2015, "What Teachers Should Know about the Bootstrap").
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.special
from jaxtyping import Float

from babel_jax.languages import Resource, codes_of

BITS_PER_BYTE = "bits_per_byte"  # its name in all results

RESAMPLES = 1_000
_DRAWN_AT_ONCE = 50
_OUTSIDE = 0.05  # the fraction of intervals that may miss the true difference
Draws = Float[np.ndarray, "resamples"]


@dataclasses.dataclass(frozen=True)
class Items:
    """The columns of each item, which are summed, and the score of sums [..., columns].

    extremes: the best and the worst possible item; None if none are defined.
    """

    columns: Float[np.ndarray, "items columns"]
    score_of: Callable[[Float[np.ndarray, "*n columns"]], Float[np.ndarray, "*n"]]
    extremes: Float[np.ndarray, "2 columns"] | None = None

    @property
    def score(self) -> float:
        """The score over all items."""
        return float(self.score_of(self.columns.sum(0)))

    def resampled(self, name: str) -> Draws:
        """The scores of RESAMPLES draws. Equal names and equal numbers of items give equal draws."""
        random = np.random.default_rng(zlib.crc32(name.encode()))
        number = len(self.columns)
        draws = []
        for _ in range(0, RESAMPLES, _DRAWN_AT_ONCE):
            times = random.multinomial(number, np.full(number, 1 / number), _DRAWN_AT_ONCE)
            draws.append(self.score_of(times.astype(np.float64) @ self.columns))
        return np.concatenate(draws)

    def with_extremes(self, best_first: bool) -> "Items":
        """The items with the best and the worst possible item added (or the worst and the best); unchanged if
        there are none.
        """
        if self.extremes is None:
            return self
        added = self.extremes if best_first else self.extremes[::-1]
        return dataclasses.replace(self, columns=np.concatenate([self.columns, added]))


def accuracy(right: Sequence[float]) -> Items:
    """Percent of items that are correct."""
    columns = np.stack([np.asarray(right, np.float64), np.ones(len(right))], 1)
    return Items(columns, lambda sums: 100 * _ratio(sums), extremes=np.array([[1.0, 1.0], [0.0, 1.0]]))


def bits_per_byte_of(bits: Sequence[float] | np.ndarray, bytes: Sequence[int]) -> Items:
    """Bits per byte, over documents."""
    return Items(np.stack([np.asarray(bits, np.float64), np.asarray(bytes, np.float64)], 1), _ratio)


def chrf_plus_plus(references: Sequence[str], translations: Sequence[str]) -> Items:
    """chrF++ (Popović 2017) of a corpus, 0 to 100, equal to sacrebleu's: from counts of n-grams summed over
    sentences.
    """
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF(word_order=2)
    statistics = np.array(metric._extract_corpus_statistics(translations, [references]), np.float64)

    def score_of(sums: Float[np.ndarray, "*n columns"]) -> Float[np.ndarray, "*n"]:
        return np.apply_along_axis(lambda counts: metric._compute_f_score(list(counts)), -1, sums)

    return Items(statistics, score_of)


def _ratio(sums: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n"]:
    result: Float[np.ndarray, "*n"] = sums[..., 0] / sums[..., 1]
    return result


# --- Tasks by language: {task: {language: [Items, ...]}}; a score is the mean of its parts. ---------------

Measured = Mapping[str, Mapping[str, Sequence[Items]]]


def scores_of(measured: Measured) -> dict[str, dict[str, dict[str, float | int]]]:
    """{task: {language: {score, stderr, n}}}; stderr is the standard deviation of the draws."""
    draws = _draws(measured)
    scores: dict[str, dict[str, dict[str, float | int]]] = {}
    for task, by_language in measured.items():
        scores[task] = {}
        for code, parts in by_language.items():
            scores[task][code] = {
                "score": _mean_score(parts),
                "stderr": float(draws[task][code].std()),
                "n": sum(len(part.columns) for part in parts),
            }
    return scores


def means_of(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """The mean over tasks of their means over languages, for all languages and each resource class; None if a
    group has no score.
    """
    means: dict[str, float | None] = {}
    for group in GROUPS:
        task_means = _grouped(scores, group)
        means[group] = float(np.mean(task_means)) if task_means else None
    return means


def differences(ours: Measured, theirs: Measured) -> dict[str, dict[str, dict[str, float | None]]]:
    """{task: {language or group: {difference, low, high, n}}} of ours minus theirs; low and high bound a 95%
    interval of the paired bootstrap.

    The task `all` has the groups of `means_of`. `n` is the number of items; for several languages or tasks,
    the smallest. `low` and `high` are None for a single item without extremes (bits per byte,
    chrF++): its spread is unknown.
    """
    our_draws = _draws(_with_extremes(ours, best_first=True))
    their_draws = _draws(_with_extremes(theirs, best_first=False))

    # The difference, its draws and the number of items, of each task and language that both have.
    points: dict[str, dict[str, Draws]] = {}
    draws: dict[str, dict[str, Draws]] = {}
    counts: dict[str, dict[str, int]] = {}
    for task, by_language in ours.items():
        codes = [code for code in by_language if code in theirs.get(task, {})]
        if not codes:
            continue
        points[task], draws[task], counts[task] = {}, {}, {}
        for code in codes:
            difference = _mean_score(ours[task][code]) - _mean_score(theirs[task][code])
            points[task][code] = np.asarray(difference)
            draws[task][code] = our_draws[task][code] - their_draws[task][code]
            counts[task][code] = min(len(part.columns) for part in ours[task][code])

    intervals: dict[str, dict[str, dict[str, float | None]]] = {}
    for task, of_task in points.items():
        intervals[task] = {}
        for code, point in of_task.items():
            intervals[task][code] = _interval(point, draws[task][code], counts[task][code])
        intervals[task] |= _of_groups({task: of_task}, {task: draws[task]}, {task: counts[task]})
    if len(points) > 1:
        intervals["all"] = _of_groups(points, draws, counts)
    return intervals


GROUPS = ("all", *(str(resource) for resource in Resource))


def _with_extremes(measured: Measured, best_first: bool) -> Measured:
    extended: dict[str, dict[str, list[Items]]] = {}
    for task, by_language in measured.items():
        extended[task] = {}
        for code, parts in by_language.items():
            extended[task][code] = [part.with_extremes(best_first) for part in parts]
    return extended


def _of_groups(
    points: Mapping[str, Any], draws: Mapping[str, Any], counts: Mapping[str, Any]
) -> dict[str, dict[str, float | None]]:
    """The intervals of the groups that have a language."""
    intervals = {}
    for group in GROUPS:
        if values := _grouped(points, group):
            fewest = min(int(np.min(number)) for number in _members(counts, group))
            intervals[group] = _interval(_mean(values), _mean(_grouped(draws, group)), fewest)
    return intervals


def _grouped(scores: Mapping[str, Mapping[str, float | Draws]], group: str) -> list[Any]:
    """For each task that has a language of the group, the mean over these languages."""
    return [_mean(values) for values in _members(scores, group)]


def _members(scores: Mapping[str, Mapping[str, Any]], group: str) -> list[list[Any]]:
    """For each task that has a language of the group, the values of these languages."""
    codes = None if group == "all" else codes_of(Resource(group))
    members = []
    for by_language in scores.values():
        values = [value for code, value in by_language.items() if codes is None or code in codes]
        if values:
            members.append(values)
    return members


def _mean(values: Sequence[Any]) -> Draws:
    result: Draws = np.mean(values, axis=0)
    return result


def _mean_score(parts: Sequence[Items]) -> float:
    return float(np.mean([part.score for part in parts]))


def _draws(measured: Measured) -> dict[str, dict[str, Draws]]:
    # The same items are drawn in every language and direction, because most are translations of one item.
    # With separate draws, their common difficulty would seem to average out.
    draws: dict[str, dict[str, Draws]] = {}
    for task, by_language in measured.items():
        draws[task] = {}
        for code, parts in by_language.items():
            draws[task][code] = _mean([part.resampled(task) for part in parts])
    return draws


def _interval(point: Draws, draws: Draws, items: int) -> dict[str, float | None]:
    if items == 1 and np.ptp(draws) == 0:
        return {"difference": float(point), "low": None, "high": None, "n": items}

    # Hesterberg's expanded percentiles: wider by the ratio of Student's t to the normal distribution, and by
    # the factor by which a sample underestimates the spread.
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
