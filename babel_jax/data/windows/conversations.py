"""Conversations packed whole into windows, with a mask of the tokens that the assistant wrote."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import UInt32

from babel_jax.data.tokens.chat_format import ChatFormat, EncodedConversation
from babel_jax.data.windows.packing import best_fit

MaskedWindow = tuple[
    UInt32[np.ndarray, "seq_len"], UInt32[np.ndarray, "seq_len"], UInt32[np.ndarray, "seq_len"]
]

_BLOCK_TOKENS = 1 << 22


def conversation_windows(
    texts: Iterable[str], format: ChatFormat, seq_len: int, counts: dict[str, int]
) -> Iterator[MaskedWindow]:
    """Windows (tokens, segment_ids, loss_mask) of conversations as `conversation_text` gives them, none of
    them cut by a window's end.

    A conversation of more than `seq_len` tokens is cut there, and left out where nothing of the assistant's
    is before. Padding has segment
    0. Adds to `counts`: tokens, documents, bytes, targets (tokens that the loss is on), cut, and left_out.
    """
    counts |= dict.fromkeys(("targets", "cut", "left_out"), 0)
    for block in _blocks(texts, format, seq_len, counts):
        for window in best_fit([len(conversation.ids) for conversation in block], seq_len):
            yield _window([block[number] for number in window], seq_len, format.end_id)


def _blocks(
    texts: Iterable[str], format: ChatFormat, seq_len: int, counts: dict[str, int]
) -> Iterator[list[EncodedConversation]]:
    """Conversations of some million tokens at a time, in their order, none longer than a window."""
    block: list[EncodedConversation] = []
    tokens = 0
    for text in texts:
        whole = format.encode_text(text)
        fitting = EncodedConversation(whole.ids[:seq_len], whole.targets[:seq_len])
        if not any(fitting.targets[1:]):
            counts["left_out"] += 1
            continue
        counts["cut"] += len(whole.ids) > seq_len
        counts["documents"] += 1
        counts["bytes"] += len(text.encode())
        counts["tokens"] += len(fitting.ids)
        counts["targets"] += sum(fitting.targets[1:])
        block.append(fitting)
        tokens += len(fitting.ids)
        if tokens >= _BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
    if block:
        yield block


def _window(conversations: Sequence[EncodedConversation], seq_len: int, pad_id: int) -> MaskedWindow:
    tokens = np.full(seq_len, pad_id, np.uint32)
    segment_ids, loss_mask = np.zeros(seq_len, np.uint32), np.zeros(seq_len, np.uint32)
    start = 0
    for segment, conversation in enumerate(conversations, 1):
        place = slice(start, start + len(conversation.ids))
        tokens[place], segment_ids[place], loss_mask[place] = conversation.ids, segment, conversation.targets
        start = place.stop
    return tokens, segment_ids, loss_mask
