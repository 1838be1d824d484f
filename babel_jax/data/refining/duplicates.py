"""Which cleaned documents of a language are duplicates: tasks that find the pairs of each bucket of each
band, and one that removes.

links/xx/BB-NNNNN.npy       pairs found in a bucket of a band, until they are resolved
cleaned/xx/duplicates.json  how many of each source were removed; written when that is done
duplicates/xx.jsonl.zst     each removed document's id and source, those of the copy that stayed, and whether
it was exact or near
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
from jaxtyping import Bool, Int64

from babel_jax.config import DataSettings
from babel_jax.data.refining.cleaned_parts import DUPLICATES, cleaned_folder, sources_of
from babel_jax.data.refining.deduplication import components, links_in_band, survivors
from babel_jax.data.refining.shards import json_lines, shards_of, write_array, write_file
from babel_jax.disk_errors import explain_os_errors

_PAIRS_AT_ONCE = 1 << 16


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


class _Documents:
    """The documents of all shards of a language, numbered through."""

    def __init__(self, settings: DataSettings, language: str):
        self.shards = shards_of(cleaned_folder(settings, language))
        self.starts = np.concatenate([[0], np.cumsum([shard.documents for shard in self.shards])]).astype(
            np.int64
        )

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


def pairing_tasks(settings: DataSettings, language: str) -> list[PairingTask]:
    """A task for each bucket of each band of a language, whose parts are cleaned."""
    assert settings.deduplication is not None
    documents = sum(shard.documents for shard in shards_of(cleaned_folder(settings, language)))
    buckets = max(1, -(-documents // settings.deduplication.bucket_documents))
    bands = 1 + (settings.deduplication.bands if settings.deduplication.near else 0)
    return [
        PairingTask(settings, language, band, bucket, buckets)
        for band in range(bands)
        for bucket in range(buckets)
    ]


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


def _are_alike(
    documents: _Documents, task: PairingTask, one: np.ndarray, other: np.ndarray
) -> Bool[np.ndarray, "n"]:
    assert task.settings.deduplication is not None
    if task.band == 0:
        return (
            documents.gather("documents", one)["digest"] == documents.gather("documents", other)["digest"]
        ).all(1)
    same = documents.gather("signatures", one) == documents.gather("signatures", other)
    return same.mean(1) >= task.settings.deduplication.similarity


def remove_duplicates(task: RemovalTask) -> None:
    """Marks the documents of a language to be removed, writes the record of them, and last the counts."""
    settings, folder = task.settings, Path(task.settings.folder)
    documents = _Documents(settings, task.language)
    linked, component = components(_links(sorted((folder / "links" / task.language).glob("*.npy"))))
    counts: dict[str, Counter[str]] = {}
    removed = np.empty(0, np.int64)
    with explain_os_errors(folder), json_lines(folder / "duplicates" / f"{task.language}.jsonl.zst") as write:
        if len(linked):
            about, (ids, sources) = documents.gather("documents", linked), _names(documents, linked)
            weights = {source.label: source.weight for source in sources_of(settings, task.language)}
            weight = np.array([weights[label] for label in sources.dictionary.to_pylist()])[
                sources.indices.to_numpy()
            ]
            kept = survivors(component, weight, about["score"], about["length"].astype(np.int64))
            is_removed = kept != np.arange(len(linked))
            removed = linked[is_removed]
            order = np.concatenate([np.flatnonzero(~is_removed), np.flatnonzero(is_removed)])
            is_first = np.zeros(len(linked), bool)  # of its text, those that stay before all others
            is_first[order[np.unique(about["digest"][order], axis=0, return_index=True)[1]]] = True
            for place in np.flatnonzero(is_removed).tolist():
                reason = "near" if is_first[place] else "exact"
                (identifier, source), (kept_id, kept_source) = (
                    (ids[at].as_py(), sources[at].as_py()) for at in (place, kept[place])
                )
                counts.setdefault(source, Counter())[reason] += 1
                write(
                    {
                        "id": identifier,
                        "source": source,
                        "reason": reason,
                        "kept_id": kept_id,
                        "kept_source": kept_source,
                    }
                )
        for number, places in documents.by_shard(removed):
            mask = np.zeros(documents.shards[number].documents, bool)
            mask[removed[places] - documents.starts[number]] = True
            write_array(documents.shards[number].beside("removed"), mask)
        by_source = {
            label: {"exact": found["exact"], "near": found["near"]} for label, found in sorted(counts.items())
        }
        write_file(
            task.done,
            lambda file: file.write(json.dumps(by_source, indent=2, ensure_ascii=False).encode() + b"\n"),
        )


def _links(files: Sequence[Path]) -> Int64[np.ndarray, "links 2"]:
    """The pairs in all files, each once: most pairs are found in many bands, so that all together would take
    many times the memory.
    """
    found, waiting, more = np.empty((0, 2), np.int64), [], 0
    for file in files:
        waiting.append(np.load(file))
        more += len(waiting[-1])
        if more > max(len(found), _PAIRS_AT_ONCE) or file is files[-1]:
            found, waiting, more = np.unique(np.concatenate([found, *waiting]), axis=0), [], 0
    return found


def _names(
    documents: _Documents, linked: Int64[np.ndarray, "n"]
) -> tuple[pyarrow.StringArray, pyarrow.DictionaryArray]:
    """The id and source of each document, which are ascending; as Arrow's arrays they take little more than
    their letters.
    """
    found = []
    for number, places in documents.by_shard(linked):
        wanted, first = linked[places] - documents.starts[number], 0
        for batch in documents.shards[number].batches(["id", "source"]):
            inside = wanted[(wanted >= first) & (wanted < first + len(batch))] - first
            found.append(batch.select(["id", "source"]).take(pyarrow.array(inside)))
            first += len(batch)
    table = pyarrow.Table.from_batches(found).combine_chunks()
    return table["id"].combine_chunks(), table["source"].combine_chunks().dictionary_encode()
