"""Documents to windows of fixed length.

`pack` concatenates, then splits: no token is dropped and only the last window is padded. `best_fit` keeps
documents whole.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import UInt32

Window = tuple[UInt32[np.ndarray, "seq_len"], UInt32[np.ndarray, "seq_len"]]

_BLOCK_TOKENS = 1 << 20


def pack(documents: Iterable[Sequence[int]], seq_len: int, eos_id: int) -> Iterator[Window]:
    """Windows (tokens, segment_ids) of the documents in their order, each document followed by `eos_id`.

    Segments of a window count its documents from 1. A document that reaches over the end of a window goes on
    in the next as a segment of its own, and the last window is filled with `eos_id` under segment 0, which is
    padding. Memory stays bounded by a few million tokens.
    """
    tokens = np.empty(0, np.uint32)
    owners = np.empty(0, np.int64)  # for each token the number of its document
    waiting: list[Sequence[int]] = []
    waiting_tokens = 0
    seen = 0
    for document in documents:
        waiting.append(document)
        waiting_tokens += len(document) + 1
        if waiting_tokens >= _BLOCK_TOKENS:
            tokens, owners = _append(tokens, owners, waiting, seen, eos_id)
            seen, waiting, waiting_tokens = seen + len(waiting), [], 0
            whole = len(tokens) // seq_len * seq_len
            yield from _windows(tokens[:whole], owners[:whole], seq_len)
            tokens, owners = tokens[whole:], owners[whole:]
    tokens, owners = _append(tokens, owners, waiting, seen, eos_id)
    padding = -len(tokens) % seq_len
    tokens = np.concatenate([tokens, np.full(padding, eos_id, np.uint32)])
    owners = np.concatenate([owners, np.full(padding, -1)])
    yield from _windows(tokens, owners, seq_len)


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which documents share a window of `size` tokens, none of them cut: each in turn, the longest first,
    goes where it leaves least room.

    The numbers inside of a window ascend, and so do the first numbers of the windows. Lengths must not exceed
    `size`.
    """
    windows: list[list[int]] = []
    rooms: list[
        tuple[int, int]
    ] = []  # what is left in each window that is not full, and its place in `windows`; sorted
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        found = bisect.bisect_left(rooms, (lengths[number], -1))
        room, place = rooms.pop(found) if found < len(rooms) else (size, len(windows))
        if place == len(windows):
            windows.append([])
        windows[place].append(number)
        if room > lengths[number]:
            bisect.insort(rooms, (room - lengths[number], place))
    return sorted(sorted(window) for window in windows)


def _append(
    tokens: UInt32[np.ndarray, "kept"],
    owners: np.ndarray,
    documents: list[Sequence[int]],
    first: int,
    eos_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The kept tokens followed by `documents`, which are numbered from `first`."""
    lengths = np.array([len(document) + 1 for document in documents], np.int64)
    pieces = [tokens]
    for document in documents:
        pieces += [np.asarray(document, np.uint32), np.array([eos_id], np.uint32)]
    return np.concatenate(pieces), np.concatenate(
        [owners, np.repeat(np.arange(first, first + len(documents)), lengths)]
    )


def _windows(tokens: UInt32[np.ndarray, "total"], owners: np.ndarray, seq_len: int) -> Iterator[Window]:
    """Cuts a whole number of windows; owner -1 is padding."""
    owners = owners.reshape(-1, seq_len)
    segments = np.where(owners < 0, 0, owners - owners[:, :1] + 1).astype(np.uint32)
    yield from zip(tokens.reshape(-1, seq_len), segments, strict=True)
