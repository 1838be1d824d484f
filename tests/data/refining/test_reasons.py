"""Reasons of cleaning in words, and what examples of dropped text hold."""

import json

import pytest

from babel_jax.config import CleaningSettings, DataSettings, Rule, Source
from babel_jax.data.refining.cleaning import Cleaner
from babel_jax.data.refining.reasons import dropped_in_words, losses, reason
from babel_jax.data.sources.embedded import embedded_corpus
from babel_jax.data.windows.prepare import prepare


@pytest.mark.parametrize("rule", list(Rule))
def test_every_rule_has_words_with_settings_that_exist(rule):
    words = reason(rule, None)
    assert words != str(rule)
    settings = CleaningSettings().model_dump(mode="json")
    if rule is not Rule.PLACEHOLDER:
        _, _, shown = words.partition(": ")
        names = [part.split(" = ")[0] for part in shown.replace(", ", "\n").split("\n") if " = " in part]
        assert names
        assert set(names) <= set(settings)


def test_the_setting_is_the_one_that_decides():
    """The rule in words has the setting whose change lets the document pass."""
    text = "Watu wote wamezaliwa huru."
    for value, is_dropped in ((100, True), (5, False)):
        settings = CleaningSettings(min_characters=value, off=(Rule.LANGUAGE,))
        _, rule = Cleaner(settings, "sw")(text)
        assert (rule is Rule.CHARACTERS) == is_dropped
    assert reason("characters", {"min_characters": 7}) == "too short: min_characters = 7"


def test_counts_in_words_and_losses():
    words = dropped_in_words({"digits": 2, "characters": 5133, "words": 0}, {"min_characters": 100})
    assert words == "5,133 too short: min_characters = 100; 2 too many digits: max_digit_fraction = 0.3"
    sources = {
        "half": {"documents": 10, "dropped": {"digits": 5}},
        "more": {"documents": 10, "dropped": {"digits": 4, "evaluation": 2}},
    }
    assert losses(sources, None) == [
        "more: cleaning dropped 6 of 10 documents (60%): 4 too many digits: max_digit_fraction = 0.3; 2 has "
        "text of an evaluation item: [data.decontamination]"
    ]


def test_examples_are_few_short_and_without_personal_data(small_model, write_rows, tmp_path, caplog):
    """More than half is dropped: a warning says why; examples are the first three, masked."""
    rows = []
    for number in range(60):
        rows.append({"id": f"short-{number}", "text": f"{number}: juma@example.org", "kind": "web"})
    rows.append({"id": "digits", "text": "0123456789 " * 100, "kind": "web"})
    kept = [{"id": row.id, "text": row.text, "kind": row.kind} for row in embedded_corpus()["sw"]]
    path = write_rows(tmp_path / "sw.jsonl", [*rows, *kept])
    source = Source(language="sw", path=str(path), name="crawl")
    settings = DataSettings(
        folder=str(tmp_path / "data"),
        seq_len=64,
        heldout_fraction=0.2,
        sources=(source,),
        cleaning=CleaningSettings(off=(Rule.LANGUAGE,)),
    )
    prepare(settings, small_model)
    report = json.loads((tmp_path / "data" / "prepared.json").read_text())
    crawl = report["languages"]["sw"]["cleaning"]["crawl"]
    assert crawl["examples"]["characters"] == ["0: [email]", "1: [email]", "2: [email]"]
    assert [len(text) for text in crawl["examples"]["digits"]] == [240]
    assert crawl["masked"] == {}
    assert "sw: more than half of a source is lost: crawl: cleaning dropped 61 of " in caplog.text
    assert "60 too short: min_characters = 100; 1 too many digits: max_digit_fraction = 0.3" in caplog.text
