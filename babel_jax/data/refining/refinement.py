"""Raw text to cleaned shards without duplicates, as tasks of files: clean each part, pair each bucket of each
band, remove by language.

Each task leaves its files in one step, so that a run that was stopped goes on with the tasks that are
missing; memory is bounded by a shard, a bucket of documents, or the duplicates of a language. The tasks are
those of `cleaned_parts.py` and `duplicates.py`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

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
from babel_jax.data.refining.duplicates import RemovalTask, pair_bucket, pairing_tasks, remove_duplicates
from babel_jax.data.refining.engines import Workers
from babel_jax.data.refining.shards import SKETCHES, part_counts, shards_of
from babel_jax.data.sources.rows import Row, RowCounts
from babel_jax.disk_errors import explain_os_errors
from babel_jax.files import remove_folder


def refine(settings: DataSettings, languages: Sequence[str], workers: Workers, recheck: bool = False) -> None:
    """Cleans and deduplicates the text of some languages, as far as that is not done yet.

    Raises BadInput for text that cannot be read, a full disk, and worker processes that are killed again and
    again.
    """
    folder = Path(settings.folder)
    with explain_os_errors(folder):
        for code in languages:
            cleaned_folder(settings, code).mkdir(parents=True, exist_ok=True)
    if settings.decontamination is not None:
        evaluation_text(
            settings.decontamination
        )  # what is wrong with the files is told before any work is done
    cleaning = [task for code in languages for task in cleaning_tasks(settings, code)]
    for code in languages:
        forget_other_text(settings, code, [task for task in cleaning if task.language == code], recheck)
    _run(clean_part, cleaning, workers, "clean", "parts")
    if settings.deduplication is None:
        return
    left = [code for code in languages if not RemovalTask(settings, code).done.is_file()]
    pairing = [task for code in left for task in pairing_tasks(settings, code)]
    _run(pair_bucket, pairing, workers, "find duplicates", "buckets")
    _run(
        remove_duplicates,
        [RemovalTask(settings, code) for code in left],
        workers,
        "remove duplicates",
        "languages",
    )
    for code in languages:
        remove_folder(folder / "links" / code)
        for shard in shards_of(cleaned_folder(settings, code)):
            for name in SKETCHES:
                shard.beside(name).unlink(missing_ok=True)


def refined_rows(settings: DataSettings, language: str) -> Iterator[Row]:
    """The documents of a language that are left, in the order of sources, parts and documents."""
    for shard in shards_of(cleaned_folder(settings, language)):
        yield from shard.rows()


def refined_counts(settings: DataSettings, language: str) -> tuple[RowCounts, dict[str, dict[str, Any]], int]:
    """What became of a language's rows: as they were read; by source; and how many are duplicates.

    By source: {"licence", "documents" read, "kept" (duplicates not counted), "characters" kept before
    duplicates were removed, "dropped": {rule: documents}, "masked": {what: times}, "evaluation": {file:
    documents}, "duplicates": {"exact", "near"}}.
    """
    folder = cleaned_folder(settings, language)
    rows = RowCounts()
    sources: dict[str, dict[str, Any]] = {}
    removed = read_json(RemovalTask(settings, language).done) if settings.deduplication is not None else {}
    for counts in part_counts(folder):
        rows.add(RowCounts(**counts["rows"]))
        label = counts["source"]
        found = {
            key: counts[key] for key in ("documents", "kept", "characters", "dropped", "masked", "evaluation")
        }
        sources[label] = _added(sources[label], found) if label in sources else found
    for source in sources_of(settings, language):
        gone = removed.get(source.label, {"exact": 0, "near": 0})
        entry = sources[source.label]
        if "duplicates" not in entry:
            sources[source.label] = {
                "licence": source.licence,
                **entry,
                "kept": entry["kept"] - sum(gone.values()),
                "duplicates": gone,
            }
    return rows, sources, sum(sum(gone.values()) for gone in removed.values())


def _added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {
        key: dict(sorted((Counter(value) + Counter(other[key])).items()))
        if isinstance(value, dict)
        else value + other[key]
        for key, value in one.items()
    }


def _run(function: Any, tasks: Sequence[Any], workers: Workers, label: str, unit: str) -> None:
    left = [task for task in tasks if not task.done.is_file()]
    with tqdm(
        total=len(tasks), initial=len(tasks) - len(left), desc=label, unit=f" {unit}", disable=None
    ) as progress:
        for _ in workers.run(function, left):
            progress.update()
