"""The registry of languages: languages.csv, and what a run declares beside it.

The file has the languages and scripts of FLORES+ (2.0-rc.3) and the romanized ones of Belebele. Sources of
its facts: FLORES+'s own table and changelog (names of the data sets), ISO 639-3 and 15924 (codes, scripts),
CLDR 48 and MediaWiki 1.39 (names), CLDR (speakers, millions; all that speak the language), Glottolog 5
(macroareas), Common Crawl's statistics of CC-MAIN-2024-42 (shares, percent). Order, shares, classes and
speakers of Babel's 25 are those of its technical report (arXiv 2503.00865, table 1).
"""

import csv
import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from babel_jax.errors import BadInput
from babel_jax.scripts import SCRIPTS, Direction, Script

HIGH_RESOURCE_PERCENT = 1.0  # of Common Crawl: a larger share is high-resource


class Resource(StrEnum):
    """The report's two classes. It names eleven languages high-resource (nominally a Common Crawl share above
    1%). The class of other languages follows their share, or is declared; an unknown share is low.
    """

    HIGH = "high"
    LOW = "low"


@dataclasses.dataclass(frozen=True)
class Language:
    """One language in one script.

    - code: its name in this project: ISO 639-1 where there is a code, else ISO 639-3; for a second script
      the name of Flores-200, such as `zho_Hant`. Filipino is `tl`, as in the report
    - name, own_name: in English, and in the language itself ("" if not known)
    - script: ISO 15924
    - iso639_1: "" if there is none
    - speakers_millions, common_crawl_percent: None if not known
    - macroarea: Glottolog's, such as Africa; "" if not known
    - flores, flores_plus: the names of the language in Flores-200 and in FLORES+
    - sets: the data sets of many languages that have it: flores200, flores_plus, belebele, sib200
    - aliases: other codes of the language, such as `cmn` and `fas`
    """

    code: str
    name: str
    script: str
    iso639_3: str
    resource: Resource
    own_name: str = ""
    iso639_1: str = ""
    macroarea: str = ""
    speakers_millions: float | None = None
    common_crawl_percent: float | None = None
    flores: str = ""
    flores_plus: str = ""
    aliases: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()

    @property
    def direction(self) -> Direction:
        """The writing direction of its script."""
        return self.writing.direction

    @property
    def writing(self) -> Script:
        """The rules of its script."""
        return SCRIPTS[self.script]

    @property
    def tag(self) -> str:
        """The BCP 47 tag, for the `lang` of a page: `sw`, `zho-Hant`."""
        return self.code.replace("_", "-")


def class_of_share(percent: float | None) -> Resource:
    """The class of a share of Common Crawl, in percent."""
    return Resource.HIGH if percent is not None and percent > HIGH_RESOURCE_PERCENT else Resource.LOW


def _read_registry() -> dict[str, Language]:
    text = (Path(__file__).parent / "languages.csv").read_text(encoding="utf-8")
    found = {}
    for row in csv.DictReader(text.splitlines()):
        # Empty cells: the class follows from the share, and FLORES+ has the names of Flores-200.
        share = float(row["common_crawl_percent"]) if row["common_crawl_percent"] else None
        flores = row["flores"] or f"{row['iso639_3']}_{row['script']}"
        found[row["code"]] = Language(
            code=row["code"],
            name=row["name"],
            script=row["script"],
            iso639_3=row["iso639_3"],
            resource=Resource(row["resource"]) if row["resource"] else class_of_share(share),
            own_name=row["own_name"],
            iso639_1=row["iso639_1"],
            macroarea=row["macroarea"],
            speakers_millions=float(row["speakers_millions"]) if row["speakers_millions"] else None,
            common_crawl_percent=share,
            flores=flores,
            flores_plus=row["flores_plus"] or flores,
            aliases=tuple(row["also"].split()),
            sets=tuple(row["sets"].split()),
        )
    return found


# The registry by code, in the order of the file: Babel's 25 as in the report, then by the names of Flores.
REGISTRY: dict[str, Language] = _read_registry()
# The report's languages, with its classes: those of the recipe's configs and tables.
BABEL: tuple[str, ...] = tuple(REGISTRY)[:25]
# The registry, and after it what was declared in this process.
LANGUAGES: dict[str, Language] = dict(REGISTRY)
_POSITIONS = {code: number for number, code in enumerate(REGISTRY)}


# As operating systems and BCP 47 write them: language, perhaps a script, region, encoding.
_LOCALE = re.compile(
    r"(?P<language>[a-z]{2,3}(_[a-z]{4})?)(?P<region>_([a-z]{2}|[0-9]{3}))?(?P<rest>[.@].+)?", re.IGNORECASE
)


def language(name: str) -> Language:
    """The language of a code: ours, ISO 639-1 or 639-3 (also of a macrolanguage, such as `fas`), the name in
    Flores-200 or FLORES+, with `_` or `-`, in any case. For an unknown one, raises BadInput with near codes.
    """
    if (known := known_language(name)) is not None:
        return known
    raise BadInput(
        f"unknown language {name!r}{near_codes(name)}; known are {len(REGISTRY)}, named as sw, yor or "
        "zho_Hant; a [[languages]] table of the config declares another"
    )


