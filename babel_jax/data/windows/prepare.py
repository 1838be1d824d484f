"""Raw text to packed datasets: `prepare` cleans, removes duplicates, holds out, tokenizes, packs and writes.

If the settings ask for cleaning, decontamination or deduplication, refinement.py first turns the sources into
cleaned shards, and `prepare` reads these. Rows are read once to decide about each (survey.py), then once for
each kind to write it, so that the text need not fit into memory. Each dataset appears whole under its final
name. A `prepare` that was stopped resumes with the missing parts.
"""

import dataclasses
import functools
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from babel_jax.config import BadRows, DataSettings, Engine
from babel_jax.data.json_files import read_json
from babel_jax.data.refining.cleaned_parts import remove_aside, sources_of
from babel_jax.data.refining.engines import open_workers
from babel_jax.data.refining.identification import BY_SOURCE
from babel_jax.data.refining.reasons import dropped_in_words, losses
from babel_jax.data.refining.refinement import refine, refined_counts, refined_rows
from babel_jax.data.sources.records import source_files
from babel_jax.data.sources.revisions import REVISIONS, pinned_sources
from babel_jax.data.sources.rows import Row, RowCounts, read_rows
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.data.tokens.tokenizers import open_tokenizer, tokenizer_place
from babel_jax.data.windows.datasets import opened_chat_format, write_dataset, write_json
from babel_jax.data.windows.made_from import (
    claim,
    first_change,
    is_refined,
    made_from,
    origins_of_sources,
)
from babel_jax.data.windows.prepared import (
    COUNTS,
    REPORT,
    SETTINGS,
    dataset_folder,
    heldout_file,
    is_no_window,
    language_file,
)
from babel_jax.data.windows.survey import Survey, survey
from babel_jax.digests import SUMS, file_sum, write_sums
from babel_jax.disk_errors import explain_os_errors
from babel_jax.errors import BadInput
from babel_jax.files import make_folder, remove_left_files, write_text
from babel_jax.languages import declared, in_order, to_values
from babel_jax.lease import alone_in, alone_in_bucket
from babel_jax.new_folders import remove_mark
from babel_jax.places import PARTIAL, place, url_of
from babel_jax.progress import Work
from babel_jax.sending import drafted

log = logging.getLogger("babel")

_FEWEST_HELDOUT = 6  # documents of a language


def prepare(
    settings: DataSettings, tokenizer: Path | str | None = None, recheck: bool = False
) -> dict[str, Any]:
    """Makes the missing datasets in `settings.folder`; `prepared.py` describes the folder.

    tokenizer: the path used if `settings.tokenizer` is not set (the run's model folder). recheck: read the
    source files again and compare digests, even if their sizes and times are unchanged.

    Returns the content of prepared.json: {"seq_len", "tokenizer": {"fingerprint", "vocab_size", "eos_id",
    "begin_ids"}, "languages": {code: {"rows", "bad", "empty", "located", "duplicates", "overlaps",
    "reserved", "heldout_documents", "heldout_bytes", "kinds": {kind: {"tokens", "documents", "bytes",
    "windows"}}}}}. If text was refined, each language also has "cleaning", the counts of each source (see
    `refined_counts`).

    Raises BadInput for unusable input, a language without usable text, a folder made with other settings, and
    a full disk.
    """
    folder = place(settings.folder)
    path = settings.tokenizer or tokenizer
    if path is None:
        raise BadInput(
            "data.tokenizer is not set and there is no model folder to take one from; name a model folder "
            "or a tokenizer file"
        )
    if not settings.sources:
        raise BadInput("data.sources is empty; name at least one source of text")

    # The files at the path may have changed since an earlier call in this process.
    _opened.cache_clear()
    opened_chat_format.cache_clear()
    opened = _opened(str(path), settings.add_bos_token)
    path = tokenizer_place(path)
    settings = settings.model_copy(update={"tokenizer": str(path), "folder": str(folder)})

    # What decides the windows is written before the first window is.
    claimed = made_from(settings, opened)

    if url_of(folder) is None:
        make_folder(folder)
    with drafted(folder, is_no_window, alone_in_bucket), alone_in(folder, wait=True):
        return _prepared(settings, folder, opened, claimed, recheck)


