"""Held-out bits per byte by language: how many bits a model needs for a byte of UTF-8, comparable across
tokenizers.

    bits per byte = sum of -log2 p(token | tokens before it in its document) / bytes of those tokens

The first token of a document has nothing to be predicted from, so neither it nor its bytes count. Where a
tokenizer begins every text with a token of its own the model reads that one too; the same tokens count. A
long document is read through a window that slides by half, so that every token has context before it. Of
conversations only what the assistant says counts, given all that was said before. `babel train` and `babel
evaluate` measure by this one definition.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from babel_jax.data.tokens.chat_format import ChatFormat
from babel_jax.data.tokens.tokenizers import Tokenizer
from babel_jax.evaluation.items import Items, bits_per_byte_of
from babel_jax.evaluation.prefix_trees import Scored
from babel_jax.evaluation.scoring import Score
from babel_jax.languages import Resource, codes_of

LONGEST_WINDOW = 2048

Scorer = Callable[[Sequence[Scored]], Sequence[Score]]


@dataclasses.dataclass(frozen=True)
class TextToScore:
    """Documents as sequences for the scorer: of each sequence its language and document, of each document its
    bytes that count.
    """

    sequences: list[Scored]
    owners: list[tuple[str, int]]
    bytes_of: dict[str, list[int]]


def longest_window(seq_len: int, max_positions: int, conversations: bool) -> int:
    """The most tokens of a sequence that a run scores: 2,048, and of conversations as many as it trains on;
    never more than positions.
    """
    return min(max(LONGEST_WINDOW, seq_len) if conversations else LONGEST_WINDOW, max_positions)


def text_to_score(
    tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]], max_positions: int, max_bytes: int | None = None
) -> TextToScore:
    """Each language's documents of two tokens or more, the first ones up to `max_bytes` of text.

    A window has 2,048 tokens, or `max_positions`; the next one begins half a window later and counts its new
    tokens alone.
    """
    begin, window = tokenizer.begin_ids, min(LONGEST_WINDOW, max_positions)
    found = TextToScore([], [], {})
    for code, documents in texts.items():
        chosen = first_bytes(documents, max_bytes)
        encoded = tokenizer.encode_batch(chosen)
        long = [(text, ids) for text, ids in zip(chosen, encoded, strict=True) if len(ids) > 1]
        found.bytes_of[code] = [
            len(text.encode()) - bytes_of_first(tokenizer, text, ids) for text, ids in long
        ]
        for number, (_, ids) in enumerate(long):
            own = sliding_windows(np.array([*begin, *ids], np.int32), window, len(begin) + 1)
            found.sequences.extend(own)
            found.owners.extend([(code, number)] * len(own))
    return found


def conversations_to_score(
    format: ChatFormat, texts: Mapping[str, Sequence[str]], max_positions: int, max_bytes: int | None = None
) -> TextToScore:
    """Conversations as `conversation_text` gives them: a sequence for each turn of the assistant, after all
    that was said before.

    A conversation is cut at `max_positions` tokens, and left out where nothing of the assistant's is before.
    """
    found = TextToScore([], [], {})
    for code, conversations in texts.items():
        found.bytes_of[code] = []
        for text in first_bytes(conversations, max_bytes):
            encoded = format.encode_text(text)
            ids = np.array(encoded.ids[:max_positions], np.int32)
            turns = _runs(encoded.targets[: len(ids)])
            if not turns:
                continue
            number, said = (
                len(found.bytes_of[code]),
                [token for start, stop in turns for token in ids[start:stop].tolist()],
            )
            found.bytes_of[code].append(len(format.decode(said).encode()))
            found.sequences.extend(Scored(ids[: stop - 1], ids[start:stop]) for start, stop in turns)
            found.owners.extend([(code, number)] * len(turns))
    return found


def _runs(targets: Sequence[bool]) -> list[tuple[int, int]]:
    """Where (first, one after the last) tokens that count stand together; the first token of all has nothing
    before it.
    """
    runs, start = [], 0
    for is_target, group in itertools.groupby([False, *targets[1:]]):
        stop = start + len(list(group))
        if is_target:
            runs.append((start, stop))
        start = stop
    return runs


def scored_bits(text: TextToScore, scored: Scorer) -> dict[str, Items]:
    """The bits and bytes of each language's documents; a language without any byte that
    counts is left out.
    """
    bits = {code: np.zeros(len(counts)) for code, counts in text.bytes_of.items()}
    for (code, number), (log_p, _) in zip(text.owners, scored(text.sequences), strict=True):
        bits[code][number] -= log_p / np.log(2)
    return {
        code: bits_per_byte_of(bits[code], counts) for code, counts in text.bytes_of.items() if sum(counts)
    }


def class_means(by_language: Mapping[str, float]) -> dict[str, float | None]:
    """Unweighted means over all languages and over each resource class, of those that have a value; None
    where none has.
    """
    groups = {"all": tuple(by_language), "high": codes_of(Resource.HIGH), "low": codes_of(Resource.LOW)}
    found = {
        name: [by_language[code] for code in codes if code in by_language] for name, codes in groups.items()
    }
    return {name: float(np.mean(values)) if values else None for name, values in found.items()}


def first_bytes(documents: Sequence[str], max_bytes: int | None) -> list[str]:
    """The first documents, until there are `max_bytes` of text or more."""
    chosen, left = [], max_bytes
    for text in documents:
        if left is not None:
            if left <= 0:
                break
            left -= len(text.encode())
        chosen.append(text)
    return chosen


def bytes_of_first(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> int:
    """Bytes of a text's first token.

    The tokens of a character that is cut, which alone decode to no text, share its bytes.
    """
    for count in range(1, min(len(ids), 8) + 1):
        decoded = tokenizer.decode(ids[:count])
        if text.startswith(decoded):
            return round(len(decoded.encode()) / count)
    return len(tokenizer.decode(ids[:1]).encode())


def sliding_windows(ids: np.ndarray, size: int, first: int = 1) -> list[Scored]:
    """Windows of at most `size` tokens that the model reads, in which every token from the place `first` on
    is a target once.
    """
    windows, scored = [], first
    while scored < len(ids):
        stop = min(len(ids), size + 1 if scored == first else scored + max(1, size // 2))
        start = max(0, stop - 1 - size)
        windows.append(Scored(ids[start : stop - 1], ids[scored:stop]))
        scored = stop
    return windows
