"""`babel demo --corpus FOLDER` with the languages that a folder has."""

import pytest

from babel_jax.config.file import shipped_config


@pytest.mark.parametrize("name", ["tiny-base.toml", "tiny.toml", "tiny-from-base.toml"])
@pytest.mark.parametrize("languages", [("en", "sw"), ("sw", "ha"), ("my",), ("en", "zh", "de")])
def test_a_corpus_of_few_languages_takes_its_part_of_the_mixtures(tmp_path, name, languages):
    sources = [{"language": code, "path": str(tmp_path / f"{code}.jsonl")} for code in languages]
    made = {"data": {"folder": str(tmp_path / "data"), "tokenizer": "x", "sources": sources}}
    if name != "tiny-base.toml":
        made["model"] = {"folder": "base"}
    config = shipped_config(name, made, languages=set(languages))
    for stage in config.stages:
        named = {*stage.mixture.languages, *stage.mixture.weights, *stage.mixture.curated_languages}
        assert named <= set(languages)
