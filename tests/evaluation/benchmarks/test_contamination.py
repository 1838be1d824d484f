"""Overlap with training windows against a search in the text."""

import json
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from babel_jax.config import Config
from babel_jax.config.file import parse_settings
from babel_jax.data.tokens.sentencepiece_tokenizer import train_sentencepiece
from babel_jax.data.windows.prepare import prepare
from babel_jax.errors import BadInput
from babel_jax.evaluation.benchmarks.contamination import LENGTH, contamination, hashes

SHAPE = {
    "vocab_size": 1280,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=60))
def test_runs_have_one_hash_just_where_they_are_the_same(one, other):
    def runs(ids):
        return {tuple(ids[start : start + LENGTH]) for start in range(len(ids) - LENGTH + 1)}

    shared = np.intersect1d(*(np.unique(hashes(np.array(ids, np.uint64))) for ids in (one, other)))
    assert len(shared) == len(runs(one) & runs(other))


@pytest.fixture(scope="module")
def run(small_settings, small_prepared, small_model, tmp_path_factory):
    """A run folder as far as contamination looks into it."""
    folder = tmp_path_factory.mktemp("run")
    data = small_settings.model_dump(mode="json", exclude_none=True) | {"tokenizer": str(small_model)}
    parse_settings(Config, {"out": str(folder), "model": {"shape": SHAPE}, "data": data}, "test").save(
        folder / "config.toml"
    )
    return folder


def test_items_that_are_in_the_training_text_are_found(run, texts, small_prepared):
    inside = f"{texts['sw']} sw web 1"
    items = {"xnli": {"sw": [
        {"premise": inside, "hypothesis": "a", "label": 0},
        {"premise": "Maji haya ni baridi sana na hakuna mtu anayeyataka asubuhi hii ya leo jijini Nairobi.",
        "hypothesis": "b", "label": 1},
        {"premise": "fupi", "hypothesis": "c", "label": 1},
    ]}, "m3exam": {"zh": [{"options": ["x", texts["zh"]]}]}}  # fmt: skip
    assert contamination(run, items) == {
        "xnli": {"sw": {"items": 3, "long_enough": 2, "overlapping": 1}},
        "m3exam": {"zh": {"items": 1, "long_enough": 1, "overlapping": 1}},
    }
    assert contamination(run, {}) == {}


@pytest.mark.parametrize("windows", ["NFC", "NFD"])
def test_the_form_of_unicode_makes_no_difference(windows, texts, small_model, tmp_path, write_rows):
    """Items of all forms are found in windows of composed and of decomposed text."""
    codes = ("fr", "vi", "hi", "bn", "ur", "ko")
    text = {code: texts[code] + " " + texts[code] for code in codes}
    sources = [
        {
            "language": code,
            "path": str(
                write_rows(tmp_path / f"{code}.jsonl", [{"text": unicodedata.normalize(windows, text[code])}])
            ),
        }
        for code in codes
    ]
    data = {
        "folder": str(tmp_path / "data"),
        "seq_len": 512,
        "heldout_fraction": 0.0,
        "tokenizer": str(small_model),
        "sources": sources,
    }
    config = parse_settings(Config, {"out": str(tmp_path), "model": {"shape": SHAPE}, "data": data}, "test")
    prepare(config.data)
    config.save(tmp_path / "config.toml")
    items = {
        form: {code: [{"premise": unicodedata.normalize(form, texts[code])}] for code in codes}
        for form in ("NFC", "NFD", "NFKD")
    }
    found = contamination(tmp_path, items)
    wanted = {"items": 1, "long_enough": 1, "overlapping": 1}
    assert found == {form: dict.fromkeys(codes, wanted) for form in items}


def test_a_folder_that_is_no_run(run, texts, tmp_path):
    with pytest.raises(BadInput, match=r"not a run folder \(it has no config.toml\)"):
        contamination(tmp_path, {})
    train_sentencepiece([texts["en"]], 500, tmp_path / "other.model")
    settings = re.sub(
        "(?m)^tokenizer = .*",
        f"tokenizer = {json.dumps(str(tmp_path / 'other.model'))}",
        (run / "config.toml").read_text(),
    )
    (tmp_path / "config.toml").write_text(settings)
    with pytest.raises(BadInput, match="prepared with another tokenizer than the run's"):
        contamination(tmp_path, {})
