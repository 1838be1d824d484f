"""The page of the registry of languages, and of the benchmarks that each of Babel's has."""

from babel_jax.evaluation.benchmarks.datasets import DATASETS, of_babel
from babel_jax.evaluation.benchmarks.tables import title_of
from babel_jax.languages import BABEL, REGISTRY

_HEAD = """# Languages

The registry, `babel_jax/languages.csv`, has {count} languages: those of FLORES+ with their scripts, and the
romanized ones of Belebele. This page is made from it.

- A language is named by its code, or by another name: `yo`, `yor`, `yor_Latn` and `yor-Latn` are one
  language; so are `zh`, `cmn`, `zho_Hans`, `cmn_Hani` and `zh-CN`, and `fa`, `pes` and `fas`.
- A second script of a language has a code of its own: `zho_Hant`, `hin_Latn`.
- The class is the report's for Babel's 25. For others it is `high` above 1% of Common Crawl.
- An empty cell is not known. [`[[languages]]`](settings.md#languages) of a config may say it, and declares
  other languages.

Sources: FLORES+ 2.0-rc.3 (table and changelog), the configurations of Belebele; ISO 639-3 and ISO 15924
(Debian's iso-codes 4.15); CLDR (language_data 1.4: names, and people who speak the language); MediaWiki
1.39 (own names); Glottolog's CLDF data (macroareas); Common Crawl's statistics of CC-MAIN-2024-42 (shares).
Speakers and shares of Babel's 25 are those of its report.
"""
_BENCHMARKS = """
## Benchmarks of Babel's languages

`--tasks all` means the first six, `--tasks broad` the last five. The [how-to](../how-to/evaluate.md) says
what they ask.
"""


def languages_page() -> str:
    """Markdown: the benchmarks of each of Babel's languages, then all languages."""
    lines = [_HEAD.format(count=len(REGISTRY)), _BENCHMARKS]
    titles = [title_of(benchmark) for benchmark in DATASETS]
    lines.append(f"| language | number | {' | '.join(titles)} |")
    lines.append("| --- | ---: |" + " :---: |" * len(titles))
    for code in BABEL:
        has = [code in of_babel(benchmark) for benchmark in DATASETS]
        # English: MMLU stands in for MMMLU.
        has[0] = has[0] or code == "en"
        cells = ["x" if one else "" for one in has]
        lines.append(f"| {REGISTRY[code].name} (`{code}`) | {sum(has)} | {' | '.join(cells)} |")
    lines += ["", "## All languages", ""]
    heads = ("code", "name", "own name", "script", "direction", "macroarea", "ISO 639-1", "ISO 639-3")
    heads = (*heads, "speakers, millions", "Common Crawl, %", "class", "Flores-200", "FLORES+", "also")
    lines += [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    for one in REGISTRY.values():
        own = f'<span lang="{one.tag}" dir="{one.direction}">{one.own_name}</span>' if one.own_name else ""
        numbers = [one.speakers_millions, one.common_crawl_percent]
        cells = [f"`{one.code}`", one.name, own, one.script, str(one.direction), one.macroarea]
        cells += [one.iso639_1, one.iso639_3, *("" if value is None else f"{value:g}" for value in numbers)]
        cells.append(str(one.resource))
        cells.append(one.flores if "flores200" in one.sets else "")
        cells.append(one.flores_plus if "flores_plus" in one.sets else "")
        lines.append(f"| {' | '.join([*cells, ' '.join(one.aliases)])} |")
    return "\n".join([*lines, ""])
