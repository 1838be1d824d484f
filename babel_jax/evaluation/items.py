"""Scores of single items: what they sum up to, how sure that is, and differences between two models on the same items.

Whatever a score is (accuracy, chrF++, bits per byte), it is a function of sums over items. So all are resampled the same way: the paired
bootstrap (Efron and Tibshirani 1993; for translation Koehn 2004) draws items with replacement, the same ones for both models.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from babel_jax.languages import Resource, codes_of

RESAMPLES = 1_000
_DRAWN_AT_ONCE = 50
Draws = Float[np.ndarray, "resamples"]


@dataclasses.dataclass(frozen=True)
class Items:
    """Of each item the columns that are summed, and the score of sums [..., columns]."""

    columns: Float[np.ndarray, "items columns"]
    score_of: Callable[[Float[np.ndarray, "*n columns"]], Float[np.ndarray, "*n"]]

    @property
    def score(self) -> float:
        """The score over all items."""
        return float(self.score_of(self.columns.sum(0)))

    def resampled(self, name: str) -> Draws:
        """The scores of RESAMPLES draws; the same items are drawn wherever the name is the same."""
        random = np.random.default_rng(zlib.crc32(name.encode()))
        number = len(self.columns)
        draws = []
        for _ in range(0, RESAMPLES, _DRAWN_AT_ONCE):
            times = random.multinomial(number, np.full(number, 1 / number), _DRAWN_AT_ONCE)
            draws.append(self.score_of(times.astype(np.float64) @ self.columns))
        return np.concatenate(draws)


def accuracy(right: Sequence[float]) -> Items:
    """Percent of items that are right."""
    return Items(np.stack([np.asarray(right, np.float64), np.ones(len(right))], 1), lambda sums: 100 * _ratio(sums))


def bits_per_byte_of(bits: Sequence[float] | np.ndarray, bytes: Sequence[int]) -> Items:
    """Bits for each byte, over documents."""
    return Items(np.stack([np.asarray(bits, np.float64), np.asarray(bytes, np.float64)], 1), _ratio)


def chrf_plus_plus(references: Sequence[str], translations: Sequence[str]) -> Items:
    """chrF++ (Popović 2017) of a corpus, 0 to 100, as sacrebleu computes it: from counts of n-grams summed over sentences."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF(word_order=2)
    statistics = np.array(metric._extract_corpus_statistics(translations, [references]), np.float64)
    return Items(statistics, lambda sums: np.apply_along_axis(lambda own: metric._compute_f_score(list(own)), -1, sums))


def _ratio(sums: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n"]:
    return sums[..., 0] / sums[..., 1]


# --- of tasks by language: {task: {language: [Items, ...]}}, where a score is the mean of its parts --------------------------------

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
    """Means over tasks of their means over languages: of all, and of each resource class; None where nothing was measured."""
    return {group: None if not (found := _grouped(scores, group)) else float(np.mean(found)) for group in GROUPS}


def differences(ours: Measured, theirs: Measured) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {language or group: {difference, low, high}}} of ours against theirs, with the bounds of a 95% interval of the paired
    bootstrap; under the task `all` the groups of `means_of`."""
    both = {task: [code for code in by_language if code in theirs.get(task, {})] for task, by_language in ours.items()}
    points = {
        task: {code: np.asarray(_mean_score(ours[task][code]) - _mean_score(theirs[task][code])) for code in codes}
        for task, codes in both.items()
        if codes
    }
    first, second = _draws(ours), _draws(theirs)
    draws = {task: {code: first[task][code] - second[task][code] for code in codes} for task, codes in both.items() if codes}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for task in points:
        groups = {group: ({task: points[task]}, {task: draws[task]}) for group in GROUPS}
        found[task] = {code: _interval(points[task][code], draws[task][code]) for code in points[task]}
        found[task] |= {group: _interval(*map(_mean, pair)) for group, both_of in groups.items() if (pair := _groups(both_of, group))}
    if len(points) > 1:
        found["all"] = {group: _interval(*map(_mean, pair)) for group in GROUPS if (pair := _groups((points, draws), group))}
    return found


GROUPS = ("all", *(str(resource) for resource in Resource))


def _groups(pair: tuple[Mapping, Mapping], group: str) -> list[list] | None:
    found = [_grouped(each, group) for each in pair]
    return found if found[0] else None


def _grouped(scores: Mapping[str, Mapping[str, float | Draws]], group: str) -> list:
    """For each task that has any language of the group, the mean over these."""
    codes = None if group == "all" else codes_of(Resource(group))
    members = [[value for code, value in by_language.items() if codes is None or code in codes] for by_language in scores.values()]
    return [_mean(values) for values in members if values]


def _mean(values: Sequence) -> Draws:
    return np.mean(values, axis=0)


def _mean_score(parts: Sequence[Items]) -> float:
    return float(np.mean([part.score for part in parts]))


def _draws(measured: Measured) -> dict[str, dict[str, Draws]]:
    return {
        task: {
            # The same items in every language and direction: mostly they are one item translated, and drawn apart, what they have in common
            # would seem to average out.
            code: _mean([part.resampled(task) for part in parts])
            for code, parts in by_language.items()
        }
        for task, by_language in measured.items()
    }


def _interval(point: Draws, draws: Draws) -> dict[str, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"difference": float(point), "low": float(low), "high": float(high)}