@functools.lru_cache(maxsize=1)
def _opened(path: str, add_bos_token: bool | None) -> Tokenizer:
    """A tokenizer, opened once for all languages of a process."""
    return open_tokenizer(path, add_bos_token)


def _prepared(
    settings: DataSettings, folder: Path, opened: Tokenizer, claimed: dict[str, Any], recheck: bool = False
) -> dict[str, Any]:
    # Languages are independent of each other: a language is done when its file is there.
    claim(folder, claimed)
    # An earlier version wrote complete folders without the commits of data sets.
    if (folder / REVISIONS).is_file() or not (folder / REPORT).is_file():
        sources = pinned_sources(settings.sources, folder)
        settings = settings.model_copy(update={"sources": sources})
    languages = in_order(source.language for source in settings.sources)
    missing = [code for code in languages if not language_file(folder, code).is_file()]
    is_complete = not missing and (folder / REPORT).is_file() and (folder / SUMS).is_file()

    # A complete folder is only read: it needs no cluster of workers.
    engine, count = (Engine.LOCAL, 1) if is_complete else (settings.engine, settings.workers)
    # This process alone writes here, so all partial files come from killed processes.
    if not is_complete:
        _remove_leftovers(folder, languages)
    entries = {}
    with open_workers(engine, count) as workers:
        if is_refined(settings):
            refine(settings, missing, workers, recheck)
        tasks = [_LanguageTask(settings, code, recheck) for code in languages]
        results = workers.run(_prepare_language, tasks)
        for task, entry in Work("prepare", results, total=len(tasks), unit="languages", keep=True):
            entries[task.language] = entry
    for code in languages:
        _warn_about_losses(code, entries[code], settings)
    _tell_of_labels(entries)
    _warn_about_few_heldout(entries, settings)

    # The report is the same, to the byte, however many workers there were: languages are in a fixed order.
    report = {
        "seq_len": settings.seq_len,
        "tokenizer": {
            "fingerprint": opened.fingerprint,
            "vocab_size": opened.vocab_size,
            "eos_id": opened.eos_id,
            "begin_ids": opened.begin_ids,
        },
        "languages": {code: entries[code] for code in languages},
    }
    # For commands that read the folder without the config.
    if own := [one for one in declared() if one.code in entries]:
        report["declared"] = to_values(own)

    # A complete folder may be on a read-only disk: write only if something changed.
    if not (folder / REPORT).is_file() or read_json(folder / REPORT) != report:
        (folder / SUMS).unlink(missing_ok=True)
        write_json(folder / REPORT, report)
    if not (folder / SUMS).is_file() and os.access(folder, os.W_OK):
        # Windows have digests of their own, beside them.
        files = [folder / SETTINGS, folder / REPORT]
        for code in languages:
            files += [language_file(folder, code), heldout_file(folder, code)]
        write_sums(folder, files)
    return report


def _remove_leftovers(folder: Path, languages: Sequence[str]) -> None:
    """Removes the partial files and folders that killed processes left."""
    for code in languages:
        remove_aside(folder, code)
    # Files first: the folders that they were in are empty then.
    remove_left_files(folder.rglob(f"*{PARTIAL}"))
    for partial in list(folder.rglob(f"*{PARTIAL}")):
        if partial.is_dir() and not any(partial.iterdir()):
            # `new_folder` removes the others, when it makes their folder again.
            partial.rmdir()
    for counts in folder.glob(f"windows/*/{COUNTS}"):
        if counts.parent.suffix != PARTIAL:
            remove_mark(counts.parent)


