"""The languages against figures of the report that stand in the design, and against Unicode."""

import json
import locale
import re
import unicodedata
from pathlib import Path

import pytest

from babel_jax.config import Config, Source
from babel_jax.config.catalogue import expand
from babel_jax.config.file import declare_languages, parse_settings
from babel_jax.config.languages import WithLanguages
from babel_jax.data.sources.embedded import corpus_sources, embedded_corpus
from babel_jax.data.windows.prepare import prepare
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.data.windows.statistics import write_statistics
from babel_jax.errors import BadInput
from babel_jax.languages import (
    BABEL,
    LANGUAGES,
    REGISTRY,
    Resource,
    declare,
    in_order,
    known_language,
    language,
    near_codes,
    with_order,
)
from babel_jax.scripts import SCRIPTS as WRITINGS
from babel_jax.scripts import WITHOUT_SPACES, Direction, sentence_end

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


@pytest.fixture(autouse=True)
def nothing_declared():
    """What a test declares is known in this process, so it is removed again."""
    yield
    for code in set(LANGUAGES) - set(REGISTRY):
        del LANGUAGES[code]
    declare(REGISTRY.values())


def test_babels_25_have_11_of_high_resource():
    assert len(BABEL) == 25
    high = {code for code in BABEL if LANGUAGES[code].resource is Resource.HIGH}
    assert high == {"en", "zh", "de", "es", "fr", "id", "it", "ja", "pt", "ru", "vi"}
    assert {code for code in BABEL if LANGUAGES[code].direction is Direction.RIGHT_TO_LEFT} == {
        "ar",
        "fa",
        "ur",
    }


def test_the_registry_has_the_languages_of_flores_and_of_belebele():
    """The harness ships the names of Belebele's 122 configurations; FLORES-200 has 204."""
    lm_eval = pytest.importorskip("lm_eval.tasks")
    folder = Path(lm_eval.__file__).parent / "belebele"
    belebele = {path.stem.removeprefix("belebele_") for path in folder.glob("belebele_*_*.yaml")}
    assert len(belebele) == 122
    flores = {one.flores for one in REGISTRY.values()}
    assert len(flores) == len(REGISTRY) >= 217
    assert belebele <= flores
    assert {language(name).flores for name in belebele} == belebele


def test_no_two_languages_share_a_code_or_a_name():
    assert len({one.name for one in REGISTRY.values()}) == len(REGISTRY)
    for one in REGISTRY.values():
        assert language(one.code) is language(one.flores) is one
        assert one.script in WRITINGS, one.code
        assert one.macroarea in {"Africa", "Eurasia", "Papunesia", "South America", "North America"}, one.code
        assert 0 <= (one.common_crawl_percent or 0) < 100


# Names in other programs: macrolanguages of ISO 639-3, BCP 47, FLORES+, FineWeb-2, old codes.
NAMES = {
    "zh": "zho zh-Hans zho_Hans zh_CN cmn cmn_Hans cmn_Hani ZH",
    "zho_Hant": "zh-Hant zh-TW cmn_Hant",
    "tl": "tgl fil fil_Latn tgl_Latn",
    "fa": "pes fas fas_Arab pes_Arab",
    "sw": "swh swa swh_Latn swa_Latn",
    "ar": "arb ara arb_Arab ara_Arab",
    "arb_Latn": "ar-Latn ara_Latn",
    "nb": "no nor nob nob_Latn",
    "he": "iw heb",
    "et": "est ekk ekk_Latn est_Latn",
    "yo": "yor yor_Latn",
    "qu": "que quy quy_Latn",
    "ku": "kmr kur kmr_Latn",
    "zgh": "tzm_Tfng zgh_Tfng",
    "ms": "zsm msa",
    "sq": "als sqi",
    "ace": "ace_Latn",
    "ace_Arab": "ace-Arab",
}


@pytest.mark.parametrize("code", NAMES)
def test_other_names_of_a_language_are_understood(code):
    assert {language(name).code for name in NAMES[code].split()} == {code}


