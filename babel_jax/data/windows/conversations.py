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
    """Windows (tokens, segment_ids, loss_mask) of conversations; the end of a window cuts no conversation.

    texts: the output of `conversation_text`. A conversation longer than `seq_len` tokens loses its end; it is
    left out if the rest has no token of the assistant. Padding has segment 0. Adds to `counts`: tokens,
    documents, bytes, targets (tokens that the loss counts), cut, left_out.
    """
    counts |= dict.fromkeys(("targets", "cut", "left_out"), 0)
    for block in _blocks(texts, format, seq_len, counts):
        lengths = [len(conversation.ids) for conversation in block]
        for window in best_fit(lengths, seq_len):
            yield _window([block[number] for number in window], seq_len, format.end_id)


def _blocks(
    texts: Iterable[str], format: ChatFormat, seq_len: int, counts: dict[str, int]
) -> Iterator[list[EncodedConversation]]:
    """Conversations in their order, some million tokens at a time, each at most as long as a window."""
    block: list[EncodedConversation] = []
    tokens = 0
    for text in texts:
        whole = format.encode_text(text)
        fitting = EncodedConversation(whole.ids[:seq_len], whole.targets[:seq_len])
        # The first token is never a target: it has no preceding token.
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
        span = slice(start, start + len(conversation.ids))
        tokens[span] = conversation.ids
        segment_ids[span] = segment
        loss_mask[span] = conversation.targets
        start = span.stop
    return tokens, segment_ids, loss_mask
