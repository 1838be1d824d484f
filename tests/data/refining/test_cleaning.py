import random
import time
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from babel_jax.config import CleaningSettings, Rule
from babel_jax.data.refining.characters import (
    MAX_MARKS,
    Kind,
    clusters,
    code_points,
    kinds,
    nfc,
)
from babel_jax.data.refining.cleaning import Cleaner, normalize
from babel_jax.data.refining.identification import language_probabilities
from babel_jax.data.refining.personal import mask
from babel_jax.data.refining.repetition import commonest_ngram, repeated_fractions, repeated_ngrams
from babel_jax.data.sources.embedded import embedded_corpus
from babel_jax.data.sources.streams import BadRowError

# Long enough for every rule.
PROSE = {}
for _language, _rows in embedded_corpus().items():
    _paragraphs = [f"{number}. {row.text}" for number, row in enumerate(_rows[:3])]
    PROSE[_language] = "\n".join(_paragraphs)


def clean(text, language="en", **settings):
    return Cleaner(CleaningSettings(**settings), language)(text)


# --- normalization ----------------------------------------------------------------------------------------


def test_text_of_every_language_stays_as_unicode_has_it(texts):
    for text in texts.values():
        assert normalize(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    "text",
    [
        "می‌خواهم",  # Persian: a zero-width non-joiner inside a word
        "क्‍ष और क्‌ष",  # Hindi: joiner and non-joiner ask for different forms of a cluster
        "ক্‌ষ র‍্যাব",  # Bengali
        "ශ්‍රී",  # a joiner between virama and the next letter
        "‏سلام‎",  # marks of direction
        "မြန်မာ​ဘာသာ",  # Burmese: a zero-width space where a line may break
        "👩‍👩‍👧",
    ],
)
def test_joiners_and_marks_of_direction_stay(text):
    assert normalize(text) == text


def test_what_normalization_changes():
    assert normalize("Cafe\u0301\x00 \x1b[1mau\x7f lait\ufeff") == "Café [1mau lait"
    assert normalize("a\r\nb\rc\u2028d\x85e") == "a\nb\nc\nd\ne"
    assert normalize("\n \n  a \u00a0\n\n\n\n\nb\t\n") == "  a\n\nb"
    assert normalize("ཀྵ ක්‍ෂ") == unicodedata.normalize("NFC", "ཀྵ ක්‍ෂ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("last word\x0cfirst word", "last word first word"),
        ("last word \x0c first\x0bword", "last word first word"),
        ("page\x0c\nnext", "page\nnext"),
        ("a\x1fb\x1ec\x1dd\x1ce", "a b c d e"),
        ("e\x00\u0301", "\u00e9"),
        ("\n    def f():\n        return 1\n", "    def f():\n        return 1"),
        ("a\u2003 \n\u3000b\u3000", "a\n\u3000b"),
    ],
)
def test_words_stay_apart_and_code_keeps_its_indentation(text, expected):
    assert normalize(text) == expected


