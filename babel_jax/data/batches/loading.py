"""Batches of packed windows: the batch of a step is a pure function of (mixture, seed, step), however many
processes read it.
"""

import bisect
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32, UInt32

from babel_jax.data.batches.mixture import Mixture
from babel_jax.data.windows.prepared import dataset_folder, open_prepared
from babel_jax.data.windows.storage import open_windows
from babel_jax.errors import BadInput
from babel_jax.languages import CODES

Batch = Mapping[str, Int32[np.ndarray, "..."]]

_PREFETCHED_BATCHES = 4
_SHARE_UNITS = 1 << 24
# Grain computes with lengths as C integers, so there must be an end; this one is beyond 10**18 tokens at
# 4096.
_WINDOWS_WITHOUT_END = 1 << 48


class Batches:
    """The batches of a stage, by step and without end.

    Each dataset of the mixture is shuffled anew for each epoch and repeated. Among the first n windows of the
    run a dataset with share s has n * s, to less than two windows, where all datasets fill their windows
    alike; shares are of tokens, so that windows that are half empty are read twice as often. Share p of P has
    rows p * B / P to (p + 1) * B / P - 1 of each global batch of B rows.
    """

    def __init__(
        self,
        folder: Path | str,
        mixture: Mixture,
        global_batch_size: int,
        seq_len: int,
        seed: int,
        share: int = 0,
        shares: int = 1,
    ):
        """Opens the datasets of `mixture` in a folder of prepared data.

        Raises BadInput when the windows are not of `seq_len` tokens, a dataset is missing, or the batch does
        not divide into shares.
        """
        prepared = open_prepared(folder)
        if prepared.seq_len != seq_len:
            raise BadInput(
                f"{folder}: its windows hold {prepared.seq_len} tokens, not data.seq_len = {seq_len}; "
                "prepare another folder for that"
            )
        if global_batch_size % shares:
            raise BadInput(
                f"training.global_batch_size = {global_batch_size} is not a multiple of the {shares} shares "
                "of the processes"
            )
        missing = [
            f"{row.language} {row.kind}"
            for row in mixture.rows
            if (row.language, row.kind) not in prepared.available
        ]
        if missing:
            raise BadInput(f"{folder}: the mixture names {', '.join(missing)}, which is not prepared there")
        sources = [_source(prepared.folder, row.language, row.kind) for row in mixture.rows]
        orders = [
            ShuffledEpochs(len(source), f"{seed} {row.language} {row.kind}")
            for source, row in zip(sources, mixture.rows, strict=True)
        ]
        # Shares are of tokens. A dataset whose windows are half empty gives as many tokens in twice as many
        # windows.
        rates = [
            row.share / prepared.supplies[row.language, row.kind].tokens_per_window for row in mixture.rows
        ]
        mixed = grain.MapDataset.select_from_datasets(sources, Selection(rates, orders))
        batches = mixed.batch(global_batch_size // shares)
        self._batches = batches.slice(slice(share, None, shares))

    def __getitem__(self, step: int) -> Batch:
        """The share's rows of a step: "tokens" and "segment_ids" int32[rows, seq_len], "language"
        int32[rows], an index into CODES.

        Windows of conversations have "loss_mask" int32[rows, seq_len] besides.
        """
        return self._batches[step]

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from a step on, read ahead by a thread."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        yield from self._batches.slice(slice(start_step, None)).to_iter_dataset(options)


class ShuffledEpochs:
    """The order of a dataset's windows, epoch after epoch, each shuffled for itself.

    Grain's own shuffle finds a place by trial among at least 2**16: 0.2 ms for a dataset of 100 windows,
    where this takes a microsecond. The price is 4 bytes of memory for each window, and a pause to sort when
    an epoch begins.
    """

    def __init__(self, length: int, seed: str):
        self.length = length
        self._key = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "big")
        self._epochs: dict[int, UInt32[np.ndarray, "length"]] = {}

    def __getitem__(self, position: int) -> int:
        """Which window stands at a position, counted from the start of the first epoch."""
        epoch, place = divmod(position, self.length)
        order = self._epochs.get(epoch)
        if order is None:
            # Of NumPy's generators only the raw bits are promised to stay the same from version to version.
            bits = np.random.Philox(key=np.array([self._key, epoch], np.uint64)).random_raw(self.length)
            order = np.argsort(bits, kind="stable").astype(np.uint32)
            # The thread that reads ahead may already be in the next epoch.
            self._epochs = {
                near: self._epochs[near] for near in (epoch - 1, epoch + 1) if near in self._epochs
            } | {epoch: order}
        return int(order[place])


class Selection(grain.transforms.DatasetSelectionMap):
    """Which window of which dataset stands at a place of the mixed sequence.

    Grain's own `mix` rounds weights to a hundredth of the smallest, so it is off by up to 1%, and favours the
    first datasets at the start; here shares are exact to 2**-24 and each dataset is within two windows of its
    share at every place.
    """

    def __init__(self, shares: Sequence[float], orders: Sequence[ShuffledEpochs]):
        edges = np.rint(np.cumsum(shares) / np.sum(shares) * _SHARE_UNITS).astype(int)
        self._edges = [0, *np.cumsum(np.maximum(np.diff(edges, prepend=0), 1)).tolist()]
        self._orders = orders

    def __len__(self) -> int:
        return _WINDOWS_WITHOUT_END

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(dataset, window of the dataset)."""
        dataset, position = self.place(index)
        return dataset, self._orders[dataset][position]

    def place(self, index: int) -> tuple[int, int]:
        """(dataset, how many windows of it come before).

        The datasets are halved by weight until one is left; of the first n windows of a group, its first half
        has n * weight, rounded.
        """
        first, last = 0, len(self._edges) - 1
        before, after = index, index + 1
        while last - first > 1:
            low, high = self._edges[first], self._edges[last]
            middle = min(max(bisect.bisect(self._edges, (low + high) // 2), first + 1), last - 1)
            weight, whole = self._edges[middle] - low, high - low
            half_before, half_after = (
                (2 * count * weight + whole) // (2 * whole) for count in (before, after)
            )
            if half_after > half_before:
                last, before, after = middle, half_before, half_after
            else:
                first, before, after = middle, before - half_before, after - half_after
        return first, before


def _source(folder: Path, language: str, kind: str) -> grain.MapDataset:
    """The windows of one dataset in their order on disk."""
    code = np.int32(CODES.index(language))

    def as_int32(window: dict[str, np.ndarray]) -> dict[str, Any]:
        return {**{field: values.view(np.int32) for field, values in window.items()}, "language": code}

    return grain.MapDataset.source(open_windows(dataset_folder(folder, language, kind))).map(as_int32)
