"""Tokens that no text gives: what a vocabulary holds without use."""

import contextlib
import dataclasses
from collections.abc import Mapping

from babel_jax.vocabulary.editable import Kind, Vocabulary

# A token may appear only beside other text: what is before it and after it.
_CONTEXTS = (
    ("", ""), (" ", ""), ("", " "), ("a", ""), ("", "a"),
    ("1", ""), ("\n", ""), ("", "\n"), (".", ""), ("", "."),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Unreachable:
    """Ids of tokens that no text gives.

    by_merges: no order of merges leads to them. by_splitting: the normalizer or the pre-tokenizer never
    leaves their text whole. dead: the ids of both that are no part of another token, so that they may be
    replaced.
    """

    by_merges: tuple[int, ...]
    by_splitting: tuple[int, ...]
    dead: tuple[int, ...]


def unreachable(vocabulary: Vocabulary, used: Mapping[int, int]) -> Unreachable:
    """The tokens that no text gives. used: occurrences of ids in text, which are reachable for sure.

    Tokens that end within a character are judged by their merges alone.
    """
    by_merges: list[int] = []
    waiting: dict[int, str] = {}
    for text, number in vocabulary.ids.items():
        content = vocabulary.bytes_of(text)
        # Single bytes are kept: any text can be written with them.
        if number in used or len(content) < 2:
            continue
        if vocabulary.tokens_of(text) != [number]:
            by_merges.append(number)
            continue
        with contextlib.suppress(UnicodeDecodeError):
            waiting[number] = content.decode()

    # Most tokens are found in the first context.
    for before, after in _CONTEXTS:
        tried = [f"{before}{plain}{after}" for plain in waiting.values()]
        encodings = vocabulary.library.encode_batch_fast(tried)
        # A copy of the numbers, because those that are found leave `waiting`.
        for number, encoding in zip(list(waiting), encodings, strict=True):
            if number in encoding.ids:
                del waiting[number]
    by_splitting = sorted(waiting)
    return Unreachable(
        tuple(by_merges), tuple(by_splitting), _replaceable(vocabulary, {*by_merges, *by_splitting})
    )


def _replaceable(vocabulary: Vocabulary, dead: set[int]) -> tuple[int, ...]:
    """The dead tokens that are no part of a token that is alive."""
    if vocabulary.kind is not Kind.BYTES:
        return tuple(sorted(dead))
    # For each token, the tokens that merges make of it; -1 for a merge whose result is no token.
    uses: dict[int, set[int]] = {}
    for left, right in merges_of(vocabulary):
        result = vocabulary.ids.get(left + right)
        for part in (left, right):
            uses.setdefault(vocabulary.ids[part], set()).add(-1 if result is None else result)
    # A token that is kept may keep others: until nothing changes.
    found = set(dead)
    while kept := {number for number in found if not uses.get(number, set()) <= found}:
        found -= kept
    return tuple(sorted(found))


def merges_of(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges of a BPE tokenizer.json, in either of its two spellings."""
    merges = []
    for entry in vocabulary.description["model"]["merges"]:
        left, right = entry.split(" ", 1) if isinstance(entry, str) else entry
        merges.append((left, right))
    return merges
