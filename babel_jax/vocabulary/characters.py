"""Characters that a SentencePiece vocabulary lacks: its byte tokens have no merges, so nothing can be learned
on top of them before the characters themselves are tokens.
"""

import dataclasses
from collections import Counter

from babel_jax.config import VocabularySettings
from babel_jax.vocabulary.editable import Kind, Vocabulary
from babel_jax.vocabulary.words import Words


@dataclasses.dataclass(frozen=True)
class NewCharacter:
    """A character that becomes a token; `parts` is empty, as of all that no merge makes."""

    text: str
    group: int
    count: int
    parts: tuple[()] = ()


def new_characters(base: Vocabulary, words: Words, settings: VocabularySettings) -> list[NewCharacter]:
    """The characters of the languages' text that are no tokens yet and occur often enough, most frequent
    first; empty for byte-level vocabularies.
    """
    if base.kind is Kind.BYTES:
        return []
    known = set(base.texts)
    # Line breaks and tabs are bytes in every SentencePiece model; and protected words keep their tokens.
    often: Counter[str] = Counter()
    for language in settings.protect:
        for word, count in words.counts[language].items():
            often.update(dict.fromkeys(set(word) - known, count))
    most = settings.tolerance * sum(sum(words.counts[language].values()) for language in settings.protect)
    counts: dict[str, Counter[str]] = {}
    for language in settings.languages:
        counter = counts[language] = Counter()
        for word, count in words.counts[language].items():
            for character in set(word) - known:
                # A character that protected languages use often stays bytes, so that their words keep their
                # tokens.
                if character.isprintable() and often[character] <= most:
                    counter[character] += count
    # A character of several languages counts for the one that has it most often.
    found: dict[str, NewCharacter] = {}
    for group, language in enumerate(settings.languages):
        for character, count in counts[language].items():
            if count >= settings.least and (character not in found or found[character].count < count):
                found[character] = NewCharacter(character, group, count)
    ordered = sorted(found.values(), key=lambda entry: (-entry.count, entry.text))
    return ordered[: settings.tokens]
