"""Documents packed into windows of one shape, for programs that read the same text many times
(sensitivity.py).

The same tokens count as in `bits_per_byte`. But a document that continues in the next window has only its
last token as context there.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.evaluation.bits_per_byte import bytes_of_first, first_bytes

Window = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """The chosen documents of one language as batches of (tokens, segment_ids, loss_mask), each int32
    [batch_size, seq_len].

    Without a mask, every token counts that has a preceding token of its document.
    """

    batches: list[Window]
    bytes: int
    tokens: int
    documents: int


def encode(
    tokenizer: Tokenizer,
    texts: Mapping[str, Sequence[str]],
    *,
    seq_len: int,
    batch_size: int,
    max_bytes: int | None = None,
) -> dict[str, EncodedText]:
    """The documents of each language as batches of one shape: the first `max_bytes` of text; the last
    document is cut there.
    """

    def one_language(documents: Sequence[str]) -> EncodedText:
        chosen = first_bytes(documents, max_bytes)
        # The last document is cut within its bytes; `ignore` drops a character that was cut in two.
        if max_bytes is not None and chosen:
            before = sum(len(text.encode()) for text in chosen[:-1])
            chosen[-1] = chosen[-1].encode()[: max_bytes - before].decode(errors="ignore")
        encoded = tokenizer.encode_batch(chosen)

        # The first token of a document does not count, so its bytes do not either.
        size = 0
        for text, ids in zip(chosen, encoded, strict=True):
            size += len(text.encode())
            if ids:
                size -= bytes_of_first(tokenizer, text, ids)

        begun = [[*tokenizer.begin_ids, *ids] for ids in encoded if ids]
        windows = list(_windows(begun, seq_len, len(tokenizer.begin_ids)))
        return EncodedText(
            _batches(windows, seq_len, batch_size),
            bytes=max(0, size),
            tokens=sum(max(0, len(ids) - 1) for ids in encoded),
            documents=len(chosen),
        )

    return {language: one_language(documents) for language, documents in texts.items()}


def _windows(encoded: Sequence[Sequence[int]], seq_len: int, begin: int = 0) -> Iterator[Window]:
    """Documents side by side in windows, each as a segment. A document that does not fit continues in the
    next window, after a copy of its last token.

    The first `begin` tokens of a document are those that begin every text. With them there is a mask, in
    which neither they nor the first token of the text count: so the same tokens count for every tokenizer.
    """
    window, filled, segment = np.zeros((3, seq_len), np.int32), 0, 0
    fields = 3 if begin else 2
    for ids in encoded:
        if len(ids) - begin < 2:
            continue
        counts = np.ones(len(ids), np.int32)
        counts[: begin + 1 if begin else 0] = 0
        position = 0
        while position < len(ids) - 1:
            # A piece of one token would have no target.
            if seq_len - filled < 2:
                yield tuple(window[:fields])
                window, filled, segment = np.zeros((3, seq_len), np.int32), 0, 0
            # The next piece begins with the last token of this one: that token is a target here and an input
            # there.
            piece = ids[position : position + seq_len - filled]
            segment += 1
            part = slice(filled, filled + len(piece))
            window[:, part] = piece, np.full(len(piece), segment), counts[position : position + len(piece)]
            filled += len(piece)
            position += len(piece) - 1
    if filled:
        yield tuple(window[:fields])


def _batches(windows: list[Window], seq_len: int, batch_size: int) -> list[Window]:
    """Batches of `batch_size` windows; the last batch is filled up with windows of padding."""
    if windows:
        windows = windows + [(np.zeros(seq_len, np.int32),) * len(windows[0])] * (-len(windows) % batch_size)
    starts = range(0, len(windows), batch_size)
    batches = []
    for start in starts:
        columns = zip(*windows[start : start + batch_size], strict=True)
        batches.append(tuple(map(np.stack, columns)))
    return batches
