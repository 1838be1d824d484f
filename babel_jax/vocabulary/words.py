"""The words of a text, as a tokenizer splits it before its merges apply, and how often each one occurs."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import regex
import tokenizers

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
# SentencePiece splits text in training, not in encoding: at spaces, at digits, and between letters and other
# characters. Learned pieces do not cross these bounds, so that the pieces of a text are the pieces of its
# words.
_PIECE_WORD = regex.compile(
    rf"{SPACE}?[\p{{L}}\p{{M}}\u200c\u200d]+"
    rf"|{SPACE}?\p{{N}}"
    rf"|{SPACE}?[^\s\p{{L}}\p{{M}}\p{{N}}{SPACE}]+"
    rf"|{SPACE}+"
    r"|\s+"
)
# A word is kept whole by the tokenizer, but one of so many characters is data, not language.
MOST_CHARACTERS = 200


@dataclasses.dataclass(frozen=True)
class Words:
    """Words with their number of occurrences, by language.

    A word is written as the tokenizer's vocabulary is: with U+2581 or U+0120 for a space. `bytes`: the UTF-8
    bytes of each language's text.
    """

    counts: Mapping[str, Mapping[str, int]]
    bytes: Mapping[str, int]


class Splitter:
    """Splits text into words by the normalizer and the pre-tokenizer of a tokenizer.

    in_pieces: True for tokenizers of SentencePiece, which have no pre-tokenizer of their own.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, in_pieces: bool):
        self._normalizer, self._pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
        self._in_pieces = in_pieces

    def __call__(self, text: str) -> list[str]:
        """The words of a text, in order."""
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        parts = [text]
        if self._pre_tokenizer is not None:
            parts = [part for part, _ in self._pre_tokenizer.pre_tokenize_str(text)]
        if not self._in_pieces:
            return parts
        words: list[str] = []
        for part in parts:
            words += _PIECE_WORD.findall(part)
        return words


def count_words(splitter: Splitter, texts: Mapping[str, Iterable[str]]) -> Words:
    """The words of each language's texts. Words over MOST_CHARACTERS are left out."""
    by_language: dict[str, dict[str, int]] = {}
    sizes: dict[str, int] = {}
    for language, documents in texts.items():
        counter: Counter[str] = Counter()
        sizes[language] = 0
        for text in documents:
            sizes[language] += len(text.encode())
            # Lines are counted apart: the pre-tokenizer is slow on very long strings.
            for line in re.split(r"(?<=\n)", text):
                counter.update(splitter(line))
        short = {word: count for word, count in counter.items() if len(word) <= MOST_CHARACTERS}
        by_language[language] = short
    return Words(by_language, sizes)
