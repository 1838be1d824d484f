"""Fertility: the number of tokens that a tokenizer uses for the text of each language."""

import dataclasses
from collections.abc import Mapping, Sequence

from babel_jax.data.tokens.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Fertility:
    """The sizes of a language's text: tokens, Unicode code points, and bytes of UTF-8."""

    tokens: int
    characters: int
    bytes: int

    @property
    def tokens_per_character(self) -> float:
        """Tokens per Unicode code point."""
        return self.tokens / self.characters

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per byte of UTF-8."""
        return self.tokens / self.bytes


def fertility(tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]]) -> dict[str, Fertility]:
    """The fertility on the texts of each language; languages without any character are left out."""
    by_language = {}
    for language, language_texts in texts.items():
        tokens = sum(map(len, tokenizer.encode_batch(language_texts)))
        characters = sum(map(len, language_texts))
        if characters:
            size = sum(len(text.encode()) for text in language_texts)
            by_language[language] = Fertility(tokens, characters, size)
    return by_language
