"""Conversations: the two forms in which they come, and packing them whole, with a mask of what the assistant wrote."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from babel_jax.data.tokens.chat_format import ChatFormat, EncodedConversation
from babel_jax.data.windows.packing import best_fit

MaskedWindow = tuple[UInt32[np.ndarray, "seq_len"], UInt32[np.ndarray, "seq_len"], UInt32[np.ndarray, "seq_len"]]

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_BLOCK_TOKENS = 1 << 22


def conversation_text(messages: Any) -> str:
    """A list of messages as JSON in one form: [{"role", "content"}, ..] with roles system, user and assistant.

    Messages may be {"role", "content"} or ShareGPT's {"from", "value"} with human and gpt. Raises ValueError, in one line, for anything
    that cannot be trained on: other roles, contents that are no text, no turn of the assistant, one that is empty or comes first.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("a conversation is a list of messages, each an object")
    found = [_message(message, number) for number, message in enumerate(messages)]
    spoken = [message["role"] for message in found if message["role"] != "system"]
    if "assistant" not in spoken:
        raise ValueError("no message of the assistant")
    if spoken[0] == "assistant":
        raise ValueError("the assistant speaks first")
    return json.dumps(found, ensure_ascii=False)


def conversation_windows(texts: Iterable[str], format: ChatFormat, seq_len: int, counts: dict[str, int]) -> Iterator[MaskedWindow]:
    """Windows (tokens, segment_ids, loss_mask) of conversations as `conversation_text` gives them, none of them cut by a window's end.

    A conversation of more than `seq_len` tokens is cut there, and left out where nothing of the assistant's is before. Padding has segment
    0. Adds to `counts`: tokens, documents, bytes, targets (tokens that the loss is on), cut, and left_out.
    """
    counts |= dict.fromkeys(("targets", "cut", "left_out"), 0)
    for block in _blocks(texts, format, seq_len, counts):
        for window in best_fit([len(conversation.ids) for conversation in block], seq_len):
            yield _window([block[number] for number in window], seq_len, format.end_id)


def _message(message: dict[str, Any], number: int) -> dict[str, str]:
    # In parquet both forms' keys may be there, with nothing under one of them.
    share_gpt = message.get("from") is not None
    role, content = message.get("from" if share_gpt else "role"), message.get("value" if share_gpt else "content")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"message {number}: role {role!r} is not one of {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"message {number}: its content is no text but {type(content).__name__}")
    if _ROLES[role] == "assistant" and not content.strip():
        raise ValueError(f"message {number}: the assistant says nothing")
    return {"role": _ROLES[role], "content": content}


def _blocks(texts: Iterable[str], format: ChatFormat, seq_len: int, counts: dict[str, int]) -> Iterator[list[EncodedConversation]]:
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
