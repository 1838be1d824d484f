"""Raw text to packed datasets: `prepare` cleans, removes duplicates, holds out, tokenizes, packs and writes.

Where the settings ask for cleaning or deduplication, refinement.py first turns the sources into cleaned
shards, which are read in their place. Rows are read twice, first to decide what becomes of them (survey.py),
then once for each kind to write it, so that memory does not hold the text. Each dataset appears whole under
its final name; a `prepare` that was stopped goes on with what is missing.
"""

import dataclasses
import functools
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from babel_jax.config import BadRows, DataSettings, Engine, Settings, Source
from babel_jax.data.json_files import read_json
from babel_jax.data.refining.cleaned_parts import cleaned_folder, remove_aside, sources_of
from babel_jax.data.refining.engines import open_workers
from babel_jax.data.refining.refinement import refine, refined_counts, refined_rows
from babel_jax.data.refining.shards import part_counts
from babel_jax.data.sources.origins import changed_text, file_digest, origin_of
from babel_jax.data.sources.records import parts
from babel_jax.data.sources.rows import Row, RowCounts, read_rows
from babel_jax.data.tokens.tokenizers import Tokenizer, open_tokenizer
from babel_jax.data.windows.datasets import opened_chat_format, write_dataset, write_json
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
from babel_jax.files import PARTIAL, make_folder, remove_left_files, write_text
from babel_jax.languages import CODES
from babel_jax.lease import NAME as LEASE
from babel_jax.lease import alone_in
from babel_jax.new_folders import remove_mark
from babel_jax.places import place, url_of
from babel_jax.sending import drafted

log = logging.getLogger("babel")

FORMAT = 1


