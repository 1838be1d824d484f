"""Finds and marks the duplicates among the cleaned documents of a language: tasks that find the pairs of each
bucket of each band, and one task that removes.

    links/xx/BB-NNNNN.npy       the pairs of a bucket of a band, until the duplicates are marked
    cleaned/xx/duplicates.json  the number of removed documents by source; written last
    duplicates/xx.jsonl.zst     id and source of each removed document, id and source of the copy that
                                stays, and "exact" or "near"
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
        """The file that the task writes."""
        return Path(self.settings.folder) / "links" / self.language / f"{self.band:02d}-{self.bucket:05d}.npy"


@dataclasses.dataclass(frozen=True)
class RemovalTask:
    """Decides which documents of a language are removed as duplicates."""

    settings: DataSettings
    language: str

    @property
    def done(self) -> Path:
        """The file that the task writes last."""
        return cleaned_folder(self.settings, self.language) / DUPLICATES


class _Documents:
    """The documents of all shards of a language, with consecutive numbers."""

    def __init__(self, settings: DataSettings, language: str):
        self.shards = shards_of(cleaned_folder(settings, language))
        sizes = [shard.documents for shard in self.shards]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def gather(self, name: str, documents: Int64[np.ndarray, "n"]) -> np.ndarray:
        """The rows of an array for these documents."""
        gathered: np.ndarray | None = None
        for number, indices in self.by_shard(documents):
            rows = self.shards[number].array(name)[documents[indices] - self.starts[number]]
            # The shape and type of a row are known only now.
            if gathered is None:
                gathered = np.empty((len(documents), *rows.shape[1:]), rows.dtype)
            gathered[indices] = rows
        assert gathered is not None
        return gathered

    def by_shard(self, documents: Int64[np.ndarray, "n"]) -> Iterator[tuple[int, Int64[np.ndarray, "some"]]]:
        """For each shard with any of these documents: its number, and the indices of its documents in
        `documents`.
        """
        shard = np.searchsorted(self.starts, documents, side="right") - 1
        for number in np.unique(shard):
            yield int(number), np.flatnonzero(shard == number)


def pairing_tasks(settings: DataSettings, language: str) -> list[PairingTask]:
    """A task for each bucket of each band of a language. The parts of the language must be cleaned."""
    assert settings.deduplication is not None
    # More documents make more buckets, so that the memory of a task stays the same.
    documents = sum(shard.documents for shard in shards_of(cleaned_folder(settings, language)))
    buckets = max(1, -(-documents // settings.deduplication.bucket_documents))
    # Band 0 finds equal texts, and is always there.
    bands = 1 + (settings.deduplication.bands if settings.deduplication.near else 0)
    tasks = []
    for band in range(bands):
        for bucket in range(buckets):
            tasks.append(PairingTask(settings, language, band, bucket, buckets))
    return tasks


def pair_bucket(task: PairingTask) -> None:
    """Writes the pairs of alike documents in one bucket of one band."""
    assert task.settings.deduplication is not None
    documents = _Documents(task.settings, task.language)

    # A bucket is a range of keys. Keys are sorted within each shard, so its part is a slice.
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

    def are_alike(left: Int64[np.ndarray, "n"], right: Int64[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
        # In pieces: the signatures of all pairs together may be too many for memory.
        results = []
        for start in range(0, len(left), _PAIRS_AT_ONCE):
            pairs = slice(start, start + _PAIRS_AT_ONCE)
            results.append(_are_alike(documents, task, left[pairs], right[pairs]))
        return np.concatenate(results)

    links = links_in_band(all_keys[order], all_numbers[order], are_alike)
    with explain_os_errors(task.done):
        task.done.parent.mkdir(parents=True, exist_ok=True)
        write_array(task.done, links)


def _are_alike(
    documents: _Documents, task: PairingTask, left: np.ndarray, right: np.ndarray
) -> Bool[np.ndarray, "n"]:
    assert task.settings.deduplication is not None
    # Band 0 is for equal texts, the others for similar ones.
    if task.band == 0:
        left_rows, right_rows = documents.gather("documents", left), documents.gather("documents", right)
        equal: Bool[np.ndarray, "n"] = (left_rows["digest"] == right_rows["digest"]).all(1)
        return equal
    same = documents.gather("signatures", left) == documents.gather("signatures", right)
    similar: Bool[np.ndarray, "n"] = same.mean(1) >= task.settings.deduplication.similarity
    return similar


def remove_duplicates(task: RemovalTask) -> None:
    """Marks the documents of a language to be removed, writes the record of them, and last the counts."""
    settings, folder = task.settings, Path(task.settings.folder)
    documents = _Documents(settings, task.language)
    linked, component = components(_links(sorted((folder / "links" / task.language).glob("*.npy"))))
    counts: dict[str, Counter[str]] = {}
    removed = np.empty(0, np.int64)
    with explain_os_errors(folder), json_lines(folder / "duplicates" / f"{task.language}.jsonl.zst") as write:
        if len(linked):
            rows = documents.gather("documents", linked)
            ids, sources = _names(documents, linked)

            # The copy that stays: highest weight of its source, then best score, then longest text.
            weights = {source.label: source.weight for source in sources_of(settings, task.language)}
            label_weights = np.array([weights[label] for label in sources.dictionary.to_pylist()])
            weight = label_weights[sources.indices.to_numpy()]
            kept = survivors(component, weight, rows["score"], rows["length"].astype(np.int64))
            is_removed = kept != np.arange(len(linked))
            removed = linked[is_removed]

            # A removed document is "exact" if a document before it has the same text. In this order,
            # documents that stay come before all others.
            order = np.concatenate([np.flatnonzero(~is_removed), np.flatnonzero(is_removed)])
            _, first_of_text = np.unique(rows["digest"][order], axis=0, return_index=True)
            is_first = np.zeros(len(linked), bool)
            is_first[order[first_of_text]] = True
            for index in np.flatnonzero(is_removed).tolist():
                reason = "near" if is_first[index] else "exact"
                source = sources[index].as_py()
                counts.setdefault(source, Counter())[reason] += 1
                write(
                    {
                        "id": ids[index].as_py(),
                        "source": source,
                        "reason": reason,
                        "kept_id": ids[kept[index]].as_py(),
                        "kept_source": sources[kept[index]].as_py(),
                    }
                )

        # A shard without duplicates gets no mask: `Shard.rows` then yields all documents.
        for number, indices in documents.by_shard(removed):
            mask = np.zeros(documents.shards[number].documents, bool)
            mask[removed[indices] - documents.starts[number]] = True
            write_array(documents.shards[number].beside("removed"), mask)

        by_source = {}
        for label, reasons in sorted(counts.items()):
            by_source[label] = {"exact": reasons["exact"], "near": reasons["near"]}
        content = json.dumps(by_source, indent=2, ensure_ascii=False).encode() + b"\n"
        write_file(task.done, lambda file: file.write(content))


def _links(files: Sequence[Path]) -> Int64[np.ndarray, "links 2"]:
    """The pairs in all files, each once. Most pairs occur in many bands, so all files together would need
    many times the memory.
    """
    links, waiting, waiting_pairs = np.empty((0, 2), np.int64), [], 0
    for file in files:
        waiting.append(np.load(file))
        waiting_pairs += len(waiting[-1])
        # Merged once the new pairs are as many as the known ones, so that the time is not quadratic.
        if waiting_pairs > max(len(links), _PAIRS_AT_ONCE) or file is files[-1]:
            links = np.unique(np.concatenate([links, *waiting]), axis=0)
            waiting, waiting_pairs = [], 0
    return links


def _names(
    documents: _Documents, linked: Int64[np.ndarray, "n"]
) -> tuple[pyarrow.StringArray, pyarrow.DictionaryArray]:
    """The id and source of each document; the documents must ascend. Arrow's arrays need little more memory
    than the letters.
    """
    batches = []
    for number, indices in documents.by_shard(linked):
        wanted, first = linked[indices] - documents.starts[number], 0
        for batch in documents.shards[number].batches(["id", "source"]):
            inside = wanted[(wanted >= first) & (wanted < first + len(batch))] - first
            batches.append(batch.select(["id", "source"]).take(pyarrow.array(inside)))
            first += len(batch)
    table = pyarrow.Table.from_batches(batches).combine_chunks()
    return table["id"].combine_chunks(), table["source"].combine_chunks().dictionary_encode()
