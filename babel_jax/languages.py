"""The 25 languages of Babel as data.

Order, Common Crawl shares and resource classes are those of the Babel technical report (arXiv 2503.00865,
table 1). Numbers of speakers (first and second language together) are approximate, in millions. `flores` is
the Flores-200 name of the language (ISO 639-3 code and ISO 15924 script). Macroareas are Glottolog's.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from enum import StrEnum

from babel_jax.errors import BadInput


class Resource(StrEnum):
    """The report's two classes. It names eleven languages high-resource (nominally a Common Crawl share above
    1%).
    """

    HIGH = "high"
    LOW = "low"


class Direction(StrEnum):
    """The writing direction of a script."""

    LEFT_TO_RIGHT = "ltr"
    RIGHT_TO_LEFT = "rtl"


@dataclasses.dataclass(frozen=True)
class Language:
    """One language. `code` is ISO 639-1, or the two letters that the report uses (Filipino: `tl`)."""

    code: str
    name: str
    flores: str
    speakers_millions: int
    common_crawl_percent: float
    resource: Resource
    macroarea: str
    direction: Direction = Direction.LEFT_TO_RIGHT

    @property
    def iso639_3(self) -> str:
        """The ISO 639-3 code, as in Flores-200."""
        return self.flores.split("_")[0]

    @property
    def script(self) -> str:
        """ISO 15924 code of the script."""
        return self.flores.split("_")[1]


_HIGH, _LOW, _RTL = Resource.HIGH, Resource.LOW, Direction.RIGHT_TO_LEFT

LANGUAGES: dict[str, Language] = {
    language.code: language
    for language in (
        Language("en", "English", "eng_Latn", 1500, 43.4, _HIGH, "Eurasia"),
        Language("zh", "Chinese", "zho_Hans", 1400, 5.1, _HIGH, "Eurasia"),
        Language("hi", "Hindi", "hin_Deva", 700, 0.2, _LOW, "Eurasia"),
        Language("es", "Spanish", "spa_Latn", 595, 4.6, _HIGH, "Eurasia"),
        Language("ar", "Arabic", "arb_Arab", 400, 0.68, _LOW, "Eurasia", _RTL),
        Language("fr", "French", "fra_Latn", 300, 4.4, _HIGH, "Eurasia"),
        Language("bn", "Bengali", "ben_Beng", 300, 0.1, _LOW, "Eurasia"),
        Language("pt", "Portuguese", "por_Latn", 270, 2.3, _HIGH, "Eurasia"),
        Language("ru", "Russian", "rus_Cyrl", 260, 6.2, _HIGH, "Eurasia"),
        Language("ur", "Urdu", "urd_Arab", 230, 0.02, _LOW, "Eurasia", _RTL),
        Language("id", "Indonesian", "ind_Latn", 200, 1.1, _HIGH, "Papunesia"),
        Language("de", "German", "deu_Latn", 135, 5.4, _HIGH, "Eurasia"),
        Language("ja", "Japanese", "jpn_Jpan", 130, 5.3, _HIGH, "Eurasia"),
        Language("sw", "Swahili", "swh_Latn", 100, 0.008, _LOW, "Africa"),
        Language("tl", "Filipino", "tgl_Latn", 100, 0.008, _LOW, "Papunesia"),
        Language("ta", "Tamil", "tam_Taml", 90, 0.04, _LOW, "Eurasia"),
        Language("vi", "Vietnamese", "vie_Latn", 86, 1.0, _HIGH, "Eurasia"),
        Language("tr", "Turkish", "tur_Latn", 85, 1.3, _LOW, "Eurasia"),
        Language("it", "Italian", "ita_Latn", 85, 2.4, _HIGH, "Eurasia"),
        Language("jv", "Javanese", "jav_Latn", 83, 0.002, _LOW, "Papunesia"),
        Language("ko", "Korean", "kor_Hang", 80, 0.76, _LOW, "Eurasia"),
        Language("ha", "Hausa", "hau_Latn", 79, 0.003, _LOW, "Africa"),
        Language("fa", "Persian", "pes_Arab", 79, 0.74, _LOW, "Eurasia", _RTL),
        Language("th", "Thai", "tha_Thai", 70, 0.42, _LOW, "Eurasia"),
        Language("my", "Burmese", "mya_Mymr", 45, 0.01, _LOW, "Eurasia"),
    )
}

CODES: tuple[str, ...] = tuple(LANGUAGES)


def language(code: str) -> Language:
    """The language of a two-letter code. For an unknown code, raises BadInput with similar codes."""
    if code not in LANGUAGES:
        near = difflib.get_close_matches(code, CODES, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise BadInput(f"unknown language {code!r}: {hint}known are {' '.join(CODES)}")
    return LANGUAGES[code]


def in_order(codes: Iterable[str]) -> list[str]:
    """The languages among these codes, once each, in the report's order."""
    present = set(codes)
    return [code for code in CODES if code in present]


def codes_of(resource: Resource) -> tuple[str, ...]:
    """The codes of one resource class, in the report's order."""
    return tuple(code for code in CODES if LANGUAGES[code].resource is resource)


def groups_with_means(codes: Iterable[str]) -> dict[str, str]:
    """{group: label} of the groups `high`, `low` and `all` whose mean over these languages says more than the
    rows of the languages: a group of one language is left out, and a class that has all languages.
    """
    present = in_order(codes)
    labels = {}
    for resource in Resource:
        members = [code for code in present if LANGUAGES[code].resource is resource]
        if 1 < len(members) < len(present):
            labels[str(resource)] = f"{len(members)} {resource}-resource languages"
    if len(present) > 1:
        labels["all"] = f"all {len(present)} languages"
    return labels
