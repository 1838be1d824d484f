"""Raw text to cleaned shards without duplicates, as tasks that write files: clean each part, pair each bucket
of each band, remove by language.

Each task writes its files in one step, so a run that was stopped resumes with the missing tasks. Memory is
bounded by a shard, a bucket of documents, or the duplicates of a language. `cleaned_parts.py` and
`duplicates.py` have the tasks.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from babel_jax.config import DataSettings
from babel_jax.data.json_files import read_json
from babel_jax.data.refining.cleaned_parts import (
    clean_part,
    cleaned_folder,
    cleaning_tasks,
    forget_other_text,
    sources_of,
)
from babel_jax.data.refining.decontamination import evaluation_text
from babel_jax.data.refining.duplicates import (
    PairingTask,
    RemovalTask,
    pair_bucket,
    pairing_tasks,
    remove_duplicates,
)
from babel_jax.data.refining.engines import Workers
from babel_jax.data.refining.reasons import EXAMPLES
from babel_jax.data.refining.shards import SKETCHES, part_counts, shards_of
from babel_jax.data.sources.rows import Row, RowCounts
from babel_jax.disk_errors import explain_os_errors
from babel_jax.files import remove_folder
from babel_jax.progress import Work


def refine(settings: DataSettings, languages: Sequence[str], workers: Workers, recheck: bool = False) -> None:
    """Cleans and deduplicates the text of some languages; tasks that are done are skipped.

    Raises BadInput for text that cannot be read, a full disk, and worker processes that are killed
    repeatedly.
    """
    folder = Path(settings.folder)
    with explain_os_errors(folder):
        for code in languages:
            cleaned_folder(settings, code).mkdir(parents=True, exist_ok=True)
    # Read here, so that an error in the files is raised before any work is done.
    if settings.decontamination is not None:
        evaluation_text(settings.decontamination)

    cleaning = {code: cleaning_tasks(settings, code) for code in languages}
    for code, tasks in cleaning.items():
        forget_other_text(settings, code, tasks, recheck)
    _run(clean_part, list(itertools.chain.from_iterable(cleaning.values())), workers, "clean", "parts")
    if settings.deduplication is None:
        return

    # A language whose duplicates were removed needs no pairs, and the arrays to find them are deleted.
    removals = [RemovalTask(settings, code) for code in languages]
    removals = [task for task in removals if not task.done.is_file()]
    pairing: list[PairingTask] = []
    for removal in removals:
        pairing += pairing_tasks(settings, removal.language)
    _run(pair_bucket, pairing, workers, "find duplicates", "buckets")
    _run(remove_duplicates, removals, workers, "remove duplicates", "languages")

    # The arrays to compare documents are needed no longer.
    for code in languages:
        remove_folder(folder / "links" / code)
        for shard in shards_of(cleaned_folder(settings, code)):
            for name in SKETCHES:
                shard.beside(name).unlink(missing_ok=True)


def refined_rows(settings: DataSettings, language: str) -> Iterator[Row]:
    """The documents of a language that remain, in the order of sources, parts and documents."""
    for shard in shards_of(cleaned_folder(settings, language)):
        yield from shard.rows()


def refined_counts(settings: DataSettings, language: str) -> tuple[RowCounts, dict[str, dict[str, Any]], int]:
    """The fate of a language's rows: counts of reading, counts by source, and the number of duplicates.

    By source: {"licence", "documents": read, "kept": left after cleaning and duplicates, "characters": left
    after cleaning, "dropped": {rule: documents}, "masked": {kind of data: times}, "evaluation": {file:
    documents}, "duplicates": {"exact", "near"}, "examples": {rule: the beginnings of some dropped
    documents}}, and with the rule `language` "identified_by": what decides about the language.
    """
    folder = cleaned_folder(settings, language)
    rows = RowCounts()
    sources: dict[str, dict[str, Any]] = {}
    removed = read_json(RemovalTask(settings, language).done) if settings.deduplication is not None else {}
    for counts in part_counts(folder):
        rows.add(RowCounts(**counts["rows"]))
        # A source has several parts, whose counts are added.
        label = counts["source"]
        names = ("documents", "kept", "characters", "dropped", "masked", "evaluation")
        of_part = {name: counts[name] for name in names}
        # Parts of an earlier version kept no examples.
        of_part["examples"] = counts.get("examples", {})
        if "identified_by" in counts:
            of_part["identified_by"] = counts["identified_by"]
        sources[label] = _added(sources[label], of_part) if label in sources else of_part

    # Duplicates are known by source only after all parts were compared.
    for source in sources_of(settings, language):
        duplicates = removed.get(source.label, {"exact": 0, "near": 0})
        entry = sources[source.label]
        # Two sources may have the same label: its duplicates count once.
        if "duplicates" not in entry:
            sources[source.label] = {
                "licence": source.licence,
                **entry,
                "kept": entry["kept"] - sum(duplicates.values()),
                "duplicates": duplicates,
            }
    return rows, sources, sum(sum(duplicates.values()) for duplicates in removed.values())


def _added(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """The sums of two sets of counts with the same keys; a count is a number or a table of numbers. Of the
    examples, the first of each rule are kept.
    """
    sums: dict[str, Any] = {}
    for key, value in left.items():
        if key == "examples":
            rules = sorted({*value, *right[key]})
            sums[key] = {rule: [*value.get(rule, []), *right[key].get(rule, [])][:EXAMPLES] for rule in rules}
        elif isinstance(value, str):
            sums[key] = value
        elif isinstance(value, dict):
            sums[key] = dict(sorted((Counter(value) + Counter(right[key])).items()))
        else:
            sums[key] = value + right[key]
    return sums


def _run(function: Any, tasks: Sequence[Any], workers: Workers, label: str, unit: str) -> None:
    """Runs the tasks that are not done, with a progress bar."""
    missing = [task for task in tasks if not task.done.is_file()]
    done = len(tasks) - len(missing)
    with Work[Any](label, total=len(tasks), initial=done, unit=unit, keep=True) as progress:
        for _ in workers.run(function, missing):
            progress.update()
