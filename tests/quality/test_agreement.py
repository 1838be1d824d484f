"""Agreement against scipy and scikit-learn."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from babel_jax.config.quality import Calibration
from babel_jax.quality.agreement import quantile_grid, quantile_of, ranks, roc_auc, spearman
from babel_jax.quality.classifier import calibrated

values = st.lists(
    st.integers(-3, 3) | st.floats(-1e3, 1e3).map(lambda value: round(value, 3)), min_size=2, max_size=40
).map(lambda found: np.array(found, float))


@given(values, st.randoms())
def test_rank_correlation_is_scipys(one, random):
    stats = pytest.importorskip("scipy.stats")
    np.testing.assert_allclose(ranks(one), stats.rankdata(one))
    other = np.array([random.choice([0.0, 1.0, 2.5, value]) for value in one])
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        assert np.isnan(spearman(one, other))
    else:
        assert spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-9)


@given(values, st.randoms())
def test_area_under_the_curve_is_scikit_learns(scores, random):
    metrics = pytest.importorskip("sklearn.metrics")
    good = np.array([random.random() < 0.5 for _ in scores])
    assume(0 < good.sum() < len(good))
    assert roc_auc(scores, good) == pytest.approx(metrics.roc_auc_score(good, scores))


def test_of_one_kind_there_is_no_curve():
    assert np.isnan(roc_auc(np.arange(3.0), np.ones(3, bool)))
    assert np.isnan(roc_auc(np.arange(3.0), np.zeros(3, bool)))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=300).map(np.array), st.floats(0, 1))
def test_parts_are_between_those_below_and_those_up_to(made, value):
    part = float(quantile_of(np.array([value]), quantile_grid(made))[0])
    assert np.mean(made < value) - 0.02 <= part + 1 / len(made)
    assert part <= np.mean(made <= value) + 0.02 + 1 / len(made)


def test_equal_scores_stand_in_the_middle_of_their_span():
    made = np.array([0.0] * 50 + [1.0] * 50)
    parts = quantile_of(np.array([-1.0, 0.0, 0.5, 1.0, 2.0]), quantile_grid(made))
    np.testing.assert_allclose(parts, [0.0, 0.25, 0.5, 0.75, 1.0], atol=0.011)


def test_one_threshold_keeps_the_same_share_of_every_language_unless_told_otherwise():
    random = np.random.default_rng(0)
    raw = {"en": random.normal(0.7, 0.1, 4000), "ha": random.normal(0.3, 0.05, 4000)}
    grids = {code: quantile_grid(own[:2000]) for code, own in raw.items()}
    grids["all"] = quantile_grid(np.concatenate([own[:2000] for own in raw.values()]))
    kept = {by: {} for by in Calibration}
    for by, (code, values) in itertools.product(Calibration, raw.items()):
        kept[by][code] = float(np.mean(calibrated(values[2000:], code, grids, by) >= 0.6))
    assert kept[Calibration.LANGUAGE] == {
        "en": pytest.approx(0.4, abs=0.03),
        "ha": pytest.approx(0.4, abs=0.03),
    }
    assert kept[Calibration.ALL] == {"en": pytest.approx(0.8, abs=0.03), "ha": pytest.approx(0.0, abs=0.01)}
    assert kept[Calibration.NONE] == {"en": pytest.approx(np.mean(raw["en"][2000:] >= 0.6)), "ha": 0.0}
    # A language that nobody judged is measured by all of them.
    np.testing.assert_array_equal(
        calibrated(raw["en"], "sw", grids, Calibration.LANGUAGE),
        calibrated(raw["en"], "en", grids, Calibration.ALL),
    )
