"""Scores of items: their sums, their uncertainty, and differences between two models on the same items.

Every score here (accuracy, chrF++, bits per byte) is a function of sums over items. So all are resampled in
the same way: the paired bootstrap (Efron and Tibshirani 1993; for translation Koehn 2004) draws items with
replacement, the same items for both models.

With fewer than FEWEST_ITEMS items there is no interval. Few items need two corrections; with many items,
both vanish. If all items have the same answer, the draws have no spread, although the next item might differ.
So differences of accuracies are drawn with two more items: one that only ours wins, one that only theirs wins
(Bonett and Price 2012). And percentiles of few items are too narrow, so they are expanded (Hesterberg 2015,
"What Teachers Should Know about the Bootstrap").
"""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.special
from jaxtyping import Float

from babel_jax.languages import Resource, is_of

BITS_PER_BYTE = "bits_per_byte"  # its name in all results

RESAMPLES = 1_000
_DRAWN_AT_ONCE = 50
_OUTSIDE = 0.05  # the fraction of intervals that may miss the true difference
# An interval of the bootstrap lies within its items, so of n items it misses their median in at least
# 2 * 0.5^n of all samples: 6 items are the fewest for which this is less than _OUTSIDE.
FEWEST_ITEMS = 6
Draws = Float[np.ndarray, "resamples"]
_Sums = Float[np.ndarray, "*n columns"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A score as a function of sums [..., columns].

    - columns: the number of columns of an item
    - extremes: the best and the worst possible item; None if none are defined
    - has_bytes: True if the last column counts bytes of text
    """

    score_of: Callable[[_Sums], Float[np.ndarray, "*n"]]
    columns: int
    extremes: Float[np.ndarray, "2 columns"] | None = None
    has_bytes: bool = False


@dataclasses.dataclass(frozen=True)
class Items:
    """The columns of each item, which are summed, and the metric that scores the sums."""

    columns: Float[np.ndarray, "items columns"]
    metric: Metric

    @property
    def score(self) -> float:
        """The score over all items."""
        return float(self.metric.score_of(self.columns.sum(0)))

    def resampled(self, name: str) -> Draws:
        """The scores of RESAMPLES draws. Equal names and equal numbers of items give equal draws."""
        # Seeded by the name alone, so that two models meet the same draws: that is what "paired" means.
        random = np.random.default_rng(zlib.crc32(name.encode()))
        number = len(self.columns)
        draws = []
        for _ in range(0, RESAMPLES, _DRAWN_AT_ONCE):
            # How often each item is drawn; a product with the columns then sums them.
            times = random.multinomial(number, np.full(number, 1 / number), _DRAWN_AT_ONCE)
            draws.append(self.metric.score_of(times.astype(np.float64) @ self.columns))
        return np.concatenate(draws)

    def with_extremes(self, best_first: bool) -> "Items":
        """The items with the best and the worst possible item added (or the worst and the best); unchanged if
        there are none.
        """
        extremes = self.metric.extremes
        if extremes is None:
            return self
        added = extremes if best_first else extremes[::-1]
        return dataclasses.replace(self, columns=np.concatenate([self.columns, added]))


def _ratio(sums: _Sums) -> Float[np.ndarray, "*n"]:
    above, below = sums[..., 0], sums[..., 1]
    # A draw of documents without any byte counts as 0.
    result: Float[np.ndarray, "*n"] = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return result


def _chrf(sums: _Sums) -> Float[np.ndarray, "*n"]:
    """chrF++ of the sums of (n-grams of the translation, of the reference, of both) for each order."""
    # sacrebleu's order of counts: three numbers for each order of n-grams.
    of_translation, of_reference, of_both = (sums[..., part::3] for part in range(3))
    # Orders that one side has no n-grams of do not count.
    counts = (of_translation > 0) & (of_reference > 0)
    orders = np.maximum(counts.sum(-1), 1)
    matches = np.where(counts, of_both, 0.0)
    precision = (matches / np.maximum(of_translation, 1)).sum(-1) / orders
    recall = (matches / np.maximum(of_reference, 1)).sum(-1) / orders
    weighted = _BETA**2 * precision + recall
    score: Float[np.ndarray, "*n"] = (
        100 * (1 + _BETA**2) * precision * recall / np.where(weighted > 0, weighted, 1.0)
    )
    return score


_BETA = 2  # of chrF2: recall counts _BETA times as much as precision
ACCURACY = Metric(lambda sums: 100 * _ratio(sums), 2, extremes=np.array([[1.0, 1.0], [0.0, 1.0]]))
BITS = Metric(_ratio, 2, has_bytes=True)
CHRF = Metric(_chrf, 3 * (6 + 2))  # orders of characters and of words


def accuracy(right: Sequence[float]) -> Items:
    """Percent of items that are correct."""
    return Items(np.stack([np.asarray(right, np.float64), np.ones(len(right))], 1), ACCURACY)


def bits_per_byte_of(bits: Sequence[float] | np.ndarray, bytes: Sequence[int]) -> Items:
    """Bits per byte, over documents."""
    return Items(np.stack([np.asarray(bits, np.float64), np.asarray(bytes, np.float64)], 1), BITS)


def chrf_plus_plus(references: Sequence[str], translations: Sequence[str]) -> Items:
    """chrF++ (Popović 2017) of a corpus, 0 to 100, equal to sacrebleu's: from counts of n-grams summed over
    sentences.
    """
    from sacrebleu.metrics import chrf

    metric = chrf.CHRF(word_order=2)
    return Items(np.array(metric._extract_corpus_statistics(translations, [references]), np.float64), CHRF)


# --- Tasks by language: {task: {language: [Items, ...]}}; a score is the mean of its parts. ---------------

Measured = Mapping[str, Mapping[str, Sequence[Items]]]
# {language or group: {difference, low, high, n}}
Intervals = dict[str, dict[str, float | None]]


def scores_of(measured: Measured) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """{task: {language: {score, stderr, n}}}, for bits per byte also `bytes`.

    `stderr` is the standard deviation of the draws, corrected for few items; None for a single item.
    """
    draws = _draws(measured)
    scores: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for task, by_language in measured.items():
        scores[task] = {}
        for code, parts in by_language.items():
            # One item has no spread.
            fewest = min(len(part.columns) for part in parts)
            stderr = None
            if fewest > 1:
                stderr = float(draws[task][code].std() * np.sqrt(fewest / (fewest - 1)))
            scores[task][code] = {
                "score": _mean_score(parts),
                "stderr": stderr,
                "n": sum(len(part.columns) for part in parts),
            }
            if all(part.metric.has_bytes for part in parts):
                scores[task][code]["bytes"] = int(sum(part.columns[:, -1].sum() for part in parts))
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


GROUPS = ("all", *(str(resource) for resource in Resource))


def differences(ours: Measured, theirs: Measured) -> dict[str, Intervals]:
    """{task: {language or group: {difference, low, high, n}}} of ours minus theirs; low and high bound a 95%
    interval of the paired bootstrap.

    The task `all` has the groups of `means_of`. `n` is the number of items; for several languages or tasks,
    the smallest. `low` and `high` are None if nothing can be told: for fewer than FEWEST_ITEMS items
    without extremes (bits per byte, chrF++), and for two models with different items.
    """
    pairs = {}
    for task in ours:
        if of_task := _pairs(task, ours, theirs):
            pairs[task] = of_task
    intervals: dict[str, Intervals] = {}
    for task, of_task in pairs.items():
        intervals[task] = {code: pair.interval(np.subtract) for code, pair in of_task.items()}
        intervals[task] |= _of_groups({task: of_task}, np.subtract)
    if len(pairs) > 1:
        intervals["all"] = _of_groups(pairs, np.subtract)
    return intervals


def changes(task: str, ours: Measured, theirs: Measured) -> Intervals:
    """{language or group: {difference, low, high, n}} of ours against theirs in percent of theirs, as
    `differences`; for a group, of its means.
    """
    pairs = _pairs(task, ours, theirs)
    by_language = {code: pair.interval(_percent) for code, pair in pairs.items()}
    return {**by_language, **_of_groups({task: pairs}, _percent)}


def change_between_groups(
    task: str, ours: Measured, theirs: Measured, first: str, second: str
) -> dict[str, float | None] | None:
    """The change (see `changes`) of group `first` minus that of group `second`, in percent points; None if
    a group has no language.
    """
    pairs = {task: _pairs(task, ours, theirs)}
    one, other = _pair_of_group(pairs, first), _pair_of_group(pairs, second)
    if one is None or other is None:
        return None
    # The two groups take the places of ours and theirs.
    between = _Pair(
        np.stack([_percent(*one.scores), _percent(*other.scores)]),
        np.stack([_percent(*one.draws), _percent(*other.draws)]),
        min(one.items, other.items),
        one.is_enough and other.is_enough,
    )
    return between.interval(np.subtract)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Ours and theirs.

    - scores: [2]; draws: [2, resamples]
    - items: their number
    - is_enough: False if there are too few of them, or if they are not the same items
    """

    scores: Float[np.ndarray, "2"]
    draws: Float[np.ndarray, "2 resamples"]
    items: int
    is_enough: bool

    def interval(self, between: Callable[[Any, Any], Any]) -> dict[str, float | None]:
        """The interval of a function of two scores."""
        point, draws = between(*self.scores), between(*self.draws)
        result = {"difference": float(point), "low": None, "high": None, "n": self.items}
        if not self.is_enough:
            return result

        # Hesterberg's expanded percentiles: wider by the ratio of Student's t to the normal distribution, and
        # by the factor by which a sample underestimates the spread.
        freedom = max(self.items - 1, 1)
        deviations = np.sqrt((freedom + 1) / freedom) * scipy.special.stdtrit(freedom, 1 - _OUTSIDE / 2)
        below = 100 * scipy.special.ndtr(-deviations)
        low, high = np.percentile(draws, [below, 100 - below])
        return {**result, "low": float(min(low, point)), "high": float(max(high, point))}


def _percent(ours: Any, theirs: Any) -> Any:
    # A draw in which the other model's score is 0 counts as no change.
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return 100 * (np.divide(ours, theirs, out=np.ones_like(ours), where=theirs > 0) - 1)


def _pairs(task: str, ours: Measured, theirs: Measured) -> dict[str, _Pair]:
    """The languages of a task that both models have."""
    our_task, their_task = ours.get(task, {}), theirs.get(task, {})
    # Only languages that both were scored on can be compared.
    codes = [code for code in our_task if code in their_task]
    # Of the two items that are added, ours wins the first and theirs the second.
    our_draws = _draws(_with_extremes({task: our_task}, best_first=True))
    their_draws = _draws(_with_extremes({task: their_task}, best_first=False))
    pairs = {}
    for code in codes:
        our_parts, their_parts = our_task[code], their_task[code]
        sizes = [len(part.columns) for part in our_parts]
        # Items are not stored with their text; other numbers of them are all that can be seen here.
        is_same = sizes == [len(part.columns) for part in their_parts]
        has_extremes = all(part.metric.extremes is not None for part in our_parts)
        pairs[code] = _Pair(
            np.array([_mean_score(our_parts), _mean_score(their_parts)]),
            np.stack([our_draws[task][code], their_draws[task][code]]),
            min(sizes),
            is_same and (has_extremes or min(sizes) >= FEWEST_ITEMS),
        )
    return pairs


def _with_extremes(measured: Measured, best_first: bool) -> Measured:
    extended: dict[str, dict[str, list[Items]]] = {}
    for task, by_language in measured.items():
        extended[task] = {}
        for code, parts in by_language.items():
            extended[task][code] = [part.with_extremes(best_first) for part in parts]
    return extended


def _of_groups(
    pairs: Mapping[str, Mapping[str, _Pair]], between: Callable[[Any, Any], Any]
) -> dict[str, dict[str, float | None]]:
    """The intervals of the groups that have a language."""
    intervals = {}
    for group in GROUPS:
        if (pair := _pair_of_group(pairs, group)) is not None:
            intervals[group] = pair.interval(between)
    return intervals


def _pair_of_group(pairs: Mapping[str, Mapping[str, _Pair]], group: str) -> _Pair | None:
    """The means of a group over its languages, then over tasks; None if the group has no language."""
    # An interval of a mean needs enough items in each of its languages.
    members = list(itertools.chain.from_iterable(_members(pairs, group)))
    if not members:
        return None
    scores, draws = [], []
    for of_task in _members(pairs, group):
        scores.append(_mean([pair.scores for pair in of_task]))
        draws.append(_mean([pair.draws for pair in of_task]))
    return _Pair(
        _mean(scores),
        _mean(draws),
        min(pair.items for pair in members),
        all(pair.is_enough for pair in members),
    )


def _grouped(scores: Mapping[str, Mapping[str, Any]], group: str) -> list[Any]:
    """For each task that has a language of the group, the mean over these languages."""
    return [_mean(values) for values in _members(scores, group)]


def _members(scores: Mapping[str, Mapping[str, Any]], group: str) -> list[list[Any]]:
    """For each task that has a language of the group, the values of these languages."""
    members = []
    for by_language in scores.values():
        values = [value for code, value in by_language.items() if _is_in(code, group)]
        if values:
            members.append(values)
    return members


def _is_in(code: str, group: str) -> bool:
    return group == "all" or is_of(code, Resource(group))


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
