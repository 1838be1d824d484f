"""How many tokens a tokenizer spends on the text of each language."""

import dataclasses
from collections.abc import Mapping, Sequence

from babel_jax.data.tokens.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Fertility:
    """How many tokens a tokenizer spends on a language's text."""

    tokens: int
    characters: int
    bytes: int

    @property
    def tokens_per_character(self) -> float:
        """Tokens for each Unicode code point."""
        return self.tokens / self.characters

    @property
    def tokens_per_byte(self) -> float:
        """Tokens for each byte of UTF-8."""
        return self.tokens / self.bytes


def fertility(tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]]) -> dict[str, Fertility]:
    """The fertility on texts of each language; languages without any character are left out."""
    counted = {}
    for language, own in texts.items():
        tokens = sum(map(len, tokenizer.encode_batch(own)))
        characters = sum(map(len, own))
        if characters:
            counted[language] = Fertility(tokens, characters, sum(len(text.encode()) for text in own))
    return counted
