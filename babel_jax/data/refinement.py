"""Raw text to cleaned shards without duplicates, as tasks of files: clean each part, pair each bucket of each band, remove by language.

Each task leaves its files in one step, so that a run that was stopped goes on with the tasks that are missing; memory is bounded by a
shard, a bucket of documents, or the duplicates of a language. `shards.py` describes the files; further there are

links/xx/BB-NNNNN.npy       pairs found in a bucket of a band, until they are resolved
cleaned/xx/duplicates.json  how many of each source were removed; written when that is done
duplicates/xx.jsonl.zst     each removed document's id and source, those of the copy that stayed, and whether it was exact or near
dropped/xx/SSS-PPPPP.jsonl.zst  the documents that cleaning dropped, with the reason, where `keep_dropped` is set
"""

import contextlib
import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import zstandard
from jaxtyping import Bool, Int64
from tqdm import tqdm

from babel_jax.config import CleaningSettings, DataSettings, Rule, Source
from babel_jax.data.cleaning import Cleaner
from babel_jax.data.decontamination import evaluation_text
from babel_jax.data.deduplication import components, links_in_band, survivors
from babel_jax.data.engines import Workers
from babel_jax.data.prepared import read_json
from babel_jax.data.records import file_bytes, parts
from babel_jax.data.rows import Row, RowCounts, read_rows
from babel_jax.data.shards import SKETCHES, ShardWriter, part_counts, part_files, shards_of, write_array, write_file
from babel_jax.files import PARTIAL, explain_os_errors, write_text

DUPLICATES = "duplicates.json"
_PAIRS_AT_ONCE = 1 << 16


@dataclasses.dataclass(frozen=True)
class CleaningTask:
    """Cleans one part of the source of this number among the language's; `number` is that of the part."""

    settings: DataSettings
    language: str
    source: int
    number: int
    part: str

    @property
    def stem(self) -> Path:
        """Where its files go, without a suffix."""
        return cleaned_folder(self.settings, self.language) / f"{self.source:03d}-{self.number:05d}"

    @property
    def done(self) -> Path:
        """The file that says it is done."""
        return self.stem.with_suffix(".json")

    def made_from(self) -> dict[str, Any]:
        """What tells its text from other text: the source's settings, the part, and the bytes of a file."""
        source = _sources(self.settings, self.language)[self.source]
        size = file_bytes(self.part) if source.path is not None else None
        return {**source.model_dump(mode="json"), "part": self.part, "bytes": size}


@dataclasses.dataclass(frozen=True)
class PairingTask:
    """Finds the pairs of one band of a language whose keys fall into bucket `bucket` of `buckets`."""

    settings: DataSettings
    language: str
    band: int
    bucket: int
    buckets: int

    @property
    def done(self) -> Path:
        """The file that it writes."""
        return Path(self.settings.folder) / "links" / self.language / f"{self.band:02d}-{self.bucket:05d}.npy"


@dataclasses.dataclass(frozen=True)
class RemovalTask:
    """Decides which documents of a language are removed as duplicates."""

    settings: DataSettings
    language: str

    @property
    def done(self) -> Path:
        """The file that says it is done."""
        return cleaned_folder(self.settings, self.language) / DUPLICATES


def refine(settings: DataSettings, languages: Sequence[str], workers: Workers) -> None:
    """Cleans and deduplicates the text of some languages, as far as that is not done yet.

    Raises BadInput for text that cannot be read, a full disk, and worker processes that are killed again and again.
    """
    folder = Path(settings.folder)
    with explain_os_errors(folder):
        for code in languages:
            cleaned_folder(settings, code).mkdir(parents=True, exist_ok=True)
    if settings.decontamination is not None:
        evaluation_text(settings.decontamination)  # what is wrong with the files is told before any work is done
    cleaning = [task for code in languages for task in _cleaning_tasks(settings, code)]
    for code in languages:
        _forget_other_text(settings, code, [task for task in cleaning if task.language == code])
    _run(clean_part, cleaning, workers, "clean", "parts")
    if settings.deduplication is None:
        return
    left = [code for code in languages if not RemovalTask(settings, code).done.is_file()]
    pairing = [task for code in left for task in _pairing_tasks(settings, code)]
    _run(pair_bucket, pairing, workers, "find duplicates", "buckets")
    _run(remove_duplicates, [RemovalTask(settings, code) for code in left], workers, "remove duplicates", "languages")
    for code in languages:
        shutil.rmtree(folder / "links" / code, ignore_errors=True)
        for shard in shards_of(cleaned_folder(settings, code)):
            for name in SKETCHES:
                shard.beside(name).unlink(missing_ok=True)


