"""Which items of a benchmark share a long run of tokens with the windows that a model was trained on.

Two texts overlap where 13 tokens in a row are the same (GPT-3's report, appendix C, took 13 words; tokens
serve languages that write none). Texts shorter than that cannot be told. Both sides are in Unicode's NFC when
they are compared: windows of other text become text, and tokens again.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from babel_jax.config.file import load_config
from babel_jax.data.refining.characters import nfc
from babel_jax.data.refining.personal import masked_text
from babel_jax.data.tokens.tokenizers import Tokenizer, open_tokenizer
from babel_jax.data.windows.prepared import PreparedData, dataset_folder, open_prepared
from babel_jax.data.windows.storage import open_windows
from babel_jax.errors import BadInput
from babel_jax.places import pull

LENGTH = 13
Windows = Int[np.ndarray, "windows time"]
_AT_ONCE = 1024  # windows
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, with bits of no pattern: 2^64 / golden ratio


def contamination(
    run: Path, items: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
) -> dict[str, dict[str, dict[str, int]]]:
    """{task: {language: {items, long_enough, overlapping}}}: how many items there are, have a text of 13
    tokens, and overlap.

    `run` is a run folder; all windows of its data count, whatever the mixture took of them. Raises BadInput
    where it is none.
    """
    pull(run, lambda name: name == "config.toml")
    path = run / "config.toml"
    if not path.is_file():
        raise BadInput(
            f"{run}: not a run folder (it has no config.toml); give the folder that `babel train` made"
        )
    config = load_config(path)
    prepared, tokenizer = (
        open_prepared(config.data.folder),
        open_tokenizer(config.data.tokenizer or config.model.folder or run / "hf"),
    )
    if tokenizer.fingerprint != prepared.tokenizer_fingerprint:
        raise BadInput(
            f"{run}: its data in {prepared.folder} was prepared with another tokenizer than the run's"
        )
    runs = {
        (task, code): [_runs_of(tokenizer, item) for item in own]
        for task, by_language in items.items()
        for code, own in by_language.items()
    }  # fmt: skip
    wanted = np.unique(
        np.concatenate([np.zeros(0, np.uint64), *(found for own in runs.values() for found in own)])
    )
    seen = np.zeros(len(wanted), bool)
    for trained in _runs_of_windows(prepared, tokenizer) if len(wanted) else ():
        places = np.searchsorted(wanted, trained).clip(max=len(wanted) - 1)
        seen[places[wanted[places] == trained]] = True
    met = wanted[seen]
    result: dict[str, dict[str, dict[str, int]]] = {}
    for (task, code), own in runs.items():
        counts = {"items": len(own), "long_enough": sum(len(found) > 0 for found in own)}
        counts["overlapping"] = sum(bool(np.isin(found, met).any()) for found in own)
        result.setdefault(task, {})[code] = counts
    return result


def _runs_of(tokenizer: Tokenizer, item: Mapping[str, Any]) -> Int[np.ndarray, "runs"]:
    """Hashes of the runs of tokens in each text of an item, as it is and with personal data masked, as
    windows of cleaned text have it.
    """
    texts = [
        text
        for value in item.values()
        for text in (value if isinstance(value, list) else [value])
        if isinstance(text, str)
    ]
    forms = dict.fromkeys(form for text in map(nfc, texts) for form in (text, masked_text(text)))
    hashed = [hashes(np.array(ids, np.uint64)) for ids in tokenizer.encode_batch(list(forms))]
    return np.concatenate([np.zeros(0, np.uint64), *hashed])


def _runs_of_windows(prepared: PreparedData, tokenizer: Tokenizer) -> Iterator[Int[np.ndarray, "runs"]]:
    """Hashes of the runs of tokens inside the documents of all windows."""
    sources = [open_windows(dataset_folder(prepared.folder, *dataset)) for dataset in prepared.available]
    with tqdm(
        total=sum(map(len, sources)), desc="contamination", unit=" windows", leave=False, disable=None
    ) as progress:
        for source in sources:
            for start in range(0, len(source), _AT_ONCE):
                records = source.__getitems__(range(start, min(start + _AT_ONCE, len(source))))
                tokens, segments = (
                    np.stack([record[name] for record in records]) for name in ("tokens", "segment_ids")
                )
                inside = (segments[:, : 1 - LENGTH] == segments[:, LENGTH - 1 :]) & (
                    segments[:, : 1 - LENGTH] > 0
                )
                yield hashes(tokens.astype(np.uint64))[inside]
                yield from map(hashes, _in_nfc(tokens, segments, tokenizer))
                progress.update(len(records))


def _in_nfc(tokens: Windows, segments: Windows, tokenizer: Tokenizer) -> Iterator[Int[np.ndarray, "time"]]:
    """The tokens of the documents that are not in NFC, as they would be in NFC."""
    for window, segment_ids in zip(tokens, segments, strict=True):
        edges = np.flatnonzero(np.diff(segment_ids)) + 1
        for own, segment in zip(np.split(window, edges), np.split(segment_ids, edges), strict=True):
            if segment[0] > 0:
                text = tokenizer.decode([token for token in own.tolist() if token != tokenizer.eos_id])
                if (composed := nfc(text)) != text:
                    yield np.array(tokenizer.encode(composed), np.uint64)


def hashes(tokens: Int[np.ndarray, "*n time"]) -> Int[np.ndarray, "*n runs"]:
    """A hash (uint64) of each run of 13 tokens along the last axis; none where there are fewer."""
    runs = max(0, tokens.shape[-1] - LENGTH + 1)
    mixed = (tokens + np.uint64(1)) * _FACTOR
    mixed ^= mixed >> np.uint64(29)
    found = np.zeros((*tokens.shape[:-1], runs), np.uint64)
    for place in range(LENGTH):
        found = found * _FACTOR + mixed[..., place : place + runs]
    return found
