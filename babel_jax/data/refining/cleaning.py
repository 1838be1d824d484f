"""Cleaning one document: its text normalized, the rules that drop it, and personal data masked.

Where a rule comes from: the Babel report (arXiv 2503.00865): characters, digits. Gopher (Rae et al. 2021,
arXiv 2112.11446, table A1): words, symbols, bullets, ellipses, lines, paragraphs, repetition. C4 (Raffel et
al. 2020): placeholder. ROOTS (Laurençon et al. 2022): letters, language. Gopher's bounds on the number and
the mean length of words, its stop words, and C4's on sentences, braces and bad words are for English, or for
prose alone, and are not here. `encoding` is ours: text that was decoded wrongly.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
from jaxtyping import Int64, UInt8, UInt64

from babel_jax.config import CleaningSettings, Rule
from babel_jax.data.refining.characters import (
    CHARACTERS_A_WORD,
    MAX_MARKS,
    CodePoints,
    Kind,
    clusters,
    code_points,
    kinds,
    nfc,
    with_short_runs_of_marks,
)
from babel_jax.data.refining.identification import language_probabilities
from babel_jax.data.refining.personal import mask
from babel_jax.data.refining.repetition import commonest_ngram, repeated_fractions, repeated_ngrams
from babel_jax.data.sources.streams import BadRowError

# Form feeds, vertical tabs and the separators of C0 stand between words: page ends of PDF, soft line ends of
# word processors.
_SEPARATORS = re.compile(" ?[\x0b\x0c\x1c-\x1f]+ ?")
# The rest of C0 and C1 but tab and newline, and the byte order mark. Joiners (U+200C, U+200D) and marks of
# direction carry meaning.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x9f\ufeff]")
_LINE_ENDS = re.compile("\r\n?|\x85|\u2028|\u2029")
_BLANK_LINES = re.compile(r"\n{3,}")
# UTF-8 read as Windows-1252, such as "Ã©" for é and "â€™" for ’: the first byte of a sequence and what its
# second byte became.
_MOJIBAKE = re.compile("[ÂÃ][\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â€[\x80-\xbf‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]?")
_BULLETS = ("•", "●", "○", "■", "▪", "‣", "◦", "·", "*", "-", "–", "—", "►", "➤", "・")
_ELLIPSES = ("…", "...", "。。。")
_SYMBOLS = re.compile(r"#|…|\.\.\.")
_PLACEHOLDER = "lorem ipsum"


def normalize(text: str) -> str:
    """Unicode's NFC, one kind of line end, no control characters, no white space at the ends of lines, no
    blank lines around the text.

    Indentation stays, as code has it. The time is linear in the length of the text. Raises BadRowError for a
    run of combining marks that no text has.
    """
    text = _LINE_ENDS.sub("\n", text)
    text = _CONTROLS.sub("", _SEPARATORS.sub(" ", text))
    # After the control characters are gone, one of which may stand between a letter and its mark.
    if with_short_runs_of_marks(text) is not text:
        raise BadRowError(f"more than {MAX_MARKS} combining marks in a row, which no text has")
    text = "\n".join(map(str.rstrip, nfc(text).split("\n")))
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the rules look at: the text, its code points and their kinds; more is computed when a rule asks
    for it.
    """

    text: str
    language: str
    points: CodePoints
    kinds: UInt8[np.ndarray, "characters"]
    counts: Int64[np.ndarray, "kinds"]

    def lines(self) -> list[str]:
        """The lines that are not blank, stripped."""
        return [line.strip() for line in self.text.split("\n") if line and not line.isspace()]

    def units(self) -> tuple[UInt64[np.ndarray, "units"], Int64[np.ndarray, "units"], int]:
        """Hashes and lengths of the words, or of the characters of a script without spaces, and how many make
        a word.
        """
        if self.language in CHARACTERS_A_WORD:
            return *clusters(self.points, self.kinds), CHARACTERS_A_WORD[self.language]
        words = self.text.split()
        # Only equal or not matters, so that a hash which differs from process to process serves.
        return (
            np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64),
            np.fromiter(map(len, words), np.int64, len(words)),
            1,
        )

    def words(self) -> float:
        """How many words it has, about."""
        if self.language in CHARACTERS_A_WORD:
            units, _, in_a_word = self.units()
            return len(units) / in_a_word
        space = self.kinds == Kind.SPACE
        return float(np.count_nonzero(space[:-1] & ~space[1:]) + (len(space) > 0 and not space[0]))


def measure(text: str, language: str) -> Measured:
    """A document's text, measured."""
    points = code_points(text)
    of = kinds(points)
    return Measured(text, language, points, of, np.bincount(of, minlength=len(Kind)))


