"""The identification of languages: by a model in fastText's format, by py3langid, or by the source's label.

small-lid.bin was trained by fastText 0.9.2 on sentences of the embedded corpus, with labels in the forms that
GlotLID and FineWeb-2 use: swh_Latn, hau_Latn, cmn_Hani, eng_Latn, and both fas_Arab and pes_Arab.
"""

import json
from pathlib import Path

import pytest

from babel_jax.config import DataSettings
from babel_jax.config.file import parse_settings
from babel_jax.data.refining.identification import (
    BY_SOURCE,
    identified_by,
    language_probabilities,
    probability_of,
)
from babel_jax.data.windows.prepare import prepare
from babel_jax.errors import BadInput
from babel_jax.languages import BABEL

MODEL = str(Path(__file__).parent / "small-lid.bin")
SWAHILI = "Watoto wanacheza mpira uwanjani leo asubuhi, na mama yao anapika chakula nyumbani."
WORDS = ("moja", "mbili", "tatu", "nne", "tano", "sita", "saba")
PERSIAN = "امروز هوا خوب است و بچه‌ها در پارک بازی می‌کنند."


@pytest.fixture
def fasttext():
    return pytest.importorskip("fasttext", reason="pip install 'babel-jax[lid]'")


def test_what_decides_is_said(fasttext):
    assert identified_by("sw", MODEL) == "small-lid.bin"
    assert identified_by("zh", MODEL) == "small-lid.bin"  # cmn_Hani
    assert identified_by("yo", MODEL) == BY_SOURCE
    assert identified_by("yo", None) == identified_by("ne", None) == "py3langid"
    assert identified_by("ckb", None) == BY_SOURCE
    assert probability_of(SWAHILI, "yo", MODEL) is None
    assert probability_of(SWAHILI, "ckb") is None


def test_a_model_in_fasttexts_format_is_read(fasttext):
    assert probability_of(SWAHILI, "sw", MODEL) > 0.9
    assert probability_of(SWAHILI, "ha", MODEL) < 0.1
    # Both labels of Persian together; a line end ends a text for fastText, but not for us.
    labels, values = fasttext.load_model(MODEL).predict(PERSIAN, k=-1, threshold=0.0)
    of_label = dict(zip(labels, values, strict=True))
    both = of_label["__label__fas_Arab"] + of_label["__label__pes_Arab"]
    assert probability_of(PERSIAN, "fa", MODEL) == pytest.approx(both, abs=1e-5)
    assert probability_of(f"{PERSIAN}\n{SWAHILI * 3}", "sw", MODEL) > 0.1


def test_py3langid_compares_a_language_with_babels():
    amharic = "ዛሬ አየሩ ጥሩ ነው፤ ልጆቹም በመናፈሻው ውስጥ ይጫወታሉ።"
    assert probability_of(amharic, "am") > 0.9
    assert probability_of(SWAHILI, "am") < 0.1
    assert set(language_probabilities(amharic, "am")) == {*BABEL, "am"}
    assert set(language_probabilities(SWAHILI, "sw")) == set(BABEL)


@pytest.mark.parametrize("content", [b"", b"no model", b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_model_is_refused(fasttext, tmp_path, content):
    path = tmp_path / "lid.bin"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="lid.bin is no model in fastText's format"):
        probability_of(SWAHILI, "sw", str(path))


def settings_of(tmp_path, tokenizer, **cleaning):
    lines = [f"{SWAHILI} {number} {word}" for number, word in enumerate(WORDS)]
    for code in ("sw", "yo"):
        text = "".join(json.dumps({"id": str(n), "text": line}) + "\n" for n, line in enumerate(lines))
        (tmp_path / f"{code}.jsonl").write_text(text)
    values = {
        "folder": str(tmp_path / "data"),
        "tokenizer": str(tokenizer),
        "seq_len": 32,
        "cleaning": {"min_characters": 10, "off": ["repetition"], **cleaning},
        "sources": [{"language": code, "path": str(tmp_path / f"{code}.jsonl")} for code in ("sw", "yo")],
    }
    return parse_settings(DataSettings, values, "test")


def test_the_counts_say_what_decided(fasttext, tmp_path, small_model, caplog):
    """Swahili text as Yoruba: the model knows no Yoruba, so that only the label says what it is."""
    caplog.set_level("INFO", "babel")
    report = prepare(settings_of(tmp_path, small_model, language_model=MODEL))
    deciders = {}
    for code, entry in report["languages"].items():
        (deciders[code],) = {source["identified_by"] for source in entry["cleaning"].values()}
    assert deciders == {"sw": "small-lid.bin", "yo": BY_SOURCE}
    assert "trusts the label of the sources in yo: no model knows it" in caplog.text
    # Another model would drop other documents.
    with pytest.raises(BadInput, match="prepared with another .*language_model"):
        prepare(settings_of(tmp_path, small_model))


def test_py3langid_drops_text_of_another_language(tmp_path, small_model):
    with pytest.raises(BadInput, match=r"language yo: no text to train on: .*7 another language"):
        prepare(settings_of(tmp_path, small_model))


def test_a_missing_model_is_one_line(tmp_path, small_model):
    with pytest.raises(BadInput, match=r"language_model: .*none.bin cannot be read \(No such file"):
        prepare(settings_of(tmp_path, small_model, language_model=str(tmp_path / "none.bin")))