def _warn_about_losses(language: str, entry: dict[str, Any], settings: DataSettings) -> None:
    """Logs the text of the sources that is not used: bad rows, documents that cleaning drops, and
    conversations longer than a window.
    """
    if entry["bad"]:
        log.warning(
            "%s: %d of %d rows are bad and were skipped, such as %s",
            language,
            entry["bad"],
            entry["rows"],
            entry["located"][0],
        )
    # A source that cleaning empties is a mistake in the settings more often than bad text.
    cleaning = entry.get("cleaning", {})
    rules = None if settings.cleaning is None else settings.cleaning.model_dump(mode="json")
    for line in losses(cleaning, rules):
        log.warning("%s: more than half of a source is lost: %s", language, line)
    for name, source in cleaning.items():
        if source["dropped"]:
            log.info("%s: %s: dropped %s", language, name, dropped_in_words(source["dropped"], rules))
    for kind, counts in entry["kinds"].items():
        if counts.get("cut"):
            log.warning(
                "%s %s: %d of %d conversations are longer than data.seq_len = %d tokens; they are trained "
                "on without their end",
                language, kind, counts["cut"], counts["documents"], settings.seq_len,
            )  # fmt: skip
        if counts.get("left_out"):
            log.warning(
                "%s %s: %d conversations are left out, since their first %d tokens hold no answer",
                language, kind, counts["left_out"], settings.seq_len,
            )  # fmt: skip


