"""Bits per byte of whole documents: long ones by a sliding window, so that every token has context before it.

What counts is as in `bits_per_byte`, which is faster and measures in fixed windows.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from babel_jax.data.tokenizers import Tokenizer
from babel_jax.evaluation.bits_per_byte import bytes_of_first, first_bytes
from babel_jax.evaluation.items import Items, bits_per_byte_of
from babel_jax.evaluation.prefix_trees import Scored
from babel_jax.evaluation.scoring import Score

LONGEST_WINDOW = 2048


def text_bits(
    tokenizer: Tokenizer,
    texts: Mapping[str, Sequence[str]],
    max_positions: int,
    max_bytes: int,
    scored: Callable[[Sequence[Scored]], Sequence[Score]],
) -> dict[str, Items]:
    """The bits and bytes of each language's documents of two tokens or more, the first ones up to `max_bytes` of text.

    A window has 2,048 tokens, or `max_positions`; the next one begins half a window later and counts its new tokens alone. `scored` gives
    the log-likelihoods of sequences. The model reads before each document what its tokenizer begins every text with.
    """
    begin = tokenizer.begin_ids
    windows: list[Scored] = []
    owners: list[tuple[str, int]] = []
    bytes_of: dict[str, list[int]] = {}
    for code, documents in texts.items():
        chosen = first_bytes(documents, max_bytes)
        encoded = tokenizer.encode_batch(chosen)
        long = [(text, ids) for text, ids in zip(chosen, encoded, strict=True) if len(ids) > 1]
        bytes_of[code] = [len(text.encode()) - bytes_of_first(tokenizer, text, ids) for text, ids in long]
        for number, (_, ids) in enumerate(long):
            own = list(sliding_windows(np.array([*begin, *ids], np.int32), min(LONGEST_WINDOW, max_positions), len(begin) + 1))
            windows += own
            owners += [(code, number)] * len(own)
    bits = {code: np.zeros(len(counts)) for code, counts in bytes_of.items()}
    for (code, number), (log_p, _) in zip(owners, scored(windows), strict=True):
        bits[code][number] -= log_p / np.log(2)
    return {code: bits_per_byte_of(bits[code], counts) for code, counts in bytes_of.items() if sum(counts)}


def sliding_windows(ids: np.ndarray, size: int, first: int = 1) -> list[Scored]:
    """Windows of at most `size` tokens that the model reads, in which every token from the place `first` on is a target once."""
    windows, scored = [], first
    while scored < len(ids):
        stop = min(len(ids), size + 1 if scored == first else scored + max(1, size // 2))
        start = max(0, stop - 1 - size)
        windows.append(Scored(ids[start : stop - 1], ids[scored:stop]))
        scored = stop
    return windows