def refined_rows(settings: DataSettings, language: str) -> Iterator[Row]:
    """The documents of a language that are left, in the order of sources, parts and documents."""
    for shard in shards_of(cleaned_folder(settings, language)):
        yield from shard.rows()


def refined_counts(settings: DataSettings, language: str) -> tuple[RowCounts, dict[str, dict[str, Any]], int]:
    """What became of a language's rows: as they were read; by source; and how many are duplicates.

    By source: {"licence", "documents" read, "kept" (duplicates not counted), "characters" kept before duplicates were removed, "dropped":
    {rule: documents}, "masked": {what: times}, "evaluation": {file: documents}, "duplicates": {"exact", "near"}}.
    """
    folder = cleaned_folder(settings, language)
    rows = RowCounts()
    sources: dict[str, dict[str, Any]] = {}
    removed = json.loads((folder / DUPLICATES).read_text(encoding="utf-8")) if settings.deduplication is not None else {}
    for counts in part_counts(folder):
        rows.add(RowCounts(**counts["rows"]))
        label = counts["source"]
        found = {key: counts[key] for key in ("documents", "kept", "characters", "dropped", "masked", "evaluation")}
        sources[label] = _added(sources[label], found) if label in sources else found
    for source in _sources(settings, language):
        gone = removed.get(source.label, {"exact": 0, "near": 0})
        entry = sources[source.label]
        if "duplicates" not in entry:
            sources[source.label] = {"licence": source.licence, **entry, "kept": entry["kept"] - sum(gone.values()), "duplicates": gone}
    return rows, sources, sum(sum(gone.values()) for gone in removed.values())


def _added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {
        key: dict(sorted((Counter(value) + Counter(other[key])).items())) if isinstance(value, dict) else value + other[key]
        for key, value in one.items()
    }


def cleaned_folder(settings: DataSettings, language: str) -> Path:
    """Where the shards of a language are."""
    return Path(settings.folder) / "cleaned" / language


def _sources(settings: DataSettings, language: str) -> list[Source]:
    return [source for source in settings.sources if source.language == language]


def _run(function: Any, tasks: Sequence[Any], workers: Workers, label: str, unit: str) -> None:
    left = [task for task in tasks if not task.done.is_file()]
    with tqdm(total=len(tasks), initial=len(tasks) - len(left), desc=label, unit=f" {unit}", disable=None) as progress:
        for _ in workers.run(function, left):
            progress.update()


# --- cleaning ----------------------------------------------------------------------------------------------------------------


def _cleaning_tasks(settings: DataSettings, language: str) -> list[CleaningTask]:
    return [
        CleaningTask(settings, language, number, place, part)
        for number, source in enumerate(_sources(settings, language))
        for place, part in enumerate(parts(source))
    ]


def _forget_other_text(settings: DataSettings, language: str, tasks: Sequence[CleaningTask]) -> None:
    """A run that was stopped may go on with other text: parts that were cleaned from what is no longer there are removed.

    Where duplicates have been looked for, all of the language is done again: what was compared is not the same any more.
    """
    folder, links = cleaned_folder(settings, language), Path(settings.folder) / "links" / language
    wanted = {task.done: task for task in tasks}
    done = part_files(folder)
    other = [path for path in done if path not in wanted or read_json(path).get("made_from") != wanted[path].made_from()]
    was_compared = links.exists() or (folder / DUPLICATES).is_file()
    if not other and (len(done) == len(tasks) or not was_compared):
        return
    with explain_os_errors(folder):
        if was_compared:
            aside = folder.with_name(folder.name + PARTIAL)  # gone in one step
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            folder.mkdir()
            for gone in (links, aside):
                shutil.rmtree(gone, ignore_errors=True)
        else:
            for path in other:
                path.unlink()
                for shard in folder.glob(f"{path.stem}-*"):
                    shard.unlink()