@pytest.mark.parametrize("name", ["sr-Latn", "pt-BR", "xx", "", "en_Cyrl", "sw_", "zho_Hans_CN"])
def test_unknown_codes_are_refused(name):
    with pytest.raises(BadInput, match=r"unknown language .* \[\[languages\]\] table of the config declares"):
        language(name)


def test_unknown_codes_are_refused_with_near_ones():
    assert language("sw").name == "Swahili"
    with pytest.raises(BadInput, match=r"unknown language 'idn': did you mean id \(Indonesian\)"):
        language("idn")
    with pytest.raises(BadInput, match=r"did you mean yo \(Yoruba\)"):
        language("Yoruba")
    with pytest.raises(BadInput, match=r"'en_US': write en \(English\); a language here has no region"):
        language("en_US")
    with pytest.raises(BadInput, match=r"write zh \(Chinese\) or zho_Hant \(Chinese \(Traditional\)\); .*SG"):
        language("zh-SG")


def test_locales_of_the_standard_library_are_answered_with_their_language_alone():
    """Letters that are alike would say nothing: of am_ET.UTF-8 (Amharic) they made pap (Papiamento)."""
    for name in {name for name in locale.locale_alias.values() if "_" in name}:
        known = known_language(re.split(r"[_.@]", name)[0])
        wanted = "a language here has no region" if known is None else f"write {known.code} ("
        assert known_language(name) is not None or near_codes(name).startswith(f": {wanted}"), name


WHY = "a language here has no region or encoding"


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("zh-Hant-TW", f"write zho_Hant (Chinese (Traditional)); {WHY} (TW)"),
        ("sr-Latn-RS", f"{WHY} (RS), and sr_Latn is unknown too (sr is in Cyrl)"),
        ("sr_RS.UTF-8@latin", f"write sr (Serbian); {WHY} (RS.UTF-8@latin)"),
        ("fy_NL", f"{WHY} (NL), and fy is unknown too"),
        ("eo.UTF-8", f"write eo (Esperanto); {WHY} (.UTF-8)"),
    ],
)
def test_locales_with_script_encoding_or_an_unknown_language(name, answer):
    assert near_codes(name) == f": {answer}"


@pytest.mark.parametrize("name", ["kiswahili", "indonesia", "tagalok", "हिंदी", "русски", "zho_Hantt"])
def test_names_that_are_no_locales_have_near_ones(name):
    assert near_codes(name).startswith(": did you mean ")


def test_the_order_has_babels_first_and_keeps_what_is_given():
    assert in_order(["yo", "am", "my", "en", "zh"]) == ["en", "zh", "my", "am", "yo"]
    assert with_order(["yo", "en"], ["zh", "en", "am"]) == ("yo", "en", "zh", "am")


def declaring(*languages):
    return parse_settings(WithLanguages, {"languages": list(languages)}, "run.toml")


def test_a_language_is_declared_by_name_and_script():
    declaring(
        {"code": "qaa", "name": "Testish", "script": "Adlm", "common_crawl_percent": 2.0}, {"code": "yor"}
    )
    made = language("qaa")
    assert (made.direction, made.resource, made.flores) == (
        Direction.RIGHT_TO_LEFT,
        Resource.HIGH,
        "qaa_Adlm",
    )
    assert Source(language="qaa", path="x.jsonl").language == "qaa"
    declaring({"code": "yo", "resource": "high"})
    assert language("yor").resource is Resource.HIGH


@pytest.mark.parametrize(
    ("languages", "says"),
    [
        ([{"code": "sw"}, {"code": "swh"}], "sw is declared twice"),
        (
            [{"code": "ar", "direction": "ltr"}],
            "ar: direction ltr contradicts its script Arab, which is written rtl",
        ),
        (
            [{"code": "yo", "script": "Arab"}],
            "yo: script 'Arab' contradicts the registry's 'Latn'; leave it out",
        ),
        (
            [{"code": "sw", "resource": "high"}],
            "sw: resource high contradicts the class that the Babel report",
        ),
        ([{"code": "yoo"}], "yoo is not in the registry, so it needs name and script: did you mean yo"),
        ([{"code": "qaa", "name": "T", "script": "Latin"}], "qaa: script 'Latin' is none of Adlm Arab"),
        ([{"code": "../x", "name": "T", "script": "Latn"}], "'../x' is no code: lower-case letters"),
        ([{"code": "qaa", "name": "Swahili", "script": "Latn"}], "qaa: sw is named 'Swahili' too"),
    ],
)
def test_a_contradiction_is_refused(languages, says):
    with pytest.raises(BadInput) as problem:
        declaring(*languages)
    assert says in str(problem.value)
    assert "\n" not in str(problem.value)


