"""Means and tables of bits per byte."""

from babel_jax.evaluation.bits_per_byte import class_means
from babel_jax.evaluation.tables import findings, plot_points, points_table


def test_nothing_is_claimed_of_nothing():
    assert findings({"base": {}, "expanded": {}, "recovered": {}}) == []


def test_means_and_table():
    values = {"en": 1.0, "zh": 2.0, "sw": 6.0}
    assert class_means(values) == {"all": 3.0, "high": 1.5, "low": 6.0}
    table = points_table({"base": values, "continued": {"en": 1.1, "zh": 2.0, "sw": 3.0}})
    assert "| Swahili (sw) | low | 6.000 | 3.000 | -50.0% |" in table
    assert "| **mean, high-resource** |  | 1.500 | 1.550 | +3.3% |" in table


def test_the_plot_is_a_picture(tmp_path):
    plot_points(
        tmp_path / "plot.png",
        {"base": {"en": 1.0}, "expanded": {"en": 1.1}},
        {"recovery": [(0, 3.0), (1, 2.5)]},
    )
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