def near_codes(name: str) -> str:
    """`: did you mean id (Indonesian)?` for an unknown code or name; empty if none is near.

    For a locale such as en_US or sr_RS.UTF-8@latin, the language alone.
    """
    locale = _LOCALE.fullmatch(name.replace("-", "_"))
    if locale is not None and (locale["region"] or locale["rest"]):
        return f": {_without_region(locale, name[locale.end('language') :].lstrip('-_'))}"
    names = {code: code for code in LANGUAGES}
    names |= {one.name.lower(): code for code, one in LANGUAGES.items()}
    names |= {one.own_name.lower(): code for code, one in LANGUAGES.items()}
    # The other name of Filipino's standard; no field of the table has it.
    names |= {"tagalog": "tl"} if "tl" in LANGUAGES else {}
    # Codes and names are searched together, and one language may be found by several of them.
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    codes = dict.fromkeys(map(names.__getitem__, close))
    near = [f"{code} ({LANGUAGES[code].name})" for code in codes]
    return f": did you mean {', '.join(near)}?" if near else ""


def _without_region(locale: re.Match[str], region: str) -> str:
    """The advice for a locale: the code to write instead. Codes with similar letters are no advice: fy_NL
    (Frisian) is not nl (Dutch).
    """
    why = f"a language here has no region or encoding ({region})"
    base, _, script = locale["language"].partition("_")
    known = known_language(locale["language"])
    if known is None:
        other = known_language(base) if script else None
        in_other_script = "" if other is None else f" ({other.code} is in {other.script})"
        return f"{why}, and {locale['language']} is unknown too{in_other_script}"

    # Chinese has two scripts, so two languages of the table.
    fitting = [known]
    if not script:
        fitting += [one for one in LANGUAGES.values() if one.iso639_3 == known.iso639_3 and one != known]
    return f"write {' or '.join(f'{one.code} ({one.name})' for one in fitting)}; {why}"


def known_language(name: str) -> Language | None:
    """As `language`, and None for an unknown one."""
    if name in LANGUAGES:
        return LANGUAGES[name]
    code = _by_name().get(_plain(name))
    return None if code is None else LANGUAGES[code]


def _plain(name: str) -> str:
    return name.replace("-", "_").lower()


@functools.cache
def _by_name() -> dict[str, str]:
    """{another name: code}. A language's own codes come before those of the set that it belongs to."""
    found = {_plain(code): code for code in LANGUAGES}
    for one in LANGUAGES.values():
        found.setdefault(_plain(one.flores), one.code)
    # The languages in a second script have all codes of the first one, with their script.
    of_first = {one.iso639_3: one.aliases for one in LANGUAGES.values() if "_" not in one.code}
    # `setdefault`: the first language that claims a name keeps it.
    for one in LANGUAGES.values():
        aliases = (*one.aliases, *of_first.get(one.iso639_3, ()))
        names = [one.flores_plus, *one.aliases]
        for code in (one.iso639_3, one.iso639_1, *aliases):
            if code and "_" not in code:
                names.append(f"{code}_{one.script}")
        if "_" not in one.code:
            names += [one.iso639_3, one.iso639_1]
        for name in filter(None, names):
            found.setdefault(_plain(name), one.code)
    return found


def declare(languages: Iterable[Language]) -> None:
    """Adds languages to LANGUAGES, for this process. A language of the registry is replaced, so the caller
    checks that nothing in it is contradicted.
    """
    for one in languages:
        LANGUAGES[one.code] = one
    _by_name.cache_clear()


def declared() -> list[Language]:
    """The languages that were declared in this process, for `declare` in another process."""
    return [one for code, one in LANGUAGES.items() if REGISTRY.get(code) != one]


def to_values(languages: Iterable[Language]) -> list[dict[str, Any]]:
    """Declared languages as JSON values, for a file that other commands read."""
    return [dataclasses.asdict(one) for one in languages]


def from_values(values: Iterable[Mapping[str, Any]]) -> list[Language]:
    """The languages of `to_values`. Raises KeyError, TypeError or ValueError for other values."""
    found = []
    for value in values:
        lists = {"aliases": tuple(value["aliases"]), "sets": tuple(value["sets"])}
        found.append(Language(**{**value, **lists, "resource": Resource(value["resource"])}))
    return found


def position(code: str) -> tuple[int, str]:
    """Sorts codes: those of the registry in its order, then declared ones by name."""
    return _POSITIONS.get(code, len(_POSITIONS)), code


def in_order(codes: Iterable[str]) -> list[str]:
    """These languages once each: Babel's 25 in the report's order, then the others of the registry, then
    declared ones.
    """
    return sorted(set(codes), key=position)


def with_order(first: Iterable[str], more: Iterable[str]) -> tuple[str, ...]:
    """`first` as it is, and after it the languages that only `more` has, in order."""
    kept = tuple(dict.fromkeys(first))
    return (*kept, *in_order(set(more) - set(kept)))


def is_of(code: str, resource: Resource) -> bool:
    """True if the language has this resource class."""
    return LANGUAGES[code].resource is resource


def groups_with_means(codes: Iterable[str]) -> dict[str, str]:
    """{group: label} of the groups `high`, `low` and `all` whose mean over these languages says more than the
    rows of the languages. Left out are a group of one language, and a class that has all of these languages.
    """
    present = in_order(codes)
    labels = {}
    for resource in Resource:
        members = [code for code in present if is_of(code, resource)]
        if 1 < len(members) < len(present):
            labels[str(resource)] = f"{len(members)} {resource}-resource languages"
    if len(present) > 1:
        labels["all"] = f"all {len(present)} languages"
    return labels