def config_of(tmp_path, *codes, languages=()):
    values = {
        "out": str(tmp_path / "run"),
        "model": {"folder": "nowhere"},
        "languages": list(languages),
        "data": {"folder": "data", "sources": [{"language": code, "path": "x.jsonl"} for code in codes]},
    }
    return parse_settings(Config, values, "run.toml")


def test_the_order_of_a_run_is_that_of_its_config(tmp_path):
    assert config_of(tmp_path, "yor", "en", "am").order == ("en", "am", "yo")
    config = config_of(tmp_path, "yo", "en", "am", languages=[{"code": "yo"}])
    assert config.order == ("yo", "en", "am")
    config = config.in_order(config.order)
    again = parse_settings(Config, json.loads(config.model_dump_json(exclude_none=True)), "again")
    assert again.order == ("yo", "en", "am")


# --- Scripts, against Unicode. -----------------------------------------------------------------------------


@pytest.mark.parametrize("one", [one for one in REGISTRY.values() if one.own_name], ids=lambda one: one.code)
def test_the_direction_of_a_script_is_that_of_its_letters(one):
    """By the bidirectional class of the letters of the language's own name."""
    classes = {unicodedata.bidirectional(letter) for letter in one.own_name if letter.isalpha()}
    assert classes <= ({"R", "AL"} if one.direction is Direction.RIGHT_TO_LEFT else {"L"})


def test_marks_that_end_a_sentence_have_unicodes_property():
    regex = pytest.importorskip("regex")
    for script in WRITINGS:
        pattern = sentence_end(script)
        ends = {chr(number) for number in range(0x10000) if pattern.split(f"a{chr(number)}b")[1:]}
        others = {end for end in ends if not regex.match(r"\p{Sentence_Terminal}", end)}
        assert others <= {"\u0f0d", "\u0f0e"} | set(WRITINGS[script].ends), script


def test_scripts_without_spaces_are_those_that_break_lines_by_a_dictionary():
    """UAX 14: complex-context and ideographic letters; beside them the scripts of Java and Bali."""
    regex = pytest.importorskip("regex")
    of = {
        code: r"\p{Script=" + {"Hans": "Hani", "Hant": "Hani", "Jpan": "Kana"}.get(code, code) + "}"
        for code in WRITINGS
    }
    for code in {one.script for one in REGISTRY.values()}:
        letters = (
            [
                number
                for number in range(0x10000)
                if unicodedata.category(chr(number)) == "Lo"
                and number < 0xD800
                and regex.match(of[code], chr(number))
            ]
            if code != "Kore"
            else []
        )
        inside = [any(first <= number <= last for first, last in WITHOUT_SPACES) for number in letters]
        assert all(inside) == (WRITINGS[code].characters_a_word is not None) or not letters, code


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


# --- Languages that a run declares, in other commands and processes. ---------------------------------------

TEXT = "ދުނިޔެއަށް އުފަންވާ ހުރިހާ އިންސާނުންނަކީ މިނިވަން މީހުންނެވެ"
DHIVEHI = {"code": "dv", "name": "Dhivehi", "script": "Thaa"}


@pytest.fixture
def declared_data(tmp_path, small_model):
    """Prepared text of a declared language, by two worker processes, which start without knowing it."""
    text = "".join(
        json.dumps({"id": str(n), "text": f"{TEXT} {n}"}, ensure_ascii=False) + "\n" for n in range(20)
    )
    for code in ("dv", "am"):
        (tmp_path / f"{code}.jsonl").write_text(text, encoding="utf-8")
    values = {
        "out": str(tmp_path / "run"),
        "model": {"folder": "nowhere"},
        "languages": [DHIVEHI],
        "data": {
            "folder": str(tmp_path / "data"),
            "tokenizer": str(small_model),
            "seq_len": 64,
            "workers": 2,
            "cleaning": {"min_characters": 10, "off": ["repetition"]},
            "sources": [{"language": code, "path": str(tmp_path / f"{code}.jsonl")} for code in ("am", "dv")],
        },
    }
    values["data"]["sources"][0]["off"] = ["language"]
    config = parse_settings(Config, values, "run.toml")
    config.save(tmp_path / "run.toml")
    prepare(config.data)
    return tmp_path


