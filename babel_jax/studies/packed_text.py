"""Documents packed into windows of one shape, for what reads the same text many times in one compiled program
(sensitivity.py).

What counts is as in `bits_per_byte`, but a document that goes on in the next window has only its last token
before it there.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from babel_jax.data.tokens.tokenizers import Tokenizer
from babel_jax.evaluation.bits_per_byte import bytes_of_first, first_bytes

Window = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """The chosen documents of one language as batches of (tokens, segment_ids, loss_mask), each int32
    [batch_size, seq_len].

    The mask is left out where every token counts that has another of its document before it.
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
    """Each language's documents, the first ones up to `max_bytes` of text, as batches that all have one
    shape.
    """

    def one_language(documents: Sequence[str]) -> EncodedText:
        chosen = first_bytes(documents, max_bytes)
        encoded = tokenizer.encode_batch(chosen)
        firsts = sum(
            bytes_of_first(tokenizer, text, ids) for text, ids in zip(chosen, encoded, strict=True) if ids
        )
        windows = list(
            _windows(
                [[*tokenizer.begin_ids, *ids] for ids in encoded if ids], seq_len, len(tokenizer.begin_ids)
            )
        )
        return EncodedText(
            _batches(windows, seq_len, batch_size),
            bytes=max(0, sum(len(text.encode()) for text in chosen) - firsts),
            tokens=sum(max(0, len(ids) - 1) for ids in encoded),
            documents=len(chosen),
        )

    return {language: one_language(documents) for language, documents in texts.items()}


def _windows(encoded: Sequence[Sequence[int]], seq_len: int, begin: int = 0) -> Iterator[Window]:
    """Documents side by side in windows, each a segment; one that does not fit goes on in the next window,
    led by its last token.

    The first `begin` tokens of a document are those that begin every text. With them comes a mask, in which
    neither they nor the first token of the text count: the same tokens are measured whether or not a
    tokenizer begins its texts so.
    """
    window, filled, segment = np.zeros((3, seq_len), np.int32), 0, 0
    fields = 3 if begin else 2
    for ids in encoded:
        if len(ids) - begin < 2:
            continue
        counts = np.ones(len(ids), np.int32)
        counts[: begin + 1 if begin else 0] = 0
        place = 0
        while place < len(ids) - 1:
            if seq_len - filled < 2:
                yield tuple(window[:fields])
                window, filled, segment = np.zeros((3, seq_len), np.int32), 0, 0
            piece = ids[place : place + seq_len - filled]
            segment += 1
            part = slice(filled, filled + len(piece))
            window[:, part] = piece, np.full(len(piece), segment), counts[place : place + len(piece)]
            filled += len(piece)
            place += len(piece) - 1
    if filled:
        yield tuple(window[:fields])


def _batches(windows: list[Window], seq_len: int, batch_size: int) -> list[Window]:
    """Whole batches; the last is filled with windows of padding."""
    if windows:
        windows = windows + [(np.zeros(seq_len, np.int32),) * len(windows[0])] * (-len(windows) % batch_size)
    starts = range(0, len(windows), batch_size)
    return [
        tuple(np.stack(column) for column in zip(*windows[start : start + batch_size], strict=True))
        for start in starts
    ]
