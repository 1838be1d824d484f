"""The languages against figures of the report that stand in the design, and against Unicode."""

import unicodedata

import pytest

from babel_jax.data.sources.embedded import embedded_corpus
from babel_jax.errors import BadInput
from babel_jax.languages import CODES, LANGUAGES, Direction, Resource, codes_of, language

SCRIPTS = {
    "Latn": "LATIN",
    "Hans": "CJK",
    "Deva": "DEVANAGARI",
    "Arab": "ARABIC",
    "Beng": "BENGALI",
    "Cyrl": "CYRILLIC",
    "Jpan": "HIRAGANA",
    "Taml": "TAMIL",
    "Hang": "HANGUL",
    "Thai": "THAI",
    "Mymr": "MYANMAR",
}


def test_there_are_25_with_11_of_high_resource():
    assert len(CODES) == 25
    assert set(codes_of(Resource.HIGH)) == {"en", "zh", "de", "es", "fr", "id", "it", "ja", "pt", "ru", "vi"}
    assert {code for code in CODES if LANGUAGES[code].direction is Direction.RIGHT_TO_LEFT} == {
        "ar",
        "fa",
        "ur",
    }
    assert len({LANGUAGES[code].flores for code in CODES}) == 25


def test_unknown_codes_are_refused_with_near_ones():
    assert language("sw").name == "Swahili"
    with pytest.raises(BadInput, match="unknown language 'eng': did you mean .*en"):
        language("eng")


@pytest.mark.parametrize("code", list(embedded_corpus()))
def test_embedded_text_is_in_the_script_of_its_language(code):
    text = "".join(row.text for row in embedded_corpus()[code])
    assert unicodedata.is_normalized("NFC", text)
    letters = [letter for letter in text if letter.isalpha()]
    of_script = [
        letter
        for letter in letters
        if unicodedata.name(letter, "").startswith((SCRIPTS[LANGUAGES[code].script], "CJK", "KATAKANA"))
    ]
    assert len(of_script) > 0.97 * len(letters)
