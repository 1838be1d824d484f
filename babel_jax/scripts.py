"""Scripts: the direction of writing, words without spaces between them, and the ends of sentences.

Names are ISO 15924's; directions are the Unicode Character Database's. Marks that end a sentence have
Unicode's property Sentence_Terminal. A table of what is written, so that a rule for text follows the script
of a language and not a list of languages.
"""

import dataclasses
import functools
import re
from enum import StrEnum


class Direction(StrEnum):
    """The writing direction of a script."""

    LEFT_TO_RIGHT = "ltr"
    RIGHT_TO_LEFT = "rtl"


@dataclasses.dataclass(frozen=True)
class Script:
    """One script.

    - code, name: ISO 15924's
    - characters_a_word: None where spaces separate words. Else the mean length of a word in grapheme
      clusters; counts and n-grams take that many clusters as one word
    - space: the text between two sentences
    - ends: marks that end a sentence in this script, and not in others (Greek's question mark is `;`)
    """

    code: str
    name: str
    direction: Direction = Direction.LEFT_TO_RIGHT
    characters_a_word: int | None = None
    space: str = " "
    ends: str = ""


_RTL = Direction.RIGHT_TO_LEFT

# A word has 1.5 to 2 characters in segmented Chinese and Japanese text, about 4 clusters in Thai and Burmese.
# The other scripts without spaces have syllables of the same build as these two.
_SCRIPTS = (
    Script("Adlm", "Adlam", _RTL),
    Script("Arab", "Arabic", _RTL),
    Script("Armn", "Armenian"),
    Script("Bali", "Balinese", characters_a_word=4),
    Script("Beng", "Bengali"),
    Script("Bopo", "Bopomofo", characters_a_word=2, space=""),
    Script("Cakm", "Chakma"),
    Script("Cans", "Canadian Aboriginal syllabics"),
    Script("Cham", "Cham"),
    Script("Cher", "Cherokee"),
    Script("Cyrl", "Cyrillic"),
    Script("Deva", "Devanagari"),
    Script("Ethi", "Ethiopic"),
    Script("Geor", "Georgian"),
    Script("Grek", "Greek", ends=";\u037e"),
    Script("Gujr", "Gujarati"),
    Script("Guru", "Gurmukhi"),
    Script("Hang", "Hangul"),
    Script("Hani", "Han", characters_a_word=2, space=""),
    Script("Hans", "Han, simplified", characters_a_word=2, space=""),
    Script("Hant", "Han, traditional", characters_a_word=2, space=""),
    Script("Hebr", "Hebrew", _RTL),
    Script("Java", "Javanese", characters_a_word=4),
    Script("Jpan", "Japanese", characters_a_word=2, space=""),
    Script("Kali", "Kayah Li"),
    Script("Khmr", "Khmer", characters_a_word=4),
    Script("Knda", "Kannada"),
    Script("Kore", "Korean, Hangul and Han"),
    Script("Lana", "Tai Tham", characters_a_word=4),
    Script("Laoo", "Lao", characters_a_word=4),
    Script("Latn", "Latin"),
    Script("Lisu", "Lisu"),
    Script("Mand", "Mandaic", _RTL),
    Script("Mlym", "Malayalam"),
    Script("Mong", "Mongolian"),
    Script("Mtei", "Meitei Mayek"),
    Script("Mymr", "Myanmar", characters_a_word=4),
    Script("Nkoo", "N'Ko", _RTL),
    Script("Olck", "Ol Chiki"),
    Script("Orya", "Oriya"),
    Script("Osge", "Osage"),
    Script("Plrd", "Miao"),
    Script("Rohg", "Hanifi Rohingya", _RTL),
    Script("Samr", "Samaritan", _RTL),
    Script("Sinh", "Sinhala"),
    Script("Sund", "Sundanese"),
    Script("Syrc", "Syriac", _RTL),
    Script("Tale", "Tai Le", characters_a_word=4),
    Script("Talu", "New Tai Lue", characters_a_word=4),
    Script("Taml", "Tamil"),
    Script("Tavt", "Tai Viet", characters_a_word=4),
    Script("Telu", "Telugu"),
    Script("Tfng", "Tifinagh"),
    Script("Tglg", "Tagalog"),
    Script("Thaa", "Thaana", _RTL),
    Script("Thai", "Thai", characters_a_word=4),
    Script("Tibt", "Tibetan", characters_a_word=4),
    Script("Vaii", "Vai"),
    Script("Yiii", "Yi", characters_a_word=2),
)
SCRIPTS: dict[str, Script] = {script.code: script for script in _SCRIPTS}

# Code points of letters that are written without spaces between words: first and last, in steps of 16.
WITHOUT_SPACES = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0xA4CF),  # kana, Chinese characters, Bopomofo, Yi
    (0xA980, 0xA9FF),  # Javanese, Myanmar's extension B
    (0xAA60, 0xAADF),  # Myanmar's extension A, Tai Viet
    (0xF900, 0xFAFF),  # Chinese characters, compatibility
    (0x20000, 0x3FFFF),  # the rarer Chinese characters
)

# Marks that end a sentence in any script: of Unicode's Sentence_Terminal those of living scripts, and
# Tibetan's shad. Left out is Myanmar's U+104A, which is a comma. In this order: Latin, Armenian, Arabic,
# Syriac, N'Ko, Devanagari, Tibetan, Myanmar, Ethiopic, Canadian, Khmer, Mongolian, Balinese, Ol Chiki,
# Chinese, Lisu, Vai, Kayah Li, Javanese, Cham, Meitei Mayek, full width.
_ENDS = (
    ".!?\u0589\u061f\u06d4\u0700-\u0702\u07f9\u0964\u0965\u0f0d\u0f0e\u104b\u1362\u1367\u1368\u166e"
    "\u17d4\u17d5\u1803\u1809\u1b5a\u1b5b\u1b5e\u1b5f\u1c7e\u1c7f\u3002\ua4ff\ua60e\ua60f\ua92f"
    "\ua9c8\ua9c9\uaa5d-\uaa5f\uabeb\uff01\uff1f"
)
_CLOSING = "[\"'\u2019\u201d\u00bb\u300d\u300f)]*"


@functools.cache
def sentence_end(script: str) -> re.Pattern[str]:
    """Matches what is between two sentences in a script: closing quotes and white space after the mark."""
    ends = _ENDS + (SCRIPTS[script].ends if script in SCRIPTS else "")
    return re.compile(rf"(?<=[{ends}]){_CLOSING}\s*")
