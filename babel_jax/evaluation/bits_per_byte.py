"""Held-out bits per byte by language: the bits that a model needs for a byte of UTF-8, comparable across
tokenizers.

    bits per byte = sum of -log2 p(token | tokens before it in its document) / bytes of those tokens

The first token of a document has no preceding token, so it has no probability: neither it nor its bytes
count. If a tokenizer puts a token before every text, the model reads this one too; the same tokens count. A
long document is read through a window that moves by half its length, so that every token has context. In
conversations only the assistant's tokens count, given all earlier messages. `babel train` and `babel
evaluate` both use this definition.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from babel_jax.data.tokens.chat_format import ChatFormat
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.evaluation.items import Items, bits_per_byte_of
from babel_jax.evaluation.prefix_trees import Scored
from babel_jax.evaluation.scoring import Score
from babel_jax.languages import Resource, in_order, is_of

LONGEST_WINDOW = 2048

Scorer = Callable[[Sequence[Scored]], Sequence[Score]]


@dataclasses.dataclass(frozen=True)
class TextToScore:
    """Documents as sequences for the scorer: (language, document) of each sequence, and the bytes of each
    document that count.
    """

    sequences: list[Scored]
    owners: list[tuple[str, int]]
    bytes_of: dict[str, list[int]]


def longest_window(seq_len: int, max_positions: int, conversations: bool) -> int:
    """The longest sequence that a run scores, in tokens: 2,048; for conversations at least `seq_len`; at most
    `max_positions`.
    """
    return min(max(LONGEST_WINDOW, seq_len) if conversations else LONGEST_WINDOW, max_positions)


def text_to_score(
    tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]], max_positions: int, max_bytes: int | None = None
) -> TextToScore:
    """The documents of each language with at least two tokens: the first ones, up to `max_bytes` of text.

    A window has 2,048 tokens, or `max_positions`. The next window begins half a window later and counts only
    its new tokens.
    """
    # The token before every text is read and never scored.
    begin, window = tokenizer.begin_ids, min(LONGEST_WINDOW, max_positions)
    to_score = TextToScore([], [], {})
    for code, documents in texts.items():
        chosen = first_bytes(documents, max_bytes)
        sizes = to_score.bytes_of[code] = []
        for text, ids in zip(chosen, tokenizer.encode_batch(chosen), strict=True):
            # A text of one token has nothing to predict.
            if len(ids) < 2:
                continue
            windows = sliding_windows(np.array([*begin, *ids], np.int32), window, len(begin) + 1)
            to_score.sequences.extend(windows)
            to_score.owners.extend([(code, len(sizes))] * len(windows))
            # The first token has no probability, so its bytes do not count.
            sizes.append(len(text.encode()) - bytes_of_first(tokenizer, text, ids))
    return to_score


def conversations_to_score(
    format: ChatFormat, texts: Mapping[str, Sequence[str]], max_positions: int, max_bytes: int | None = None
) -> TextToScore:
    """Conversations to score: one sequence for each turn of the assistant, with all earlier messages before
    it.

    texts: the output of `conversation_text`. A conversation is cut at `max_positions` tokens. It is left out
    if the rest has no token of the assistant.
    """
    to_score = TextToScore([], [], {})
    for code, conversations in texts.items():
        sizes = to_score.bytes_of[code] = []
        for text in first_bytes(conversations, max_bytes):
            encoded = format.encode_text(text)
            ids = np.array(encoded.ids[:max_positions], np.int32)
            # The targets are the assistant's tokens.
            turns = _turns(encoded.targets[: len(ids)])
            if not turns:
                continue

            # One sequence a turn: the model reads all earlier messages, and is scored on this one.
            assistant_ids: list[int] = []
            for start, stop in turns:
                assistant_ids += ids[start:stop].tolist()
                to_score.sequences.append(Scored(ids[: stop - 1], ids[start:stop]))
            to_score.owners.extend([(code, len(sizes))] * len(turns))
            sizes.append(len(format.decode(assistant_ids).encode()))
    return to_score


def _turns(targets: Sequence[bool]) -> list[tuple[int, int]]:
    """The runs (first, last + 1) of tokens that count. The very first token never counts: it has no preceding
    token.
    """
    runs, start = [], 0
    for is_target, group in itertools.groupby([False, *targets[1:]]):
        stop = start + len(list(group))
        if is_target:
            runs.append((start, stop))
        start = stop
    return runs


def scored_bits(text: TextToScore, scored: Scorer) -> dict[str, Items]:
    """The bits and bytes of each language's documents; a language without any byte that counts is left
    out.
    """
    # A long document is several sequences: their bits add up.
    bits = {code: np.zeros(len(counts)) for code, counts in text.bytes_of.items()}
    for (code, number), (log_p, _) in zip(text.owners, scored(text.sequences), strict=True):
        bits[code][number] -= log_p / np.log(2)
    items = {}
    for code, sizes in text.bytes_of.items():
        if sum(sizes):
            items[code] = bits_per_byte_of(bits[code], sizes)
    return items


def class_means(by_language: Mapping[str, float]) -> dict[str, float | None]:
    """Unweighted means over all languages and over each resource class; languages without a value are left
    out. None if no language has a value.
    """
    # Unweighted: a language with much held-out text does not count more.
    members = {"all": list(by_language)}
    for resource in Resource:
        members[str(resource)] = [code for code in in_order(by_language) if is_of(code, resource)]
    means: dict[str, float | None] = {}
    for name, codes in members.items():
        values = [by_language[code] for code in codes]
        means[name] = float(np.mean(values)) if values else None
    return means


def class_mean(by_language: Mapping[str, float], group: str) -> float:
    """The mean over all languages ("all") or over one resource class; NaN if no language has a value."""
    mean = class_means(by_language)[group]
    return float("nan") if mean is None else mean


def common_to(points: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The values of each point for the languages that all points have, so that their means can be compared. A
    run may get a language between two points, and a baseline may lack one. Points without any value stay
    empty, and do not count.
    """
    measured = [set(values) for values in points.values() if values]
    shared = set.intersection(*measured) if measured else set()
    common = {}
    for name, values in points.items():
        common[name] = {code: value for code, value in values.items() if code in shared}
    return common


def first_bytes(documents: Sequence[str], max_bytes: int | None) -> list[str]:
    """The first documents that together have at least `max_bytes` of text."""
    chosen, left = [], max_bytes
    for text in documents:
        if left is not None:
            if left <= 0:
                break
            left -= len(text.encode())
        chosen.append(text)
    return chosen


def bytes_of_first(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> int:
    """The bytes of a text's first token.

    If the token is a part of a character, which alone decodes to no text, the tokens of the character share
    its bytes.
    """
    for count in range(1, min(len(ids), 8) + 1):
        decoded = tokenizer.decode(ids[:count])
        if text.startswith(decoded):
            return round(len(decoded.encode()) / count)
    return len(tokenizer.decode(ids[:1]).encode())


def sliding_windows(ids: np.ndarray, size: int, first: int = 1) -> list[Scored]:
    """Windows of at most `size` tokens that the model reads. Every token from index `first` on is a target
    exactly once.
    """
    windows, scored = [], first
    while scored < len(ids):
        # The first window is full; each later one moves by half a window.
        stop = min(len(ids), size + 1 if scored == first else scored + max(1, size // 2))
        start = max(0, stop - 1 - size)
        windows.append(Scored(ids[start : stop - 1], ids[scored:stop]))
        scored = stop
    return windows