def _tell_of_labels(entries: Mapping[str, dict[str, Any]]) -> None:
    """Logs the languages of whose documents only the label of the source says that they are in it."""
    # One line for all languages: a line for each would hide other messages.
    trusted = []
    for code in in_order(entries):
        sources = entries[code].get("cleaning", {}).values()
        if any(source.get("identified_by") == BY_SOURCE for source in sources):
            trusted.append(code)
    if trusted:
        log.info(
            "the rule `language` trusts the label of the sources in %s: no model knows %s; "
            "data.cleaning.language_model names one",
            " ".join(trusted), "them" if len(trusted) > 1 else "it",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _LanguageTask:
    """One language to survey, tokenize and pack; `settings.tokenizer` is set."""

    settings: DataSettings
    language: str
    recheck: bool = False


def _prepare_language(task: _LanguageTask) -> dict[str, Any]:
    """Makes the missing datasets of one language and returns its part of the report."""
    settings, language = task.settings, task.language
    assert settings.tokenizer is not None
    tokenizer = _opened(settings.tokenizer, settings.add_bos_token)
    folder = Path(settings.folder)
    # The first reading decides about each row; its result is kept for later calls.
    known = language_file(folder, language)
    surveyed = None
    if not known.is_file():
        # Taken before the text is read: a file that changes during the reading is noticed at the next call.
        origins = origins_of_sources(settings, language)
        surveyed, counts = _survey(settings, language)
        heldout = heldout_file(folder, language)
        _write_heldout(heldout, surveyed.heldout)
        write_json(known, {**counts, "heldout_sha256": file_sum(heldout, stored=False), "sources": origins})

    entry = read_json(known)
    if (changed := first_change(settings, language, entry["sources"], task.recheck)) is not None:
        # A path that does not exist is a mistake in the config, and the data is good.
        for source in settings.sources:
            if source.language == language and source.path is not None and "://" not in source.path:
                source_files(source)
        raise BadInput(
            f"{folder}: {language} was prepared from other text than data.sources now names ({changed}); "
            "give another data.folder or remove this one"
        )
    if entry["bad"] and settings.bad_rows is BadRows.REFUSE:
        raise BadInput(
            f"{folder}: {language} was prepared with {entry['bad']} bad rows skipped: {entry['located'][0]}"
        )

    # The second reading writes: once for each kind, so that no kind waits in memory.
    entry["kinds"] = {}
    for kind in entry["training_documents"]:
        dataset = dataset_folder(folder, language, kind)
        if not (dataset / COUNTS).is_file():
            surveyed = surveyed or _survey(settings, language)[0]
            rows = surveyed.training_rows(_rows(settings, language, RowCounts()), kind)
            write_dataset(dataset, settings, language, kind, rows, surveyed.documents[kind], tokenizer)
        entry["kinds"][kind] = read_json(dataset / COUNTS)
    return entry


def _survey(settings: DataSettings, language: str) -> tuple[Survey, dict[str, Any]]:
    """Reads all rows of a language: the decision for each, and the counts for the report.

    Raises BadInput if no row is left to train on.
    """
    counts = RowCounts()
    rows = Work(f"reading {language}", _rows(settings, language, counts), unit="rows")
    surveyed = survey(
        rows,
        settings.heldout_fraction,
        settings.heldout_bytes,
        are_distinct=settings.deduplication is not None,
    )

    # Bad rows of refined text are counted by the refinement alone; duplicates by the refinement and the
    # survey.
    duplicates = surveyed.duplicates
    cleaning: dict[str, dict[str, Any]] = {}
    dropped = ""
    if is_refined(settings):
        counts, cleaning, removed = refined_counts(settings, language)
        duplicates += removed
        reasons = Counter[str]()
        rules = None if settings.cleaning is None else settings.cleaning.model_dump(mode="json")
        for source in cleaning.values():
            reasons += Counter(source["dropped"])
        dropped = f", {reasons.total()} dropped in cleaning"
        if reasons:
            dropped += f" ({dropped_in_words(reasons, rules)})"

    # The message has all counts, so that the user sees which step took the text.
    if not surveyed.documents:
        raise BadInput(
            f"language {language}: no text to train on: of {counts.rows} rows {counts.bad} are bad, "
            f"{counts.empty} empty{dropped}, {duplicates} duplicates and "
            f"{len(surveyed.heldout) + surveyed.reserved} held out"
            + "".join(f"; {location}" for location in counts.located[:1])
        )
    return surveyed, {
        **dataclasses.asdict(counts),
        "duplicates": duplicates,
        "overlaps": surveyed.overlaps,
        "reserved": surveyed.reserved,
        "heldout_documents": len(surveyed.heldout),
        "heldout_bytes": sum(len(row.text.encode()) for row in surveyed.heldout),
        "training_documents": surveyed.documents,
        **({"cleaning": cleaning} if cleaning else {}),
    }


def _rows(settings: DataSettings, language: str, counts: RowCounts) -> Iterator[Row]:
    """The rows of a language: refined if the settings ask for it, else as the sources have them."""
    if is_refined(settings):
        return refined_rows(settings, language)
    # A conversation that its template refuses is a bad row.
    check = None
    # Only conversations are written by a template.
    if settings.conversations:
        assert settings.tokenizer is not None
        check = opened_chat_format(settings.tokenizer, settings.chat_template).check
    sources = sources_of(settings, language)
    return itertools.chain.from_iterable(
        read_rows(source, settings.bad_rows, counts, check=check) for source in sources
    )


def _warn_about_few_heldout(entries: Mapping[str, Mapping[str, Any]], settings: DataSettings) -> None:
    few = [code for code, entry in entries.items() if entry["heldout_documents"] < _FEWEST_HELDOUT]
    if few and settings.heldout_fraction:
        log.warning(
            "%s: fewer than %d held-out documents, so a figure measured on them says little; raise "
            "data.heldout_fraction (%g), or add text",
            ", ".join(few),
            _FEWEST_HELDOUT,
            settings.heldout_fraction,
        )


def _write_heldout(path: Path, rows: Sequence[Row]) -> None:
    # Whole and once: the survey has all held-out rows in memory anyway.
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        values: dict[str, Any] = {"id": row.id, "text": row.text, "kind": row.kind}
        if row.score is not None:
            values["score"] = row.score
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