@dataclasses.dataclass
class Cleaner:
    """Cleans documents of one language; `masked` counts what was masked."""

    settings: CleaningSettings
    language: str
    masked: Counter[str] = dataclasses.field(default_factory=Counter)

    def __call__(self, text: str) -> tuple[str, Rule | None]:
        """The text to keep, or the normalized text and the rule that drops it.

        Raises BadRowError for text that cannot be cleaned.
        """
        document, rule = self.judged(text)
        return (document.text, rule) if rule is not None else (self.without_personal_data(document), None)

    def judged(self, text: str) -> tuple[Measured, Rule | None]:
        """The normalized text, measured, and the rule that drops it."""
        document = measure(normalize(text), self.language)
        for rule, drops in _RULES.items():
            if rule not in self.settings.off and drops(document, self.settings):
                return document, rule
        return document, None

    def without_personal_data(self, document: Measured) -> str:
        """The text with personal data masked, where the settings say so."""
        if not self.settings.mask_personal_data:
            return document.text
        return mask(document.text, self.masked, int(document.counts[Kind.DIGIT]), self.language)


# --- the rules, cheap ones first --------------------------------------------------------------------------


def _characters(document: Measured, settings: CleaningSettings) -> bool:
    return len(document.text) < settings.min_characters


def _encoding(document: Measured, settings: CleaningSettings) -> bool:
    damaged = int(document.counts[Kind.DAMAGED])
    if "Ã" in document.text or "Â" in document.text or "â€" in document.text:
        damaged += len(_MOJIBAKE.findall(document.text))
    return damaged > settings.max_damaged_fraction * len(document.text)


def _digits(document: Measured, settings: CleaningSettings) -> bool:
    return int(document.counts[Kind.DIGIT]) > settings.max_digit_fraction * len(document.text)


def _letters(document: Measured, settings: CleaningSettings) -> bool:
    letters = int(document.counts[[Kind.LETTER, Kind.MARK]].sum())
    return letters < settings.min_letter_fraction * (
        len(document.text) - int(document.counts[[Kind.SPACE, Kind.FORMAT]].sum())
    )


def _words(document: Measured, settings: CleaningSettings) -> bool:
    """Too many words without a letter; where words are not separated, `letters` says as much."""
    if document.language in CHARACTERS_A_WORD or not len(document.kinds):
        return False
    space = document.kinds == Kind.SPACE
    number = np.cumsum(space)
    has_any, has_letter = np.zeros((2, int(number[-1]) + 1), bool)
    has_any[number[~space]] = True
    has_letter[number[document.kinds == Kind.LETTER]] = True
    return bool(np.count_nonzero(has_letter) < settings.min_word_fraction * np.count_nonzero(has_any))


def _symbols(document: Measured, settings: CleaningSettings) -> bool:
    found = len(_SYMBOLS.findall(document.text))
    return found > 0 and found > settings.max_symbols_per_word * document.words()


def _bullets(document: Measured, settings: CleaningSettings) -> bool:
    lines = document.lines()
    return sum(line.startswith(_BULLETS) for line in lines) > settings.max_bullet_lines * len(lines)


def _ellipses(document: Measured, settings: CleaningSettings) -> bool:
    lines = document.lines()
    return sum(line.endswith(_ELLIPSES) for line in lines) > settings.max_ellipsis_lines * len(lines)


def _placeholder(document: Measured, settings: CleaningSettings) -> bool:
    return _PLACEHOLDER in document.text.lower()


def _lines(document: Measured, settings: CleaningSettings) -> bool:
    lines, characters = repeated_fractions(document.lines())
    return lines > settings.max_repeated_lines or characters > settings.max_repeated_line_characters


def _paragraphs(document: Measured, settings: CleaningSettings) -> bool:
    if "\n\n" not in document.text:
        return False
    paragraphs, characters = repeated_fractions(
        [part for part in document.text.split("\n\n") if part and not part.isspace()]
    )
    return (
        paragraphs > settings.max_repeated_paragraphs
        or characters > settings.max_repeated_paragraph_characters
    )


def _repetition(document: Measured, settings: CleaningSettings) -> bool:
    units, lengths, in_a_word = document.units()
    for size, most in enumerate(settings.max_commonest_ngram, 2):
        if commonest_ngram(units, lengths, size * in_a_word) > most:
            return True
    covered = 1.0
    for size, most in enumerate(settings.max_repeated_ngrams, 5):
        # What a longer n-gram covers, the shorter ones in it cover too.
        if covered <= min(settings.max_repeated_ngrams):
            return False
        covered = repeated_ngrams(units, lengths, size * in_a_word)
        if covered > most:
            return True
    return False


def _language(document: Measured, settings: CleaningSettings) -> bool:
    return language_probabilities(document.text)[document.language] < settings.min_language_probability


_RULES: dict[Rule, Callable[[Measured, CleaningSettings], bool]] = {
    Rule.CHARACTERS: _characters,
    Rule.ENCODING: _encoding,
    Rule.DIGITS: _digits,
    Rule.LETTERS: _letters,
    Rule.WORDS: _words,
    Rule.SYMBOLS: _symbols,
    Rule.BULLETS: _bullets,
    Rule.ELLIPSES: _ellipses,
    Rule.PLACEHOLDER: _placeholder,
    Rule.LINES: _lines,
    Rule.PARAGRAPHS: _paragraphs,
    Rule.REPETITION: _repetition,
    Rule.LANGUAGE: _language,
}