def prepare(
    settings: DataSettings, tokenizer: Path | str | None = None, recheck: bool = False
) -> dict[str, Any]:
    """Makes, or goes on making, the datasets in `settings.folder`; `prepared.py` describes the folder.

    With `recheck` the text that was read before is read again, to compare digests, though the sizes and times
    of its files are the same. `tokenizer` is where the tokenizer is when the settings do not say (the run's
    model folder). Returns what prepared.json holds: {"seq_len", "tokenizer": {"fingerprint", "vocab_size",
    "eos_id", "begin_ids"}, "languages": {code: {"rows", "bad", "empty", "located", "duplicates", "overlaps",
    "reserved", "heldout_documents", "heldout_bytes", "kinds": {kind: {"tokens", "documents", "bytes",
    "windows"}}}}}, and where text was refined "cleaning" in each language, what became of the documents of
    each source (see `refined_counts`). Raises BadInput for unusable input, a language without usable text, a
    folder made with other settings, and a full disk.
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
    _opened.cache_clear()  # what lies at the path may have changed
    opened_chat_format.cache_clear()
    opened = _opened(str(path), settings.add_bos_token)
    path = place(path)
    settings = settings.model_copy(update={"tokenizer": str(path), "folder": str(folder)})
    made_from = {
        "format": FORMAT,
        "tokenizer": opened.fingerprint,
        "seq_len": settings.seq_len,
        "heldout_fraction": settings.heldout_fraction,
        "heldout_bytes": settings.heldout_bytes,
        **_beginning(settings, opened),
        **{
            name: _dumped(getattr(settings, name))
            for name in ("cleaning", "decontamination", "deduplication")
        },
        "evaluation_files": _evaluation_files(settings),
    }
    if url_of(folder) is None:
        make_folder(folder)
    with drafted(folder, is_no_window), alone_in(folder, wait=True):
        return _prepared(settings, folder, opened, made_from, recheck)


def _evaluation_files(settings: DataSettings) -> dict[str, str] | None:
    """The digests of the evaluation files, since other files find other documents."""
    if settings.decontamination is None:
        return None
    files = [
        file for path in settings.decontamination.paths for file in parts(Source(language="en", path=path))
    ]
    return {file: file_digest(file) for file in files}


@functools.lru_cache(maxsize=1)
def _opened(path: str, add_bos_token: bool | None) -> Tokenizer:
    """A tokenizer, opened once for all languages of a process."""
    return open_tokenizer(path, add_bos_token)


def _beginning(settings: DataSettings, opened: Tokenizer) -> dict[str, Any]:
    """What decides how each conversation, or each document, begins."""
    if settings.conversations:
        return {"chat_template": opened_chat_format(settings.tokenizer, settings.chat_template).fingerprint}
    return {"begin_ids": opened.begin_ids or None}


def _dumped(settings: Settings | None) -> dict[str, Any] | None:
    return None if settings is None else settings.model_dump(mode="json")


def _is_refined(settings: DataSettings) -> bool:
    return any(
        stage is not None for stage in (settings.cleaning, settings.decontamination, settings.deduplication)
    )


def _prepared(
    settings: DataSettings, folder: Path, opened: Tokenizer, made_from: dict[str, Any], recheck: bool = False
) -> dict[str, Any]:
    _claim(folder, made_from)
    languages = [code for code in CODES if any(source.language == code for source in settings.sources)]
    entries = {}
    last = [folder / REPORT, folder / SUMS, *(language_file(folder, code) for code in languages)]
    left = not all(path.is_file() for path in last)
    # This process alone writes here, so these are what killed ones left.
    if left:
        _remove_leftovers(folder)
    with open_workers(*((settings.engine, settings.workers) if left else (Engine.LOCAL, 1))) as workers:
        if _is_refined(settings):
            refine(
                settings,
                [code for code in languages if not language_file(folder, code).is_file()],
                workers,
                recheck,
            )
        tasks = [_LanguageTask(settings, code, recheck) for code in languages]
        for task, entry in tqdm(
            workers.run(_prepare_language, tasks), "prepare", len(tasks), unit=" languages", disable=None
        ):
            entries[task.language] = entry
    for code in languages:
        _tell(code, entries[code], settings)
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
    # Text that is prepared already may be on a disk that cannot be written to.
    if not (folder / REPORT).is_file() or read_json(folder / REPORT) != report:
        (folder / SUMS).unlink(missing_ok=True)
        write_json(folder / REPORT, report)
    if not (folder / SUMS).is_file() and os.access(folder, os.W_OK):
        beside = [
            path for code in languages for path in (language_file(folder, code), heldout_file(folder, code))
        ]
        write_sums(folder, [folder / SETTINGS, folder / REPORT, *beside])
    return report


def _remove_leftovers(folder: Path) -> None:
    for code in CODES:
        remove_aside(folder, code)
    remove_left_files(folder.rglob(f"*{PARTIAL}"))
    for partial in list(folder.rglob(f"*{PARTIAL}")):
        if partial.is_dir() and not any(partial.iterdir()):
            partial.rmdir()  # `new_folder` removes those that are not empty
    for counts in folder.glob(f"windows/*/{COUNTS}"):
        if counts.parent.suffix != PARTIAL:
            remove_mark(counts.parent)


def _tell(language: str, entry: dict[str, Any], settings: DataSettings) -> None:
    """Says what was not taken as it stands in the sources: bad rows, and conversations that do not fit into a
    window.
    """
    if entry["bad"]:
        log.warning(
            "%s: %d of %d rows are bad and were skipped, such as %s",
            language,
            entry["bad"],
            entry["rows"],
            entry["located"][0],
        )
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


def _claim(folder: Path, made_from: dict[str, Any]) -> None:
    """Writes what the folder is made from, or raises BadInput when it was begun from something else."""
    if not (folder / SETTINGS).is_file():
        with explain_os_errors(folder):
            if any(path.suffix != PARTIAL and path.name != LEASE for path in folder.iterdir()):
                raise BadInput(
                    f"{folder}: exists and is no folder of prepared data; give another data.folder or "
                    "remove it first"
                )
        write_json(folder / SETTINGS, made_from)
        return
    before = read_json(folder / SETTINGS)
    # Earlier versions did not keep the digests of evaluation files.
    before.setdefault("evaluation_files", made_from.get("evaluation_files"))
    changed = _changes(before, made_from)
    if changed:
        raise BadInput(
            f"{folder}: prepared with another {' and another '.join(changed)}; give another data.folder or "
            "remove this one"
        )


def _changes(before: dict[str, Any], now: dict[str, Any], within: str = "") -> list[str]:
    """The settings that differ, each with both values."""
    found = []
    for name, value in now.items():
        earlier = before.get(name)
        if isinstance(value, dict) and isinstance(earlier, dict):
            found += _changes(earlier, value, f"{name}.")
        elif value != earlier:
            then, this = (
                "on" if isinstance(one, dict) else "off" if one is None else one for one in (earlier, value)
            )
            found.append(f"{within}{name} (then {then}, now {this})")
    return found


@dataclasses.dataclass(frozen=True)
class _LanguageTask:
    """One language to hold out from, tokenize and pack; `settings.tokenizer` is set."""

    settings: DataSettings
    language: str
    recheck: bool = False


def _prepare_language(task: _LanguageTask) -> dict[str, Any]:
    """Does what is missing of one language and returns its part of the report."""
    settings, language = task.settings, task.language
    assert settings.tokenizer is not None
    tokenizer = _opened(settings.tokenizer, settings.add_bos_token)
    folder = Path(settings.folder)
    known = language_file(folder, language)
    surveyed = None
    if not known.is_file():
        made_from = _made_from(
            settings, language
        )  # before the text is read: what changes meanwhile is noticed the next time
        surveyed, counts = _survey(settings, language)
        heldout = heldout_file(folder, language)
        _write_heldout(heldout, surveyed.heldout)
        write_json(known, {**counts, "heldout_sha256": file_sum(heldout, stored=False), "sources": made_from})
    entry = read_json(known)
    if (changed := _changed(settings, language, entry["sources"], task.recheck)) is not None:
        raise BadInput(
            f"{folder}: {language} was prepared from other text than data.sources now names ({changed}); "
            "give another data.folder or "
            "remove this one"
        )
    if entry["bad"] and settings.bad_rows is BadRows.REFUSE:
        raise BadInput(
            f"{folder}: {language} was prepared with {entry['bad']} bad rows skipped: {entry['located'][0]}"
        )
    entry["kinds"] = {}
    for kind in entry["training_documents"]:
        dataset = dataset_folder(folder, language, kind)
        if not (dataset / COUNTS).is_file():
            surveyed = surveyed or _survey(settings, language)[0]
            rows = surveyed.training_rows(_rows(settings, language, RowCounts()), kind)
            write_dataset(dataset, settings, language, kind, rows, surveyed.documents[kind], tokenizer)
        entry["kinds"][kind] = read_json(dataset / COUNTS)
    return entry


def _made_from(settings: DataSettings, language: str) -> list[dict[str, Any]]:
    """The sources of a language with the origin of their text, so that text that has changed is not taken for
    the text that was read.
    """
    known: dict[str, Any] = {}
    if _is_refined(settings):
        for counts in part_counts(cleaned_folder(settings, language)):
            known |= counts["made_from"].get("files", {})
    return [
        {**source.model_dump(mode="json"), **origin_of(source, known=known)}
        for source in sources_of(settings, language)
    ]


def _changed(
    settings: DataSettings, language: str, before: list[dict[str, Any]], recheck: bool
) -> str | None:
    """The first file, or what else of the sources of a language has changed; None where
    its text is the same.
    """
    sources = sources_of(settings, language)
    if len(sources) != len(before):
        return f"then {len(before)} sources, now {len(sources)}"
    changes = [
        changed_text(one, source, recheck=recheck) for one, source in zip(before, sources, strict=True)
    ]
    return next((f"changed: {change}" for change in changes if change is not None), None)


def _survey(settings: DataSettings, language: str) -> tuple[Survey, dict[str, Any]]:
    counts = RowCounts()
    rows = tqdm(
        _rows(settings, language, counts), f"read {language}", unit=" rows", leave=False, disable=None
    )
    surveyed = survey(
        rows,
        settings.heldout_fraction,
        settings.heldout_bytes,
        are_distinct=settings.deduplication is not None,
    )
    duplicates = surveyed.duplicates
    cleaning: dict[str, dict[str, Any]] = {}
    dropped = ""
    if _is_refined(settings):
        counts, cleaning, removed = refined_counts(settings, language)
        duplicates += removed
        reasons = sum((Counter(found["dropped"]) for found in cleaning.values()), Counter[str]())
        dropped = f", {reasons.total()} dropped in cleaning" + "".join(
            f", {number} of them by {rule}" for rule, number in reasons.most_common(1)
        )
    if not surveyed.documents:
        raise BadInput(
            f"language {language}: no text to train on: of {counts.rows} rows {counts.bad} are bad, "
            f"{counts.empty} empty{dropped}, "
            f"{duplicates} duplicates and {len(surveyed.heldout) + surveyed.reserved} held out"
            + "".join(f"; {place}" for place in counts.located[:1])
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
    if _is_refined(settings):
        return refined_rows(settings, language)
    check = None
    if settings.conversations:
        assert settings.tokenizer is not None
        check = opened_chat_format(settings.tokenizer, settings.chat_template).check
    sources = sources_of(settings, language)
    return itertools.chain.from_iterable(
        read_rows(source, settings.bad_rows, counts, check=check) for source in sources
    )


def _write_heldout(path: Path, rows: Sequence[Row]) -> None:
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    kept = [
        {
            "id": row.id,
            "text": row.text,
            "kind": row.kind,
            **({} if row.score is None else {"score": row.score}),
        }
        for row in rows
    ]
    write_text(path, "".join(json.dumps(values, ensure_ascii=False) + "\n" for values in kept))
