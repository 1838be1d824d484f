"""The catalogue of corpora as a table, and the comparison with what the hub and the web have today.

`babel catalogue check` asks for the listing and one row of each corpus and benchmark. It is for the first
machine with a network, and for a weekly job: its JSON says what is no longer as the catalogue has it.
"""

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from babel_jax.config import Source
from babel_jax.config.catalogue import catalogue, expand
from babel_jax.data.sources.file_lists import is_list
from babel_jax.data.sources.parquet import parquet_rows
from babel_jax.data.sources.records import parts, read_records
from babel_jax.data.sources.streams import BadRowError, web_file_of
from babel_jax.errors import BadInput, one_line
from babel_jax.evaluation.benchmarks.datasets import DATASETS
from babel_jax.hub.datasets import hub_path, names_in
from babel_jax.hub.patience import explained, patiently
from babel_jax.progress import Work

_SHOWN = 12  # names in a message


def catalogue_table() -> dict[str, Any]:
    """The corpora: {"corpora": [{"name", "title", "home", "licence", "kind", "languages", "absent", "gated",
    "size", "reads", "unconfirmed"}], "summary"}.
    """
    corpora = []
    for name, entry in catalogue().items():
        corpora.append(
            {
                "name": name,
                "title": entry["title"],
                "home": entry["home"],
                "licence": entry["licence"],
                "kind": entry["source"]["kind"],
                "languages": list(entry["configurations"]),
                "absent": entry["absent"],
                "gated": entry.get("gated", False),
                "size": entry.get("size", ""),
                "reads": entry["reads"],
                "unconfirmed": entry["unconfirmed"],
            }
        )
    lines = [
        *_table_lines(corpora),
        "",
        'In a config: [[data.sources]] catalogue = "fineweb-2", language = "sw"',
        "babel catalogue check NAME: what it has today.",
    ]
    return {"corpora": corpora, "summary": "\n".join(lines)}


