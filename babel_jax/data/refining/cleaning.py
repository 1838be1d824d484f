"""Cleans one document: normalizes its text, applies the rules that drop documents, and masks personal data.

Sources of the rules: the Babel report (arXiv 2503.00865): characters, digits. Gopher (Rae et al. 2021, arXiv
2112.11446, table A1): words, symbols, bullets, ellipses, lines, paragraphs, repetition. C4 (Raffel et al.
2020): placeholder. ROOTS (Laurençon et al. 2022): letters, language. `encoding`, for wrongly decoded text, is
ours.

Some rules are left out, because they fit English or prose only: Gopher's bounds on the number and mean length
of words, its stop words, and C4's rules on sentences, braces and bad words.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
from jaxtyping import Int64, UInt8, UInt64

from babel_jax.config import CleaningSettings, Rule
from babel_jax.data.refining.characters import (
    MAX_MARKS,
    CodePoints,
    Kind,
    clusters,
    code_points,
    kinds,
    nfc,
    with_short_runs_of_marks,
)
from babel_jax.data.refining.identification import probability_of
from babel_jax.data.refining.personal import mask
from babel_jax.data.refining.repetition import commonest_ngram, repeated_fractions, repeated_ngrams
from babel_jax.data.sources.streams import BadRowError
from babel_jax.languages import LANGUAGES

# Form feeds, vertical tabs and the separators of C0 separate words: they are page ends of PDF and soft line
# ends of word processors.
_SEPARATORS = re.compile(" ?[\x0b\x0c\x1c-\x1f]+ ?")
# The rest of C0 and C1 except tab and newline, and the byte order mark. Joiners (U+200C, U+200D) and marks of
# direction have a meaning and are kept.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x9f\ufeff]")
_LINE_ENDS = re.compile("\r\n?|\x85|\u2028|\u2029")
_BLANK_LINES = re.compile(r"\n{3,}")
# UTF-8 read as Windows-1252, such as "Ã©" for é and "â€™" for ’: the letters of the first two bytes of a
# sequence.
_MOJIBAKE = re.compile("[ÂÃ][\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â€[\x80-\xbf‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]?")
_BULLETS = ("•", "●", "○", "■", "▪", "‣", "◦", "·", "*", "-", "–", "—", "►", "➤", "・")
_ELLIPSES = ("…", "...", "。。。")
_SYMBOLS = re.compile(r"#|…|\.\.\.")
_PLACEHOLDER = "lorem ipsum"


def normalize(text: str) -> str:
    """Normalizes a text: Unicode's NFC, one kind of line end, no control characters, no white space at the
    ends of lines, no blank lines around the text.

    Indentation is kept, because code needs it. The time is linear in the length of the text. Raises
    BadRowError for a run of combining marks that no real text has.
    """
    text = _LINE_ENDS.sub("\n", text)
    text = _CONTROLS.sub("", _SEPARATORS.sub(" ", text))
    # Only now: a control character may separate a letter from its marks.
    # It returns the same object if no run is too long.
    if with_short_runs_of_marks(text) is not text:
        raise BadRowError(f"more than {MAX_MARKS} combining marks in a row, which no text has")
    text = "\n".join(map(str.rstrip, nfc(text).split("\n")))
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


@dataclasses.dataclass(frozen=True)
class MeasuredText:
    """A text with its language, code points, their kinds, and the number of each kind. The rules compute the
    rest.
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
        """(hashes, lengths, units per word): units are words, 1 per word; in a script without spaces they are
        characters.
        """
        # A script without spaces: its characters are the units, a fixed number of which count as a word.
        if (in_a_word := LANGUAGES[self.language].writing.characters_a_word) is not None:
            return *clusters(self.points, self.kinds), in_a_word
        words = self.text.split()
        # Hashes are only compared within one text, so it is no problem that they differ between processes.
        return (
            np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64),
            np.fromiter(map(len, words), np.int64, len(words)),
            1,
        )

    def words(self) -> float:
        """The approximate number of words."""
        if LANGUAGES[self.language].writing.characters_a_word is not None:
            units, _, in_a_word = self.units()
            return len(units) / in_a_word
        # A word begins at each character that is no space, after a space or at the start.
        space = self.kinds == Kind.SPACE
        return float(np.count_nonzero(space[:-1] & ~space[1:]) + (len(space) > 0 and not space[0]))


def text_features(text: str, language: str) -> MeasuredText:
    """The code points of a text, their kinds, and the number of each kind."""
    points = code_points(text)
    point_kinds = kinds(points)
    counts = np.bincount(point_kinds, minlength=len(Kind))
    return MeasuredText(text, language, points, point_kinds, counts)