def clean_part(task: CleaningTask) -> None:
    """Writes the shards of one part, what was dropped of it, and last its counts."""
    settings = task.settings
    source = _sources(settings, task.language)[task.source]
    made_from = task.made_from()
    clean = None if settings.cleaning is None else Cleaner(_rules(settings.cleaning, source), task.language)
    evaluation = None if settings.decontamination is None else evaluation_text(settings.decontamination)
    rows = RowCounts()
    dropped, found_in = Counter[str](), Counter[str]()
    documents = characters = 0
    dropped_file = Path(settings.folder) / "dropped" / task.language / f"{task.stem.name}.jsonl.zst"
    keep_dropped = settings.cleaning is not None and settings.cleaning.keep_dropped
    with explain_os_errors(task.stem.parent), _json_lines(dropped_file if keep_dropped else None) as write_dropped:
        writer = ShardWriter(task.stem, settings.shard_documents, settings.deduplication)
        try:
            for row in read_rows(source, settings.bad_rows, rows, task.part):
                documents += 1
                text, rule = clean(row.text) if clean is not None else (row.text, None)
                file = evaluation.file_of(text, task.language) if evaluation is not None and rule is None else None
                if file is not None:
                    rule = Rule.EVALUATION
                    found_in[file] += 1
                if rule is not None:
                    dropped[rule] += 1
                    write_dropped({"reason": rule, "file": file, **dataclasses.asdict(dataclasses.replace(row, text=text))})
                    continue
                characters += len(text)
                writer.add(dataclasses.replace(row, text=text))
            shards = writer.close()
        except BaseException:
            writer.abandon()
            raise
        counts = {
            "source": source.label,
            "made_from": made_from,
            "rows": dataclasses.asdict(rows),
            "documents": documents,
            "kept": documents - dropped.total(),
            "characters": characters,
            "dropped": dict(sorted(dropped.items())),
            "masked": dict(sorted(clean.masked.items())) if clean is not None else {},
            "evaluation": dict(sorted(found_in.items())),
            "shards": [(shard.stem.name, shard.documents) for shard in shards],
        }
    with explain_os_errors(task.done):
        write_text(task.done, json.dumps(counts, indent=2, ensure_ascii=False) + "\n")


def _rules(cleaning: CleaningSettings, source: Source) -> CleaningSettings:
    return cleaning.model_copy(update={"off": (*cleaning.off, *source.off)})


@contextlib.contextmanager
def _json_lines(path: Path | None) -> Iterator[Any]:
    """A function that writes an object as a line into a compressed file, which appears when it is whole; without a path it does nothing."""
    if path is None:
        yield lambda values: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with zstandard.open(partial, "wt", encoding="utf-8") as lines:
            yield lambda values: lines.write(json.dumps(values, ensure_ascii=False) + "\n")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


# --- duplicates --------------------------------------------------------------------------------------------------------------


class _Documents:
    """The documents of all shards of a language, numbered through."""

    def __init__(self, settings: DataSettings, language: str):
        self.shards = shards_of(cleaned_folder(settings, language))
        self.starts = np.concatenate([[0], np.cumsum([shard.documents for shard in self.shards])]).astype(np.int64)

    def gather(self, name: str, documents: Int64[np.ndarray, "n"]) -> np.ndarray:
        """The rows of an array for these documents."""
        found: np.ndarray | None = None
        for number, places in self.by_shard(documents):
            rows = self.shards[number].array(name)[documents[places] - self.starts[number]]
            found = np.empty((len(documents), *rows.shape[1:]), rows.dtype) if found is None else found
            found[places] = rows
        assert found is not None
        return found

    def by_shard(self, documents: Int64[np.ndarray, "n"]) -> Iterator[tuple[int, Int64[np.ndarray, "some"]]]:
        """For each shard that has any of these documents the places at which they stand."""
        shard = np.searchsorted(self.starts, documents, side="right") - 1
        for number in np.unique(shard):
            yield int(number), np.flatnonzero(shard == number)