# So long that what is quadratic takes minutes.
LONG = tuple(
    piece * (300_000 // len(piece)) + "b"
    for piece in (" ", " \n", "\x0c", "\t", "a\u0301", "\u1100\u1161", "<pre>", "# ", "- a\n", "…")
)


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_the_time_of_cleaning_is_linear(text):
    start = time.process_time()
    clean(text, off=())
    assert time.process_time() - start < 3.0


@pytest.mark.parametrize("marks", ["\u0301\u0316", "\u0316\u0301", "\u064b\u0651"])
def test_a_run_of_marks_that_no_text_has(marks):
    start = time.process_time()
    with pytest.raises(BadRowError, match="more than 64 combining marks in a row"):
        normalize("a" + marks * 100_000)
    assert len(nfc("a" + marks * 100_000)) <= 1 + MAX_MARKS
    assert time.process_time() - start < 3.0
    assert normalize("a" + marks * 32) == unicodedata.normalize("NFC", "a" + marks * 32)


@given(st.text())
def test_normalization_is_done_once_and_keeps_every_letter(text):
    done = normalize(text)
    assert normalize(done) == done

    def letters(of):
        return [
            character
            for character in unicodedata.normalize("NFC", of)
            if unicodedata.category(character)[0] in "LMN"
        ]

    assert letters(done) == letters(text)


# --- the rules --------------------------------------------------------------------------------------------


def test_prose_of_every_language_is_kept():
    for language, text in PROSE.items():
        assert clean(text, language) == (normalize(text), None), language


def test_the_reports_rules_at_their_thresholds():
    prose = "".join(character for character in PROSE["en"] if not character.isdigit())
    assert clean(prose[:99].strip().ljust(99, "e"))[1] is Rule.CHARACTERS
    assert clean(prose[:100].strip().ljust(100, "e"))[1] is None
    for digits in ("0123456789", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "০১২৩৪৫৬৭৮৯", "๐๑๒๓๔๕๖๗๘๙", "၀၁၂၃၄၅၆၇၈၉"):
        numbers = " ".join(digits[place % 10] * 3 for place in range(22))  # 66 digits among 87 characters
        settings = {"off": tuple(rule for rule in Rule if rule not in (Rule.DIGITS, Rule.CHARACTERS))}
        text = f"{prose[:132].strip().ljust(132, 'e')} {numbers}"  # 220 characters: 30.0% are digits
        assert len(text) == 220
        assert clean(text, **settings)[1] is None
        assert clean(text[1:] + "7", **settings)[1] is Rule.DIGITS


WORDS = """bread river stone window garden letter morning teacher market winter summer road paper table
music water bridge doctor""".split()  # noqa: SIM905
RANDOM = random.Random(0)


def sentences(number):
    return [" ".join(RANDOM.choices(WORDS, k=12)).capitalize() + "." for _ in range(number)]


BAD = {
    Rule.CHARACTERS: "Too short.",
    Rule.ENCODING: PROSE["fr"].encode().decode("cp1252", "replace"),
    Rule.DIGITS: "2019 2020 2021 2022 12,000 13,000 14,000 15,000 " * 3
    + "people lived in the town in these years",
    Rule.LETTERS: "| --- | === | *** | {{ }} | [[ ]] | <<< >>> | the table | $$ %% ^^ | " * 2,
    Rule.WORDS: (
        "the rates of the day are - 12 - 13 - 14 - 15 - 16 - 17 - and those of the evening were lower than "
        "these"
    ),
    Rule.SYMBOLS: (
        "# Morning # paper # at # the # market # was # sold out before # anybody # could buy # a copy of it "
        "# said the teacher"
    ),
    Rule.BULLETS: "\n".join(f"- {line}" for line in sentences(10)),
    Rule.ELLIPSES: "\n".join(line[:-1] + "…" for line in sentences(10)),
    Rule.PLACEHOLDER: PROSE["en"] + "\nLorem ipsum dolor sit amet.",
    Rule.LINES: "\n".join([*sentences(6), *["Click here to read more about it."] * 6]),
    Rule.PARAGRAPHS: "\n\n".join(
        [
            *sentences(4),
            "A window.\nA road.",
            "A window.\nA road.",
            "A window.\nA road.",
            "A window.\nA road.",
        ]
    ),
    Rule.REPETITION: "We sell the best shoes in town. " + "Buy cheap shoes online now " * 12,
    Rule.LANGUAGE: PROSE["it"],
}


@pytest.mark.parametrize("rule", BAD)
def test_each_rule_drops_what_it_is_for_and_can_be_switched_off(rule):
    only = {"off": tuple(other for other in Rule if other is not rule)}
    assert clean(BAD[rule], **only)[1] is rule
    assert clean(PROSE["en"], **only)[1] is None
    assert clean(BAD[rule], off=(rule,))[1] is not rule


@pytest.mark.parametrize("language", ["zh", "ja", "th", "my"])
def test_repetition_is_seen_without_spaces_between_words(language):
    once = PROSE[language]
    again = "".join(once.split())[:30] * 10
    assert clean(again, language, min_language_probability=0.0)[1] is Rule.REPETITION


def test_a_latin_name_in_chinese_is_one_word_of_it():
    points = code_points("我住在Amsterdam很久")
    units, lengths = clusters(points, kinds(points))
    assert lengths.tolist() == [1, 1, 1, 9, 1, 1]
    other = code_points("我住在Amsterdma很久")
    assert (clusters(other, kinds(other))[0] == units).tolist() == [True, True, True, False, True, True]


def test_clusters_are_those_of_unicode(texts):
    regex = pytest.importorskip("regex")
    for language in ("zh", "ja", "th"):
        text = unicodedata.normalize("NFC", texts[language])
        points = code_points(text)
        _, lengths = clusters(points, kinds(points))
        expected = [len(cluster) for cluster in regex.findall(r"\X", text) if not cluster.isspace()]
        assert abs(len(lengths) - len(expected)) <= 0.05 * len(expected), language
        assert lengths.sum() == len("".join(text.split()))


def test_kinds_are_unicodes():
    names = {"L": Kind.LETTER, "M": Kind.MARK, "P": Kind.PUNCTUATION, "S": Kind.SYMBOL, "Z": Kind.SPACE}
    points = np.arange(0x20, 0x3000, dtype=np.uint32)
    for point, kind in zip(points.tolist(), kinds(points).tolist(), strict=True):
        category = unicodedata.category(chr(point))
        assert kind == (Kind.DIGIT if chr(point).isdecimal() else names.get(category[0], kind))


# --- repetition, against counting by hand -----------------------------------------------------------------

TOKENS = st.lists(st.sampled_from(["a", "bb", "ccc", "d"]), max_size=30)


def grams(tokens, size):
    return [tuple(tokens[place : place + size]) for place in range(len(tokens) - size + 1)]


def units(tokens):
    return np.array([hash(token) for token in tokens], np.int64).view(np.uint64), np.array(
        list(map(len, tokens)), np.int64
    )


@given(TOKENS, st.integers(2, 5))
def test_repeated_ngrams(tokens, size):
    counts = Counter(grams(tokens, size))
    covered = {
        place + inside
        for place, gram in enumerate(grams(tokens, size))
        if counts[gram] > 1
        for inside in range(size)
    }
    expected = sum(len(tokens[place]) for place in covered) / max(1, sum(map(len, tokens)))
    assert repeated_ngrams(*units(tokens), size) == pytest.approx(expected)


@given(TOKENS, st.integers(2, 4))
def test_commonest_ngram(tokens, size):
    counts = Counter(grams(tokens, size))
    expected = max([count * sum(map(len, gram)) for gram, count in counts.items() if count > 1], default=0)
    assert commonest_ngram(*units(tokens), size) == pytest.approx(expected / max(1, sum(map(len, tokens))))


def test_repeated_fractions():
    assert repeated_fractions(["ab", "c", "ab", "ab", "dd"]) == (2 / 5, 4 / 9)
    assert repeated_fractions([]) == (0.0, 0.0)


# --- languages and personal data --------------------------------------------------------------------------


def test_the_language_of_a_sentence_is_told_among_the_25(texts):
    told = {language: next(iter(language_probabilities(text))) for language, text in texts.items()}
    assert told == {language: language for language in texts}
    assert set(language_probabilities("12")) == set(texts)
    assert sum(language_probabilities(texts["ur"]).values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to jan.de-vries+shop@mail.example.co.uk, please", "write to [email], please"),
        ("почта: имя@пример.рф.", "почта: [email]."),
        ("call +31 20 123 4567 or (020) 123 4567 or 555-123-4567", "call [phone] or [phone] or [phone]"),
        ("फ़ोन +91 98765 43210", "फ़ोन [phone]"),
        ("هاتف ٠٢٠ ١٢٣ ٤٥٦٧", "هاتف [phone]"),
        ("card 4111 1111 1111 1111 and 5500-0000-0000-0004", "card [card] and [card]"),
        ("card ٤١١١١١١١١١١١١١١١", "card [card]"),
        ("not a card: 4111 1111 1111 1112", "not a card: 4111 1111 1111 1112"),
        (
            "ISBN 978-3-16-148410-0, in 2019-2021, on 12.05.2021",
            "ISBN 978-3-16-148410-0, in 2019-2021, on 12.05.2021",
        ),
        (
            "version 3.11.2.1, 192.168.0.1, 1,000,000 and 3.14159265358979",
            "version 3.11.2.1, 192.168.0.1, 1,000,000 and 3.14159265358979",
        ),
        ("from 1939 to 1945 1.234.567 people @home", "from 1939 to 1945 1.234.567 people @home"),
        (
            "https://example.org/0123 456 789/x?id=4111111111111112",
            "https://example.org/0123 456 789/x?id=4111111111111112",
        ),
    ],
)
def test_personal_data(text, expected):
    masked = Counter()
    assert mask(text, masked, sum(map(str.isdecimal, text))) == expected
    assert masked.total() == expected.count("[email]") + expected.count("[phone]") + expected.count("[card]")


def test_masking_can_be_switched_off():
    text = PROSE["en"] + " write to a@example.org"
    assert clean(text)[0].endswith("[email]")
    assert clean(text, mask_personal_data=False)[0] == text
