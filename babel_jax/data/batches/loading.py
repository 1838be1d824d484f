"""Batches of packed windows. The batch of a step depends on the prepared data, the mixture, the batch size,
the seed and the step alone; not on the number of processes.
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
from babel_jax.languages import in_order

Batch = Mapping[str, Int32[np.ndarray, "..."]]

_PREFETCHED_BATCHES = 4
_SHARE_UNITS = 1 << 24
# Grain computes with lengths as C integers, so a length must be finite. This one is over 10**18 tokens in
# windows of 4096.
_WINDOWS_WITHOUT_END = 1 << 48


class Batches:
    """The batches of a stage by step; they never end.

    Each dataset of the mixture is repeated, with a new shuffle for each epoch. Shares are of tokens: a
    dataset whose windows are half empty is read twice as often. If all windows are full, the first n windows
    of the run have n * s windows of a dataset with share s, to within two windows. Part p of P of a global
    batch of B rows (`share` and `shares`) has the rows p * B / P to (p + 1) * B / P - 1.
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
        languages: Sequence[str] | None = None,
    ):
        """Opens the datasets of `mixture` in a folder of prepared data.

        share, shares: the number of this part of the global batch, and of all parts. languages: the order of
        the run, which "language" of a batch counts in; None for the registry's order of the mixture's
        languages. Raises BadInput if the windows have another length than `seq_len`, a dataset is missing, or
        the batch size is not a multiple of `shares`.
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
        supplies = prepared.supplies
        missing = []
        for row in mixture.rows:
            if (row.language, row.kind) not in supplies:
                missing.append(f"{row.language} {row.kind}")
        if missing:
            raise BadInput(f"{folder}: the mixture names {', '.join(missing)}, which is not prepared there")

        self.languages = tuple(in_order(mixture.languages) if languages is None else languages)
        sources, orders, window_shares = [], [], []
        for row in mixture.rows:
            source = _source(prepared.folder, row.language, row.kind, self.languages.index(row.language))
            sources.append(source)
            orders.append(ShuffledEpochs(len(source), f"{seed} {row.language} {row.kind}"))
            # Shares are of tokens. Half-empty windows hold the same tokens in twice as many windows.
            window_shares.append(row.share / supplies[row.language, row.kind].tokens_per_window)

        # Grain's step s * shares + share is this process's part of the global batch s: it is cut from one
        # sequence, so another number of processes reads the same global batches.
        mixed = grain.MapDataset.select_from_datasets(sources, Selection(window_shares, orders))
        batches = mixed.batch(global_batch_size // shares)
        self._batches = batches.slice(slice(share, None, shares))

    def __getitem__(self, step: int) -> Batch:
        """The rows of this share at a step: "tokens" and "segment_ids" int32[rows, seq_len], and "language"
        int32[rows], an index into `languages`.

        Windows of conversations also have "loss_mask" int32[rows, seq_len].
        """
        result: Batch = self._batches[step]
        return result

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from a step on; a thread reads ahead."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        yield from self._batches.slice(slice(start_step, None)).to_iter_dataset(options)


class ShuffledEpochs:
    """The order of a dataset's windows, with a separate shuffle for each epoch.

    Grain's own shuffle tries random positions among at least 2**16: 0.2 ms for a dataset of 100 windows. This
    lookup takes a microsecond. It costs 4 bytes of memory per window for each of up to three epochs, and a
    sort at the start of each epoch.
    """

    def __init__(self, length: int, seed: str):
        self.length = length
        self._key = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "big")
        self._epochs: dict[int, UInt32[np.ndarray, "length"]] = {}

    def __getitem__(self, position: int) -> int:
        """The window at a position; positions are counted from the start of the first epoch."""
        epoch, position_in_epoch = divmod(position, self.length)
        order = self._epochs.get(epoch)
        if order is None:
            # NumPy promises that the raw bits stay the same in later versions; it does not for shuffles.
            bits = np.random.Philox(key=np.array([self._key, epoch], np.uint64)).random_raw(self.length)
            order = np.argsort(bits, kind="stable").astype(np.uint32)
            # The thread that reads ahead may be in the next epoch already, so the neighbours are kept too.
            kept = {epoch: order}
            for near in (epoch - 1, epoch + 1):
                if near in self._epochs:
                    kept[near] = self._epochs[near]
            self._epochs = kept
        return int(order[position_in_epoch])


class Selection(grain.transforms.DatasetSelectionMap):  # type: ignore[misc]
    """Maps an index of the mixed sequence to a dataset and one of its windows.

    Grain's own `mix` rounds weights to a hundredth of the smallest one, so it is off by up to 1%, and it
    favours the first datasets at the start. Here shares are exact to 2**-24, and the count of each dataset is
    within two windows of its share at every index.
    """

    def __init__(self, shares: Sequence[float], orders: Sequence[ShuffledEpochs]):
        # Integer weights that add up to about _SHARE_UNITS, each at least 1; the edges are their sums.
        # Rounded sums, and not rounded weights: the errors of many small shares do not add up.
        edges = np.rint(np.cumsum(shares) / np.sum(shares) * _SHARE_UNITS).astype(int)
        weights = np.maximum(np.diff(edges, prepend=0), 1)
        self._edges = [0, *np.cumsum(weights).tolist()]
        self._orders = orders

    def __len__(self) -> int:
        return _WINDOWS_WITHOUT_END

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(dataset, window of the dataset)."""
        dataset, position = self.place(index)
        return dataset, self._orders[dataset][position]

    def place(self, index: int) -> tuple[int, int]:
        """(dataset, the number of its windows at smaller indices).

        A binary search: each group of datasets is split into two halves of about equal weight, until one
        dataset is left. Of the first n windows of a group, its first half has n * weight of the half,
        rounded.
        """
        first, last = 0, len(self._edges) - 1
        before, after = index, index + 1
        while last - first > 1:
            low, high = self._edges[first], self._edges[last]
            # The edge next to the middle of the weights, with one dataset or more on each side.
            middle = min(max(bisect.bisect(self._edges, (low + high) // 2), first + 1), last - 1)
            weight, whole = self._edges[middle] - low, high - low

            # Windows of the first half among the first `before` and the first `after` windows of the group.
            # If these differ, this index belongs to the first half.
            half_before = (2 * before * weight + whole) // (2 * whole)
            half_after = (2 * after * weight + whole) // (2 * whole)
            if half_after > half_before:
                last, before, after = middle, half_before, half_after
            else:
                first, before, after = middle, before - half_before, after - half_after
        return first, before


def _source(folder: Path, language: str, kind: str, number: int) -> grain.MapDataset:
    """The windows of one dataset in their order on disk; `number` is the language's in the run."""
    code = np.int32(number)

    # Windows are stored as uint32. A view reads them as int32 without a copy: ids are far below 2**31.
    def as_int32(window: dict[str, np.ndarray]) -> dict[str, Any]:
        fields: dict[str, Any] = {field: values.view(np.int32) for field, values in window.items()}
        return {**fields, "language": code}

    windows = open_windows(dataset_folder(folder, language, kind))
    return grain.MapDataset.source(windows).map(as_int32)
