"""Batches of packed windows: the batch of a step is a pure function of (mixture, seed, step), however many processes read it."""

import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32

from babel_jax.data.mixture import Mixture
from babel_jax.data.prepared import dataset_folder, open_prepared
from babel_jax.data.windows import open_windows
from babel_jax.errors import BadInput
from babel_jax.languages import CODES

Batch = Mapping[str, Int32[np.ndarray, "..."]]

_PREFETCHED_BATCHES = 4
_SHARE_UNITS = 1 << 24


class Batches:
    """The batches of a stage, by step and without end.

    Each dataset of the mixture is shuffled anew for each epoch and repeated. Among the first n windows of the run a dataset with share s
    has n * s, to less than two windows. Process p of P gets rows p * B / P to (p + 1) * B / P - 1 of each global batch of B rows.
    """

    def __init__(
        self,
        folder: Path | str,
        mixture: Mixture,
        global_batch_size: int,
        seq_len: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Opens the datasets of `mixture` in a folder of prepared data.

        Raises BadInput when the windows are not of `seq_len` tokens, a dataset is missing, or the batch does not divide among processes.
        """
        prepared = open_prepared(folder)
        if prepared.seq_len != seq_len:
            raise BadInput(
                f"{folder}: its windows hold {prepared.seq_len} tokens, not data.seq_len = {seq_len}; prepare another folder for that"
            )
        if global_batch_size % process_count:
            raise BadInput(
                f"training.global_batch_size = {global_batch_size} is not a multiple of the {process_count} processes that share it"
            )
        missing = [f"{row.language} {row.kind}" for row in mixture.rows if (row.language, row.kind) not in prepared.available]
        if missing:
            raise BadInput(f"{folder}: the mixture names {', '.join(missing)}, which is not prepared there")
        parts = [_endless(prepared.folder, row.language, row.kind, seed) for row in mixture.rows]
        mixed = grain.MapDataset.select_from_datasets(parts, ExactShares([row.share for row in mixture.rows]))
        batches = mixed.batch(global_batch_size // process_count)
        self._batches = batches.slice(slice(process_index, None, process_count))

    def __getitem__(self, step: int) -> Batch:
        """The process's rows of a step: "tokens" and "segment_ids" int32[rows, seq_len], "language" int32[rows], an index into CODES."""
        return self._batches[step]

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from a step on, read ahead by a thread."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        yield from self._batches.slice(slice(start_step, None)).to_iter_dataset(options)


class ExactShares(grain.transforms.DatasetSelectionMap):
    """Which dataset gives the window at an index, and which of its windows, for shares that add up to 1.

    Grain's own `mix` rounds weights to a hundredth of the smallest, so it is off by up to 1%; these are exact to 2**-24.
    """

    def __init__(self, shares: list[float]):
        units = np.floor(np.cumsum(shares) / np.sum(shares) * _SHARE_UNITS + 0.5).astype(int)
        self._units = np.maximum(np.diff(units, prepend=0), 1).tolist()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(dataset, number of the window within it). The datasets take their part one after another from what those before have left."""
        left = sum(self._units)
        before, after = index, index + 1
        for dataset, units in enumerate(self._units):
            left_before, left_after = before * (left - units) // left, after * (left - units) // left
            if before - left_before != after - left_after:
                return dataset, before - left_before
            left -= units
            before, after = left_before, left_after
        raise AssertionError("one of the datasets takes each window")


def _endless(folder: Path, language: str, kind: str, seed: int) -> grain.MapDataset:
    """The windows of one dataset, epoch after epoch, each in an order of its own."""
    code = np.int32(CODES.index(language))

    def as_int32(window: dict[str, np.ndarray]) -> dict[str, Any]:
        return {"tokens": window["tokens"].view(np.int32), "segment_ids": window["segment_ids"].view(np.int32), "language": code}

    source = open_windows(dataset_folder(folder, language, kind))
    # Grain counts the seed up by one each epoch, so neighbouring seeds must lie far apart.
    own_seed = zlib.crc32(f"{seed} {language} {kind}".encode())
    return grain.MapDataset.source(source).shuffle(seed=own_seed).map(as_int32).repeat()