def _table_lines(corpora: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each corpus: four columns of equal width, then the title with the licence, which are too
    long for columns.
    """
    rows = [("corpus", "kind", "languages", "gated")]
    descriptions = ["what it is (licence)"]
    for corpus in corpora:
        count = len(corpus["languages"])
        languages = f"{count}" if count > 1 else corpus["languages"][0]
        rows.append((corpus["name"], corpus["kind"], languages, "gated" if corpus["gated"] else ""))
        descriptions.append(f"{corpus['title']} ({corpus['licence']})")
    widths = []
    for column in zip(*rows, strict=True):
        widths.append(max(map(len, column)))
    lines = []
    for row, description in zip(rows, descriptions, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([*cells, description]))
    return lines


def check_catalogue(names: Sequence[str] = ()) -> dict[str, Any]:
    """Compares corpora and benchmarks, or those of these names, with what is there today.

    Returns {"checked": [{"name", "of": "corpus" or "benchmark", "commit", "gated", "files", "columns",
    "problems"}], "changed": [names], "skipped": {name: reason}, "summary", "exit_status"}. A problem is one
    line. Raises BadInput for an unknown name.
    """
    known = {**catalogue(), **DATASETS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BadInput(f"no corpus or benchmark {unknown[0]!r}; known are {', '.join(known)}")
    chosen = list(names) or list(known)
    checked, skipped = [], {}
    # All entries are asked for, also after one that differs: the weekly job shows everything at once.
    for name in Work("checking", chosen, unit="entries"):
        # Benchmarks are data sets on the hub, without an entry in the catalogue.
        if name in DATASETS:
            checked.append(_benchmark(name))
        elif (reason := _not_checked(name)) is not None:
            skipped[name] = reason
        else:
            checked.append(_corpus(name))
    changed = [entry["name"] for entry in checked if entry["problems"]]
    lines = []
    for entry in checked:
        said = "; ".join(entry["problems"]) if entry["problems"] else "as the catalogue has it"
        lines.append(f"{entry['name']}: {said}")
    lines += [f"{name}: not checked: {reason}" for name, reason in skipped.items()]
    lines.append(f"{len(changed)} of {len(checked)} differ, or could not be asked")
    return {
        "checked": checked,
        "changed": changed,
        "skipped": skipped,
        "summary": "\n".join(lines),
        "exit_status": 1 if changed else 0,
    }


def _not_checked(name: str) -> str | None:
    """Why an entry cannot be compared; None if it can."""
    source = catalogue()[name]["source"]
    if "tfds" in source:
        return "a TFDS dataset, which is built on this machine"
    if "path" in source and "://" not in source["path"]:
        return "files on this disk"
    return None


def _corpus(name: str) -> dict[str, Any]:
    entry = catalogue()[name]
    found = _Found(name, "corpus")
    with found.problems_of():
        # The entry is expanded as in a config, so that the check reads what a run would read.
        sources = [Source(**given) for given in expand({"catalogue": name}, Source.model_fields)]
        repo = _repo_of(sources[0])
        if repo is not None:
            found.ask_hub(repo, entry.get("gated", False), sources[0].revision)
        _compare_names(found, entry, sources)
        first = _first_there(sources)
        found.entry["files"] = len(parts(first))
        _compare_columns(found, first, entry.get("columns", [first.text_key]))
    return found.entry


def _benchmark(name: str) -> dict[str, Any]:
    benchmark = DATASETS[name]
    found = _Found(name, "benchmark")
    language, configuration = next(iter(benchmark.configs.items()))
    with found.problems_of():
        found.ask_hub(benchmark.hub, None, None)
        for split in benchmark.splits:
            source = Source(
                language=language,
                huggingface=benchmark.hub,
                huggingface_config=configuration,
                huggingface_split=split,
            )
            found.entry["files"] = len(parts(source))
            # Translations have one text a row and language; the pair is made here.
            needed = ["text"] if "source" in benchmark.keys else list(benchmark.keys)
            _compare_columns(found, source, needed)
    return found.entry


class _Found:
    """The results of the check of one entry."""

    def __init__(self, name: str, of: str):
        self.problems: list[str] = []
        self.entry: dict[str, Any] = {
            "name": name,
            "of": of,
            "commit": None,
            "gated": None,
            "files": None,
            "columns": None,
            "problems": self.problems,
        }

    @contextlib.contextmanager
    def problems_of(self) -> Iterator[None]:
        """A block whose error is a problem of the entry; the other entries are compared all the same."""
        try:
            yield
        except BadInput as problem:
            self.problems.append(str(problem))
        except Exception as error:  # of the packages behind sources, which raise errors of many types
            self.problems.append(f"cannot be read: {one_line(error, 300)}")

    def ask_hub(self, repo: str, gated: bool | None, revision: str | None) -> None:
        """Asks for the commit and the gate. gated: as the catalogue has it, if it says so."""
        from huggingface_hub import HfApi

        with explained(repo, "dataset", revision):
            info = patiently(lambda: HfApi().dataset_info(repo, revision=revision), repo)
        self.entry["commit"], self.entry["gated"] = info.sha, bool(info.gated)
        if gated is not None and bool(info.gated) != gated:
            self.problems.append("gated now" if info.gated else "not gated any more")


def _repo_of(source: Source) -> str | None:
    if source.huggingface is not None:
        return source.huggingface
    path = hub_path(source.path or "")
    return None if path is None else path.repo


def _compare_names(found: _Found, entry: dict[str, Any], sources: Iterable[Source]) -> None:
    """Notes the languages whose name the corpus does not have."""
    template = entry["source"].get("path", "")
    missing = []
    for source in sources:
        path = hub_path(source.path or "")
        if path is not None and "{configuration}" in template:
            # The part of the path with the name of the language, in the listing of the folder above it.
            parts_of_template = (hub_path(template) or path).path.split("/")
            depth = ["{configuration}" in part for part in parts_of_template].index(True)
            parts_of_path = path.path.split("/")
            # One listing of the folder answers for all languages.
            there = names_in(path, "/".join(parts_of_path[:depth]))
            # A folder's name ends with a slash in the listing.
            wanted = re.compile(re.escape(parts_of_path[depth]).replace(r"\*", ".*") + "/?")
            if not any(wanted.fullmatch(name) for name in there):
                missing.append(f"{source.language} ({parts_of_path[depth]})")
        elif source.path is not None and is_list(source.path):
            try:
                web_file_of(source.path)
            except BadInput:
                missing.append(f"{source.language} ({source.path.rsplit('/', 1)[-1]})")
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        found.problems.append(f"has no {', '.join(missing[:_SHOWN])}{more}")


def _first_there(sources: Sequence[Source]) -> Source:
    """The first source that has files; the last one if none has."""
    # One language without files must not hide what the corpus has of the others.
    for source in sources[:-1]:
        try:
            parts(source)
            return source
        except BadInput:
            continue
    return sources[-1]


def _compare_columns(found: _Found, source: Source, needed: Sequence[str]) -> None:
    """Reads one row, and notes the columns that it does not have."""
    part = parts(source)[0]
    # All columns of a Parquet file are read, not only those of the source.
    records = parquet_rows(part) if part.endswith(".parquet") else read_records(source, part)
    record = next(iter(itertools.islice(records, 1)), None)
    if record is None:
        found.problems.append("its first file has no row")
        return
    _, row = record
    if isinstance(row, BadRowError):
        found.problems.append(f"its first row cannot be read: {row}")
        return
    columns = [str(column) for column in row]
    found.entry["columns"] = columns
    missing = [column for column in needed if column not in columns]
    if missing:
        found.problems.append(f"no column {', '.join(missing)}; it has {', '.join(columns)}")
