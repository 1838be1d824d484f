"""Documents cut or sorted into windows of a fixed number of tokens.

`pack` concatenates the documents and splits the result: no token is dropped, only the last window is padded.
`best_fit` puts whole documents into windows.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import UInt32

Window = tuple[UInt32[np.ndarray, "seq_len"], UInt32[np.ndarray, "seq_len"]]

_BLOCK_TOKENS = 1 << 20


def pack(documents: Iterable[Sequence[int]], seq_len: int, eos_id: int) -> Iterator[Window]:
    """The windows (tokens, segment_ids) of the documents, in order. `eos_id` follows each document.

    segment_ids number the documents of a window from 1. A document that crosses the end of a window continues
    in the next window, as a new segment. The last window is padded with `eos_id`; padding has segment 0.
    Memory is bounded by a few million tokens.
    """
    tokens = np.empty(0, np.uint32)
    owners = np.empty(0, np.int64)  # for each token the number of its document
    waiting: list[Sequence[int]] = []
    waiting_tokens = 0
    packed_documents = 0
    for document in documents:
        waiting.append(document)
        waiting_tokens += len(document) + 1

        # Many documents become arrays at once: an array per document would cost more than the packing itself.
        if waiting_tokens >= _BLOCK_TOKENS:
            tokens, owners = _append(tokens, owners, waiting, packed_documents, eos_id)
            packed_documents, waiting, waiting_tokens = packed_documents + len(waiting), [], 0
            full_windows_tokens = len(tokens) // seq_len * seq_len
            yield from _windows(tokens[:full_windows_tokens], owners[:full_windows_tokens], seq_len)
            tokens, owners = tokens[full_windows_tokens:], owners[full_windows_tokens:]

    # The last block is padded to a whole number of windows.
    tokens, owners = _append(tokens, owners, waiting, packed_documents, eos_id)
    padding = -len(tokens) % seq_len
    tokens = np.concatenate([tokens, np.full(padding, eos_id, np.uint32)])
    owners = np.concatenate([owners, np.full(padding, -1)])
    yield from _windows(tokens, owners, seq_len)


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Chooses the documents that share a window of `size` tokens, so that no document is cut.

    The longest document is placed first. Each document goes into the window where it leaves the least room.
    Returns document numbers by window; they ascend within a window, and so do the first numbers of the
    windows. No length may exceed `size`.
    """
    windows: list[list[int]] = []
    # (free tokens, index in `windows`) of each window that is not full, sorted.
    rooms: list[tuple[int, int]] = []
    longest_first = sorted(range(len(lengths)), key=lambda number: -lengths[number])

    for number in longest_first:
        length = lengths[number]
        # The smallest room that is large enough; else a new window.
        tightest = bisect.bisect_left(rooms, (length, -1))
        if tightest < len(rooms):
            room, index = rooms.pop(tightest)
        else:
            room, index = size, len(windows)
            windows.append([])
        windows[index].append(number)
        if room > length:
            bisect.insort(rooms, (room - length, index))

    return sorted(sorted(window) for window in windows)


def _append(
    tokens: UInt32[np.ndarray, "kept"],
    owners: np.ndarray,
    documents: list[Sequence[int]],
    first: int,
    eos_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The kept tokens followed by `documents`, and the document number of each token; numbers start at
    `first`.
    """
    lengths = np.array([len(document) + 1 for document in documents], np.int64)
    pieces = [tokens]
    for document in documents:
        pieces += [np.asarray(document, np.uint32), np.array([eos_id], np.uint32)]
    numbers = np.arange(first, first + len(documents))
    return np.concatenate(pieces), np.concatenate([owners, np.repeat(numbers, lengths)])


def _windows(tokens: UInt32[np.ndarray, "total"], owners: np.ndarray, seq_len: int) -> Iterator[Window]:
    """Splits a whole number of windows; owner -1 is padding."""
    # One row for each window.
    owners = owners.reshape(-1, seq_len)

    # Document numbers become numbers within the window: the first document of a window is segment 1.
    segments = np.where(owners < 0, 0, owners - owners[:, :1] + 1).astype(np.uint32)
    yield from zip(tokens.reshape(-1, seq_len), segments, strict=True)