def _pairing_tasks(settings: DataSettings, language: str) -> list[PairingTask]:
    assert settings.deduplication is not None
    documents = sum(shard.documents for shard in shards_of(cleaned_folder(settings, language)))
    buckets = max(1, -(-documents // settings.deduplication.bucket_documents))
    bands = 1 + (settings.deduplication.bands if settings.deduplication.near else 0)
    return [PairingTask(settings, language, band, bucket, buckets) for band in range(bands) for bucket in range(buckets)]


def pair_bucket(task: PairingTask) -> None:
    """Writes the pairs of like documents in one bucket of one band."""
    assert task.settings.deduplication is not None
    documents = _Documents(task.settings, task.language)
    low, high = (np.uint64(edge * ((1 << 64) - 1) // task.buckets) for edge in (task.bucket, task.bucket + 1))
    keys, numbers = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for start, shard in zip(documents.starts, documents.shards, strict=False):
        if shard.documents:
            sorted_keys = shard.array("keys")[task.band]
            last = len(sorted_keys) if task.bucket == task.buckets - 1 else np.searchsorted(sorted_keys, high)
            inside = slice(np.searchsorted(sorted_keys, low), last)
            keys.append(np.array(sorted_keys[inside]))
            numbers.append(start + shard.array("order")[task.band][inside].astype(np.int64))
    all_keys, all_numbers = np.concatenate(keys), np.concatenate(numbers)
    order = np.argsort(all_keys, kind="stable")

    def are_alike(one: Int64[np.ndarray, "n"], other: Int64[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
        return np.concatenate(
            [
                _are_alike(documents, task, one[at : at + _PAIRS_AT_ONCE], other[at : at + _PAIRS_AT_ONCE])
                for at in range(0, len(one), _PAIRS_AT_ONCE)
            ]
        )

    links = links_in_band(all_keys[order], all_numbers[order], are_alike)
    with explain_os_errors(task.done):
        task.done.parent.mkdir(parents=True, exist_ok=True)
        write_array(task.done, links)


def _are_alike(documents: _Documents, task: PairingTask, one: np.ndarray, other: np.ndarray) -> Bool[np.ndarray, "n"]:
    assert task.settings.deduplication is not None
    if task.band == 0:
        return (documents.gather("documents", one)["digest"] == documents.gather("documents", other)["digest"]).all(1)
    same = documents.gather("signatures", one) == documents.gather("signatures", other)
    return same.mean(1) >= task.settings.deduplication.similarity


def remove_duplicates(task: RemovalTask) -> None:
    """Marks the documents of a language to be removed, writes the record of them, and last the counts."""
    settings, folder = task.settings, Path(task.settings.folder)
    documents = _Documents(settings, task.language)
    linked, component = components(_links(sorted((folder / "links" / task.language).glob("*.npy"))))
    counts: dict[str, Counter[str]] = {}
    removed = np.empty(0, np.int64)
    with explain_os_errors(folder), _json_lines(folder / "duplicates" / f"{task.language}.jsonl.zst") as write:
        if len(linked):
            about, (ids, sources) = documents.gather("documents", linked), _names(documents, linked)
            weights = {source.label: source.weight for source in _sources(settings, task.language)}
            weight = np.array([weights[label] for label in sources.dictionary.to_pylist()])[sources.indices.to_numpy()]
            kept = survivors(component, weight, about["score"], about["length"].astype(np.int64))
            is_removed = kept != np.arange(len(linked))
            removed = linked[is_removed]
            order = np.concatenate([np.flatnonzero(~is_removed), np.flatnonzero(is_removed)])
            is_first = np.zeros(len(linked), bool)  # of its text, those that stay before all others
            is_first[order[np.unique(about["digest"][order], axis=0, return_index=True)[1]]] = True
            for place in np.flatnonzero(is_removed).tolist():
                reason = "near" if is_first[place] else "exact"
                (identifier, source), (kept_id, kept_source) = ((ids[at].as_py(), sources[at].as_py()) for at in (place, kept[place]))
                counts.setdefault(source, Counter())[reason] += 1
                write({"id": identifier, "source": source, "reason": reason, "kept_id": kept_id, "kept_source": kept_source})
        for number, places in documents.by_shard(removed):
            mask = np.zeros(documents.shards[number].documents, bool)
            mask[removed[places] - documents.starts[number]] = True
            write_array(documents.shards[number].beside("removed"), mask)
        by_source = {label: {"exact": found["exact"], "near": found["near"]} for label, found in sorted(counts.items())}
        write_file(task.done, lambda file: file.write(json.dumps(by_source, indent=2, ensure_ascii=False).encode() + b"\n"))


def _links(files: Sequence[Path]) -> Int64[np.ndarray, "links 2"]:
    """The pairs in all files, each once: most pairs are found in many bands, so that all together would take many times the memory."""
    found, waiting, more = np.empty((0, 2), np.int64), [], 0
    for file in files:
        waiting.append(np.load(file))
        more += len(waiting[-1])
        if more > max(len(found), _PAIRS_AT_ONCE) or file is files[-1]:
            found, waiting, more = np.unique(np.concatenate([found, *waiting]), axis=0), [], 0
    return found


def _names(documents: _Documents, linked: Int64[np.ndarray, "n"]) -> tuple[pyarrow.StringArray, pyarrow.DictionaryArray]:
    """The id and source of each document, which are ascending; as Arrow's arrays they take little more than their letters."""
    found = []
    for number, places in documents.by_shard(linked):
        wanted, first = linked[places] - documents.starts[number], 0
        for batch in documents.shards[number].batches(["id", "source"]):
            inside = wanted[(wanted >= first) & (wanted < first + len(batch))] - first
            found.append(batch.select(["id", "source"]).take(pyarrow.array(inside)))
            first += len(batch)
    table = pyarrow.Table.from_batches(found).combine_chunks()
    return table["id"].combine_chunks(), table["source"].combine_chunks().dictionary_encode()
