"""Means, tables and claims of bits per byte."""

import json

import numpy as np
import pytest

from babel_jax.errors import BadInput
from babel_jax.evaluation.bits_per_byte import class_means
from babel_jax.evaluation.items import bits_per_byte_of
from babel_jax.evaluation.points import read_items, read_points, results_of, write_point
from babel_jax.evaluation.tables import findings, plot_points, points_table, suite_table


def measured(scores, documents=20, spread=0.0):
    """Documents of 100 bytes with these bits per byte by language; `spread` moves them, the same in every
    point.
    """
    by_language = {}
    for code, score in scores.items():
        bits = 100 * score * (1 + spread * np.linspace(-1, 1, documents))
        by_language[code] = [bits_per_byte_of(bits, [100] * documents)]
    return {"bits_per_byte": by_language}


def points(**scores):
    items = {name: measured(of_point) for name, of_point in scores.items()}
    return {name: results_of(of_point) for name, of_point in items.items()}, items


def test_nothing_is_claimed_of_nothing():
    assert findings({"base": {}, "expanded": {}, "recovered": {}}, {}) == []


def test_means_and_table():
    values = {"en": 1.0, "zh": 2.0, "sw": 6.0}
    assert class_means(values) == {"all": 3.0, "high": 1.5, "low": 6.0}
    results, items = points(base=values, continued={"en": 1.1, "zh": 2.0, "sw": 3.0})
    table = points_table(results, items)
    assert "| Swahili (sw) | low | 6.000 | 3.000 | -50.0% [-50.0, -50.0] | 20 | 2,000 |" in table
    assert "| **mean of 2 high-resource languages** | | 1.500 | 1.550 | +3.3%" in table
    assert "| **mean of all 3 languages** |" in table
    # A mean of one language is no mean.
    assert "1 low-resource" not in table


def test_a_change_without_enough_text_says_so():
    items = {"base": measured({"sw": 2.0}, 5), "continued": measured({"sw": 1.0}, 5)}
    results = {name: results_of(of_point) for name, of_point in items.items()}
    table = points_table(results, items)
    assert "| 2.000 | 1.000 | -50.0% [?] | 5 | 500 |" in table
    assert table.endswith("[?]: not enough text to tell; an interval needs 6 documents that were scored.")
    assert "mean of" not in table


@pytest.fixture
def four():
    return {
        "base": {"en": 1.0, "zh": 1.0, "sw": 3.0, "ha": 3.0},
        "expanded": {"en": 1.01, "zh": 1.01, "sw": 3.01, "ha": 3.01},
        "recovered": {"en": 0.9, "zh": 0.9, "sw": 2.0, "ha": 2.0},
        "continued": {"en": 0.9, "zh": 1.1, "sw": 1.0, "ha": 1.0},
    }


def test_claims_with_intervals(four):
    lines = findings(*points(**four))
    verdicts = [line.removeprefix("- ").split(":")[0] for line in lines]
    assert verdicts == ["shown", "shown", "shown", "shown", "NOT shown"]
    assert lines[0] == (
        "- shown: Expansion costs less than 5% bits per byte over all 4 languages: +0.5% [+0.5, +0.5]."
    )
    assert lines[2].endswith("their change minus that of high-resource ones: -66.7% [-66.7, -66.7].")
    assert lines[4] == "- NOT shown: No language ends worse than it began: Chinese +10.0% [+10.0, +10.0]."


def test_a_claim_needs_its_whole_interval(four):
    """Recovery is better in the mean, and worse in many documents."""
    bits = np.array([80.0] * 14 + [125.0] * 6)
    items = {name: measured(scores) for name, scores in four.items()}
    for code in ("en", "zh"):
        items["recovered"]["bits_per_byte"][code] = [bits_per_byte_of(bits, [100] * 20)]
    results = {name: results_of(of_point) for name, of_point in items.items()}
    line = findings(results, items)[1]
    assert line.startswith("- NOT shown: Recovery wins it back")
    assert "-6.5% [-1" in line
    assert ", +" in line


def test_claims_without_enough_text(four):
    items = {name: measured(scores, 2) for name, scores in four.items()}
    results = {name: results_of(of_point) for name, of_point in items.items()}
    for of_items in (items, {}):
        lines = findings(results, of_items)
        assert len(lines) == 5
        assert all(line.startswith("- not enough text to tell: ") for line in lines)
    assert "+0.5% [not enough text to tell]" in lines[0]


def test_the_items_of_a_point_are_read_back(tmp_path):
    written = measured({"sw": 2.0}, 7, 0.1)
    write_point(tmp_path, "base", written)
    assert read_points(tmp_path, ["base", "expanded"]) == {"base": results_of(written)}
    read = read_items(tmp_path, ["base", "expanded"])
    assert list(read) == ["base"]
    (items,) = read["base"]["bits_per_byte"]["sw"]
    np.testing.assert_allclose(items.columns, written["bits_per_byte"]["sw"][0].columns, atol=1e-3)
    assert items.score == pytest.approx(2.0, abs=1e-5)


@pytest.mark.parametrize("columns", [[[1.0]], [[1.0, 2.0], [1.0]], [[1.0, 0.0]], [[float("nan"), 2.0]], []])
def test_damaged_items_are_one_line(tmp_path, columns):
    write_point(tmp_path, "base", measured({"sw": 2.0}, 7))
    path = tmp_path / "evaluation" / "items" / "base.json"
    path.write_text(json.dumps({"bits_per_byte": {"sw": columns}}))
    with pytest.raises(BadInput, match=r"base\.json"):
        read_items(tmp_path, ["base"])


def test_the_suite_s_means_say_of_how_many_languages_they_are():
    result = {"score": 50.0, "stderr": 1.0, "n": 4}
    three = suite_table({"base": {"cloze": dict.fromkeys(("en", "sw", "ha"), result)}})
    assert "| cloze, accuracy % (chance 25) | 2 low-resource languages | 8 | 50.0 |" in three
    assert "| cloze, accuracy % (chance 25) | all 3 languages | 12 | 50.0 |" in three
    assert not any("high-resource" in line for line in three)
    one = suite_table({"base": {"cloze": {"sw": result}}})
    assert "| cloze, accuracy % (chance 25) | Swahili | 4 | 50.0 |" in one


def test_the_plot_is_a_picture(tmp_path):
    plot_points(
        tmp_path / "plot.png",
        {"base": {"en": 1.0}, "expanded": {"en": 1.1}},
        {"recovery": [(0, 3.0), (1, 2.5)]},
    )
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_means_are_over_languages_that_all_points_have():
    """A run got Nepali after its base was measured: the mean falls as Swahili and English do."""

    def point(**scores):
        return {"bits_per_byte": {code: {"score": score, "n": 9} for code, score in scores.items()}}

    points = {"base": point(en=4.0, sw=6.0), "continued": point(en=3.0, sw=5.0, ne=1.0)}
    table = points_table(points, {})
    assert "| **mean of all 2 languages** | | 5.000 | 4.000 | -20.0%" in table
    assert "Nepali" in table
    assert "Means are over the languages that all points have." in table
