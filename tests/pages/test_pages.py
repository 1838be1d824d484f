"""The pages of studies and of an evaluation: well formed, alone, and with the figures that were computed."""

import html.parser
import re

import numpy as np
import pytest

from babel_jax.evaluation.benchmarks.page import evaluation_page
from babel_jax.pages.document import Section, page_text
from babel_jax.studies.ablation_report import write_ablation
from babel_jax.studies.sensitivity import Sensitivity
from babel_jax.studies.sensitivity_page import sensitivity_page


class Page(html.parser.HTMLParser):
    """Fails on tags that do not match; `rows` has the cells of each row of the tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.classes, self.tags = [], [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []
        assert not {"script", "img", "iframe"} & self.tags
        assert not re.search(r'(?:src|href)="(?!#|data:)', text)
        assert "prefers-color-scheme: dark" in text
        assert 'name="viewport"' in text

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
            self.classes.append(dict(attributes).get("class", ""))
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open[-2:]):
            self.rows[-1][-1] += data


def test_the_page_of_a_sensitivity():
    whole = {"en": 1.0, "sw": 2.0, "ha": 2.0}
    worse = [{code: value * factor for code, value in whole.items()} for factor in (1.5, 40.0)]
    result = Sensitivity(whole, [dict.fromkeys(whole, 0.9), dict.fromkeys(whole, 0.5)], worse, worse[::-1])
    page = Page(sensitivity_page("SmolLM2 <135M>", result))
    heads = ["Layer", "2 low-resource languages", "all 3 languages"]
    assert heads in page.rows
    # A few languages have a column each.
    assert page.rows.count([*heads, "English", "Swahili", "Hausa"]) == 2
    assert ["1", "0.500", "0.500"] in page.rows
    assert ["1", *["+3900.0%"] * 5] in page.rows
    one = Page(sensitivity_page("m", Sensitivity({"sw": 1.0}, [{"sw": 0.9}], [{"sw": 2.0}], [{"sw": 1.1}])))
    assert ["Layer", "Swahili"] in one.rows


@pytest.mark.parametrize("is_trained", [True, False])
def test_the_page_of_an_ablation(tmp_path, is_trained):
    results = []
    for seed, value in enumerate((1.1, 1.3)):
        result = {"variant": "among:copy", "seed": seed, "before": {"en": value, "sw": value}}
        if is_trained:
            result["after"] = {"en": 0.9, "sw": 0.9}
        results.append(result)
    base = {"en": 1.0, "sw": 1.0}
    study = {"model": "m", "new_layers": 2, "tokens": 10_000, "base": base, "results": results}
    write_ablation(tmp_path, study, 8)
    page = Page((tmp_path / "ablation.html").read_text(encoding="utf-8"))
    spread = np.std([1.1, 1.3], ddof=1)
    after = ["0.900 ± 0.000", "-10.0%"] if is_trained else []
    assert ["among:copy", f"1.200 ± {spread:.3f}", "+20.0%", *after] in page.rows
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_of_an_evaluation():
    scores = {
        "ours": {"xnli": {"en": {"score": 40.0, "n": 10}, "sw": {"score": 50.0, "n": 9}}},
        "theirs": {"xnli": {"en": {"score": 60.0, "n": 10}, "sw": {"score": 40.0, "n": 9}}},
    }
    changes = {
        "en": {"difference": -20.0, "low": -30.0, "high": -10.0},
        "sw": {"difference": 10.0, "low": None, "high": None},
    }
    page = Page(evaluation_page(scores, {"theirs": {"xnli": changes}}))
    assert page.rows[0] == ["Language", "Against theirs [95%]", "ours", "theirs", "Items"]
    english, swahili = (
        ["English", "-20.0 [-30.0, -10.0]", "40.0", "60.0", "10"],
        ["Swahili", "+10.0 [?]", "50.0"],
    )
    assert page.classes[page.rows.index(english)] == "bad"
    assert any(row[:3] == swahili for row in page.rows)


def test_names_of_strangers_are_text():
    text = page_text(
        "kicker", "<script>alert(1)</script>", ["<b>fact</b>"], [Section("a", "<i>")], refresh=30
    )
    Page(text)
    assert '<meta http-equiv="refresh" content="30">' in text
    assert "refresh" not in page_text("kicker", "name", [], [])