def forget():
    for code in set(LANGUAGES) - set(REGISTRY):
        del LANGUAGES[code]
    declare([])


def test_prepared_data_says_what_was_declared(declared_data):
    forget()
    with pytest.raises(BadInput, match="unknown language 'dv'"):
        language("dv")
    prepared = open_prepared(declared_data / "data")
    assert prepared.languages == ("am", "dv")
    assert language("dv").direction is Direction.RIGHT_TO_LEFT
    assert prepared.report["languages"]["dv"]["cleaning"][str(declared_data / "dv.jsonl")][
        "identified_by"
    ] == ("the source's label")
    # The page of the data, without the config.
    forget()
    write_statistics(declared_data / "data")
    page = (declared_data / "data" / "statistics.html").read_text(encoding="utf-8")
    assert '<blockquote lang="dv" dir="rtl">' in page


def test_a_config_declares_languages_for_other_commands(declared_data):
    forget()
    declare_languages(declared_data / "run.toml")
    assert language("dv").name == "Dhivehi"


def test_a_file_of_an_unknown_language_is_told(tmp_path, caplog):
    for name in ("sw", "qaa", "items.test"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "Habari"}\n')
    assert [source.language for source in corpus_sources(tmp_path)] == ["sw"]
    (record,) = caplog.records
    assert "qaa.jsonl is not read: no language qaa is known" in record.getMessage()


def test_two_names_of_one_language_are_two_files_of_it(tmp_path):
    for name in ("yo", "yor_Latn"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "Bawo ni"}\n')
    with pytest.raises(BadInput, match=r"yo is there twice: yo.jsonl, yor_Latn.jsonl; keep one"):
        corpus_sources(tmp_path)


# --- The catalogue, in languages beyond Babel's. -----------------------------------------------------------

# Names as the listings of these corpora have them (MADLAD-400's and FineWeb-2's cards, Wikipedia's projects).
IN_CORPORA = [
    ("wikipedia", "yor", "20231101.yo/"),
    ("wikipedia", "ckb", "20231101.ckb/"),
    ("madlad-400", "ne", "data/ne/ne_clean"),
    ("culturax", "uk", "CulturaX/uk/uk_part"),
    ("fineweb-2", "yo", "data/yor_Latn/train"),
    ("fineweb-2", "et", "data/ekk_Latn/train"),
    ("fineweb-2", "ne", "data/npi_Deva/train"),
    ("fineweb-2", "nb", "data/nob_Latn/train"),
    ("fineweb-2", "tw", "data/twi_Latn/train"),
    ("finepdfs", "qu", "data/quy_Latn/train"),
    ("finewiki", "am", "data/amwiki/"),
]


@pytest.mark.parametrize(("corpus", "code", "inside"), IN_CORPORA)
def test_the_catalogue_names_other_languages_by_rule(corpus, code, inside):
    (source,) = expand({"catalogue": corpus, "language": code}, Source.model_fields)
    assert inside in source["path"]
    assert source["language"] == language(code).code
    # Without a language it is Babel's, as before.
    every = expand({"catalogue": corpus}, Source.model_fields)
    assert {one["language"] for one in every} <= set(BABEL)


@pytest.mark.parametrize(
    ("corpus", "code", "says"),
    [
        ("cosmopedia", "yo", "cosmopedia has no text in yo; it has en; corpora with yo"),
        ("wikipedia", "zho_Hant", "wikipedia has no text in zho_Hant"),
        ("finepdfs", "sw", "finepdfs has no text in sw"),
    ],
)
def test_a_corpus_without_the_language_says_which_has(corpus, code, says):
    with pytest.raises(ValueError, match=says):
        expand({"catalogue": corpus, "language": code}, Source.model_fields)
