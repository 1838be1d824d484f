"""The reasons why cleaning drops documents, in words and with the settings that decide."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from babel_jax.config import CleaningSettings, Rule

EVALUATION = "evaluation"  # the reason of decontamination, beside the rules of cleaning
EXAMPLES = 3  # dropped documents of each rule that a part keeps as examples
EXAMPLE_CHARACTERS = 240
_MOST_LOST = 0.5  # of a source; if more is dropped, a warning says so
# What is wrong with a document, and the settings that decide.
_WORDS: dict[Rule, tuple[str, tuple[str, ...]]] = {
    Rule.CHARACTERS: ("too short", ("min_characters",)),
    Rule.ENCODING: ("wrongly decoded", ("max_damaged_fraction",)),
    Rule.DIGITS: ("too many digits", ("max_digit_fraction",)),
    Rule.LETTERS: ("too few letters", ("min_letter_fraction",)),
    Rule.WORDS: ("too few words with a letter", ("min_word_fraction",)),
    Rule.SYMBOLS: ("too many # and ellipses", ("max_symbols_per_word",)),
    Rule.BULLETS: ("too many lines with bullets", ("max_bullet_lines",)),
    Rule.ELLIPSES: ("too many lines that end in an ellipsis", ("max_ellipsis_lines",)),
    Rule.PLACEHOLDER: ("has placeholder text (lorem ipsum)", ()),
    Rule.LINES: ("too many repeated lines", ("max_repeated_lines", "max_repeated_line_characters")),
    Rule.PARAGRAPHS: (
        "too many repeated paragraphs",
        ("max_repeated_paragraphs", "max_repeated_paragraph_characters"),
    ),
    Rule.REPETITION: ("too many repeated words", ("max_commonest_ngram", "max_repeated_ngrams")),
    Rule.LANGUAGE: ("another language", ("min_language_probability",)),
}


def reason(rule: str, settings: Mapping[str, Any] | None) -> str:
    """A rule in words, with its settings: "too short: min_characters = 100".

    settings: the values of [data.cleaning]; None for the defaults.
    """
    if rule == EVALUATION:
        return "has text of an evaluation item: [data.decontamination]"
    if rule not in {str(known) for known in _WORDS}:
        return rule
    words, names = _WORDS[Rule(rule)]
    # Settings that the folder does not name had their defaults.
    values = CleaningSettings().model_dump(mode="json") | dict(settings or {})
    shown = [f"{name} = {_value(values[name])}" for name in names]
    return f"{words}: {', '.join(shown)}" if shown else words


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(f'{part:g}' for part in value)}]"
    return f"{value:g}"


def dropped_in_words(dropped: Mapping[str, int], settings: Mapping[str, Any] | None) -> str:
    """The dropped documents by rule, most first: "5,133 too short: min_characters = 100; 12 ..."."""
    most_first = Counter(dropped).most_common()
    return "; ".join(f"{count:,} {reason(rule, settings)}" for rule, count in most_first if count)


def losses(cleaning: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any] | None) -> list[str]:
    """A line for each source of a language of which cleaning drops more than half. cleaning: the counts by
    source (see `refined_counts`).
    """
    lines = []
    for name, source in cleaning.items():
        dropped = sum(source["dropped"].values())
        if dropped > _MOST_LOST * source["documents"]:
            lines.append(
                f"{name}: cleaning dropped {dropped:,} of {source['documents']:,} documents "
                f"({dropped / source['documents']:.0%}): {dropped_in_words(source['dropped'], settings)}"
            )
    return lines