@dataclasses.dataclass
class Cleaner:
    """Cleans documents of one language; `masked` counts the masked data."""

    settings: CleaningSettings
    language: str
    masked: Counter[str] = dataclasses.field(default_factory=Counter)

    def __call__(self, text: str) -> tuple[str, Rule | None]:
        """The clean text and None, or the normalized text and the rule that drops it.

        Raises BadRowError for text that cannot be cleaned.
        """
        document, rule = self.judged(text)
        if rule is not None:
            return document.text, rule
        return self.without_personal_data(document), None

    def judged(self, text: str) -> tuple[MeasuredText, Rule | None]:
        """The features of the normalized text, and the rule that drops it, if any."""
        document = text_features(normalize(text), self.language)
        for rule, drops in _RULES.items():
            if rule not in self.settings.off and drops(document, self.settings):
                return document, rule
        return document, None

    def without_personal_data(self, document: MeasuredText) -> str:
        """The text with personal data masked, if the settings ask for it."""
        if not self.settings.mask_personal_data:
            return document.text
        return mask(document.text, self.masked, int(document.counts[Kind.DIGIT]), self.language)


# --- The rules: True drops the document. Cheap rules come first. ------------------------------------------


def _characters(document: MeasuredText, settings: CleaningSettings) -> bool:
    return len(document.text) < settings.min_characters


def _encoding(document: MeasuredText, settings: CleaningSettings) -> bool:
    damaged = int(document.counts[Kind.DAMAGED])
    # Most texts have none of these letters, and a search for them is faster than the pattern.
    if "Ã" in document.text or "Â" in document.text or "â€" in document.text:
        damaged += len(_MOJIBAKE.findall(document.text))
    return damaged > settings.max_damaged_fraction * len(document.text)


def _digits(document: MeasuredText, settings: CleaningSettings) -> bool:
    return int(document.counts[Kind.DIGIT]) > settings.max_digit_fraction * len(document.text)


def _letters(document: MeasuredText, settings: CleaningSettings) -> bool:
    letters = int(document.counts[[Kind.LETTER, Kind.MARK]].sum())
    spaces = int(document.counts[[Kind.SPACE, Kind.FORMAT]].sum())
    return letters < settings.min_letter_fraction * (len(document.text) - spaces)


def _words(document: MeasuredText, settings: CleaningSettings) -> bool:
    """True if too many words have no letter. For scripts without spaces, the rule `letters` does this."""
    writing = LANGUAGES[document.language].writing
    if writing.characters_a_word is not None or not len(document.kinds):
        return False
    # The number of a character's word is the number of spaces before it; two spaces leave an empty word.
    space = document.kinds == Kind.SPACE
    word = np.cumsum(space)
    is_word, has_letter = np.zeros((2, int(word[-1]) + 1), bool)
    is_word[word[~space]] = True
    has_letter[word[document.kinds == Kind.LETTER]] = True
    return bool(np.count_nonzero(has_letter) < settings.min_word_fraction * np.count_nonzero(is_word))


def _symbols(document: MeasuredText, settings: CleaningSettings) -> bool:
    symbols = len(_SYMBOLS.findall(document.text))
    return symbols > 0 and symbols > settings.max_symbols_per_word * document.words()


def _bullets(document: MeasuredText, settings: CleaningSettings) -> bool:
    lines = document.lines()
    bullets = sum(line.startswith(_BULLETS) for line in lines)
    return bullets > settings.max_bullet_lines * len(lines)


def _ellipses(document: MeasuredText, settings: CleaningSettings) -> bool:
    lines = document.lines()
    ellipses = sum(line.endswith(_ELLIPSES) for line in lines)
    return ellipses > settings.max_ellipsis_lines * len(lines)


def _placeholder(document: MeasuredText, settings: CleaningSettings) -> bool:
    return _PLACEHOLDER in document.text.lower()


def _lines(document: MeasuredText, settings: CleaningSettings) -> bool:
    lines, characters = repeated_fractions(document.lines())
    return lines > settings.max_repeated_lines or characters > settings.max_repeated_line_characters


def _paragraphs(document: MeasuredText, settings: CleaningSettings) -> bool:
    if "\n\n" not in document.text:
        return False
    paragraphs = [part for part in document.text.split("\n\n") if part and not part.isspace()]
    repeated, characters = repeated_fractions(paragraphs)
    return (
        repeated > settings.max_repeated_paragraphs or characters > settings.max_repeated_paragraph_characters
    )


def _repetition(document: MeasuredText, settings: CleaningSettings) -> bool:
    units, lengths, in_a_word = document.units()
    for size, most in enumerate(settings.max_commonest_ngram, 2):
        if commonest_ngram(units, lengths, size * in_a_word) > most:
            return True
    covered = 1.0
    for size, most in enumerate(settings.max_repeated_ngrams, 5):
        # The n-grams within a longer one cover the same characters, so coverage only falls with the size.
        if covered <= min(settings.max_repeated_ngrams):
            return False
        covered = repeated_ngrams(units, lengths, size * in_a_word)
        if covered > most:
            return True
    return False


def _language(document: MeasuredText, settings: CleaningSettings) -> bool:
    probability = probability_of(document.text, document.language, settings.language_model)
    return probability is not None and probability < settings.min_language_probability


_RULES: dict[Rule, Callable[[MeasuredText, CleaningSettings], bool]] = {
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
