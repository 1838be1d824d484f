"""Evaluation items in documents, whatever the form of Unicode in which each is written."""

import json
import unicodedata

import pytest

from babel_jax.config import CleaningSettings, DataSettings, DecontaminationSettings, Rule, Source
from babel_jax.data.refining.decontamination import EvaluationText
from babel_jax.data.windows.prepare import prepare
from babel_jax.errors import BadInput

ITEMS = {
    "hi": ("बड़े बाज़ार में लड़का सड़क पर दौड़ता हुआ अपनी पढ़ाई की क़लम और काग़ज़ ढूंढने के लिए हर दुकान पर पूछता रहा"),
    "vi": (
        "Người nông dân thường thức dậy rất sớm vào buổi sáng để chuẩn bị những công cụ cần thiết cho một "
        "ngày"
    ),
    "fr": (
        "Les élèves préférés de la maîtresse étaient très fâchés après avoir été grondés à cause du tableau "
        "cassé"
    ),
    "ur": (
        "لڑکے نے آج صبح اپنے گھر کے باہر آم کے درخت کے نیچے ایک بہت بڑا سانپ دیکھا اور فوراً اپنے والد کو "
        "بلایا"
    ),
    "tr": (
        "İstanbul'da yaşayan öğrenciler her sabah güneş doğmadan önce kalkıp ıssız sokaklardan okullarına "
        "yürürlerdi"
    ),
    "ko": "할머니는 아침마다 창문을 열고 바다를 바라보며 오래전에 떠난 아들에게서 온 "
    "편지를 다시 읽곤 하셨습니다 "
    "그리고 오래도록 그 자리에 앉아 편지를 쥐고 계셨다",
}
FORMS = ("NFC", "NFD", "NFKC", "NFKD")
# The letters that Hindi keyboards write, which all normal forms take apart.
COMPOSED = {
    "ड\u093c": "\u095c",
    "ढ\u093c": "\u095d",
    "ज\u093c": "\u095b",
    "क\u093c": "\u0958",
    "ग\u093c": "\u095a",
}


@pytest.mark.parametrize("language", ITEMS)
@pytest.mark.parametrize("item", FORMS)
def test_an_item_of_one_form_is_found_in_documents_of_all(tmp_path, language, item):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"question": unicodedata.normalize(item, ITEMS[language])}), encoding="utf-8")
    evaluation = EvaluationText(DecontaminationSettings(paths=(str(path),)))
    for form in FORMS:
        document = unicodedata.normalize(form, f"1. {ITEMS[language]}!")
        for text in (
            document,
            document.upper() if language != "tr" else document,
            document.replace(" ", "\u00a0\n"),
        ):
            assert evaluation.file_of(text, language) == str(path), form
    keyboard = ITEMS["hi"]
    for apart, one in COMPOSED.items():
        keyboard = keyboard.replace(apart, one)
    assert (evaluation.file_of(keyboard, "hi") is not None) == (language == "hi")


def test_items_are_looked_for_before_personal_data_is_masked(tmp_path, small_model, write_rows):
    item = "Write to a.b@example.org, or call +49 30 123456, or pay with 4111 1111 1111 1111 by noon"
    other = (
        "The grandmother opens the window and looks at the sea while the bus leaves the corner of the street."
    )
    off = tuple(rule for rule in Rule if rule is not Rule.CHARACTERS)
    settings = DataSettings(
        folder=str(tmp_path / "data"),
        seq_len=64,
        heldout_fraction=0.0,
        cleaning=CleaningSettings(off=off, min_characters=20),
        decontamination=DecontaminationSettings(
            paths=(str(write_rows(tmp_path / "items.jsonl", [{"question": item}])),)
        ),
        sources=(
            Source(
                language="en",
                path=str(write_rows(tmp_path / "en.jsonl", [{"text": item}, {"text": other}])),
                name="web",
            ),
        ),
    )
    found = prepare(settings, small_model)["languages"]["en"]["cleaning"]["web"]
    assert found["dropped"] == {"evaluation": 1}
    assert found["masked"] == {}


def items_of(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return EvaluationText(DecontaminationSettings(paths=(str(path),)))


def test_items_that_cannot_be_read_are_named(tmp_path):
    """They were passed over in silence, and what they ask for stayed in the text."""
    good = json.dumps({"question": ITEMS["fr"]}).encode() + b"\n"
    for bad, reason in (
        (b"{cut\n", "not readable JSON"),
        (b'{"q": "caf\xe9"}\n', "not UTF-8"),
        (b"[" * 100_000 + b"\n", "not readable JSON"),
    ):
        with pytest.raises(
            BadInput, match=rf"items\.jsonl:2: {reason}.*repair or remove the row of evaluation items"
        ):
            items_of(tmp_path, "items.jsonl", good + bad)
    with pytest.raises(BadInput, match=r"items\.parquet: unreadable after row 0"):
        items_of(tmp_path, "items.parquet", b"PAR1 and nothing more PAR1")


def test_odd_strings_of_items(tmp_path):
    """Half of a surrogate pair, deep nesting, strings in lists and keys that are no text."""
    nested = json.dumps({"a": [[{"b": [1, None, ITEMS["fr"]]}]]}).encode()
    deep = b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}"
    evaluation = items_of(
        tmp_path, "items.jsonl", b'{"q": "half \\ud83d", "\\ud83d": "x"}\n' + deep + b"\n" + nested + b"\n"
    )
    assert evaluation.file_of(ITEMS["fr"], "fr") is not None
