"""Finds the benchmark items that share a long run of tokens with the windows that a model was trained on.

Two texts overlap if they have 13 tokens in a row in common. (GPT-3's report, appendix C, uses 13 words;
tokens also fit languages without spaces.) A shorter text cannot be checked. Both sides are compared in
Unicode's NFC: windows in another form are decoded, normalized and tokenized again.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from babel_jax.config.file import load_config
from babel_jax.data.refining.characters import nfc
from babel_jax.data.refining.personal import masked_text
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.data.tokens.tokenizers import open_tokenizer
from babel_jax.data.windows.prepared import PreparedData, dataset_folder, open_prepared
from babel_jax.data.windows.storage import open_windows
from babel_jax.errors import BadInput
from babel_jax.places import pull
from babel_jax.progress import Work

LENGTH = 13
Windows = Int[np.ndarray, "windows time"]
_AT_ONCE = 1024  # windows
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: odd, with bits in no pattern


def contamination(
    run: Path, items: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
) -> dict[str, dict[str, dict[str, int]]]:
    """{task: {language: {items, long_enough, overlapping}}}: the number of items, of items with 13 tokens or
    more, and of items that overlap.

    run: a run folder. All windows of its data count, including those that the mixture did not use. Raises
    BadInput for another folder.
    """
    pull(run, lambda name: name == "config.toml")
    path = run / "config.toml"
    if not path.is_file():
        raise BadInput(
            f"{run}: not a run folder (it has no config.toml); give the folder that `babel train` made"
        )
    config = load_config(path)
    # Tokens are compared, so the items must be tokenized as the windows were.
    prepared = open_prepared(config.data.folder)
    tokenizer = open_tokenizer(config.data.tokenizer or config.model.folder or run / "hf")
    if tokenizer.fingerprint != prepared.tokenizer_fingerprint:
        raise BadInput(
            f"{run}: its data in {prepared.folder} was prepared with another tokenizer than the run's"
        )

    # The hashes of the runs of each item, and all hashes once.
    runs: dict[tuple[str, str], list[np.ndarray]] = {}
    all_runs = [np.zeros(0, np.uint64)]
    for task, by_language in items.items():
        for code, rows in by_language.items():
            runs[task, code] = [_runs_of(tokenizer, item) for item in rows]
            all_runs += runs[task, code]
    wanted = np.unique(np.concatenate(all_runs))

    overlap = _in_windows(wanted, prepared, tokenizer)
    result: dict[str, dict[str, dict[str, int]]] = {}
    for (task, code), item_runs in runs.items():
        result.setdefault(task, {})[code] = {
            "items": len(item_runs),
            "long_enough": sum(len(of_item) > 0 for of_item in item_runs),
            "overlapping": sum(bool(np.isin(of_item, overlap).any()) for of_item in item_runs),
        }
    return result


def _in_windows(
    wanted: Int[np.ndarray, "runs"], prepared: PreparedData, tokenizer: Tokenizer
) -> Int[np.ndarray, "found"]:
    """The hashes of `wanted` that occur in the training windows. `wanted` must be sorted."""
    # The hashes of all windows would not fit into memory, so each block of them is looked up in the items'.
    is_trained = np.zeros(len(wanted), bool)
    if not len(wanted):
        return wanted
    for trained in _runs_of_windows(prepared, tokenizer):
        # The place of each run of the windows among the items' runs, if it is there.
        indices = np.searchsorted(wanted, trained).clip(max=len(wanted) - 1)
        is_trained[indices[wanted[indices] == trained]] = True
    return wanted[is_trained]


def _runs_of(tokenizer: Tokenizer, item: Mapping[str, Any]) -> Int[np.ndarray, "runs"]:
    """Hashes of the runs of tokens in each text of an item: unchanged, and with personal data masked as in
    cleaned text.
    """
    forms: dict[str, None] = {}  # a dict keeps the order
    for value in item.values():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                normalized = nfc(text)
                forms[normalized] = None
                forms[masked_text(normalized)] = None
    runs = [np.zeros(0, np.uint64)]
    for ids in tokenizer.encode_batch(list(forms)):
        runs.append(hashes(np.array(ids, np.uint64)))
    return np.concatenate(runs)


def _runs_of_windows(prepared: PreparedData, tokenizer: Tokenizer) -> Iterator[Int[np.ndarray, "runs"]]:
    """Hashes of the runs of tokens within the documents of all windows."""
    sources = [open_windows(dataset_folder(prepared.folder, *dataset)) for dataset in prepared.available]
    total = sum(map(len, sources))
    with Work[Any]("searching for the items", total=total, unit="windows") as progress:
        for source in sources:
            for start in range(0, len(source), _AT_ONCE):
                records = source.__getitems__(range(start, min(start + _AT_ONCE, len(source))))
                tokens = np.stack([record["tokens"] for record in records])
                segments = np.stack([record["segment_ids"] for record in records])

                # A run is within a document if its first and last token are in the same segment.
                first, last = segments[:, : 1 - LENGTH], segments[:, LENGTH - 1 :]
                inside = (first == last) & (first > 0)
                yield hashes(tokens.astype(np.uint64))[inside]
                yield from map(hashes, _in_nfc(tokens, segments, tokenizer))
                progress.update(len(records))


def _in_nfc(tokens: Windows, segments: Windows, tokenizer: Tokenizer) -> Iterator[Int[np.ndarray, "time"]]:
    """The tokens that the documents which are not in NFC would have in NFC."""
    # Most text is in NFC; the few other documents are found by decoding, which is the slow part here.
    for window, segment_ids in zip(tokens, segments, strict=True):
        # A window is cut where its segment id changes: each part is one document, or padding.
        edges = np.flatnonzero(np.diff(segment_ids)) + 1
        for document, segment in zip(np.split(window, edges), np.split(segment_ids, edges), strict=True):
            if segment[0] > 0:
                text = tokenizer.decode([token for token in document.tolist() if token != tokenizer.eos_id])
                if (composed := nfc(text)) != text:
                    yield np.array(tokenizer.encode(composed), np.uint64)


def hashes(tokens: Int[np.ndarray, "*n time"]) -> Int[np.ndarray, "*n runs"]:
    """A hash (uint64) of each run of 13 tokens along the last axis; empty if there are fewer tokens."""
    runs = max(0, tokens.shape[-1] - LENGTH + 1)
    mixed = (tokens + np.uint64(1)) * _FACTOR
    mixed ^= mixed >> np.uint64(29)
    # A polynomial over the tokens of each run, modulo 2**64.
    hashed = np.zeros((*tokens.shape[:-1], runs), np.uint64)
    for offset in range(LENGTH):
        hashed = hashed * _FACTOR + mixed[..., offset : offset + runs]
    return hashed
