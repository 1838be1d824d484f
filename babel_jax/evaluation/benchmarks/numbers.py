"""Numbers in the digits of any script, as answers to MGSM are compared."""

import re
import unicodedata
from decimal import Decimal

# Digits with what may stand between them: points, commas, the Arabic separators, an apostrophe, thin and
# fixed spaces; or groups of three after spaces. A minus is a sign where no word or number stands before it:
# 10-15 is no negative number. 1e3 is a thousand. .5 is one half, unless its point ends a sentence.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-−])?(?:\d{1,3}(?: \d{3})+(?:[.,٫]\d+)?(?![\d.,]*\d)"
    r"|(?<![\w.)\]])[.٫]\d+|\d(?:[\d.,٬٫'’\u00a0\u202f\u2009]*\d)?(?:[eE][+-]?\d{1,2}(?!\w))?)"
)
_GROUPS = re.compile(r"[1-9]\d{0,2}(?:([ .,٬'’\u00a0\u202f\u2009])\d{3})(?:\1\d{3})*")
# How a comma and a point are written beside full-width digits, and the comma and the spaces of thousands in
# LaTeX. The full-width comma also parts the items of a list, so it counts before groups of three digits
# alone.
_SEPARATORS = (
    (re.compile(r"(?<=[０-９])，(?=[０-９]{3}(?![０-９]))"), ","),
    (re.compile(r"(?<=[０-９])．(?=[０-９])"), "."),
    (re.compile(r"(?<=\d)(?:\{,\}|\\[,;: ]) ?(?=\d{3}(?!\d))"), ","),
)
# What makes another number of the digits before or after it: fractions, times, powers, and Chinese and
# Japanese multipliers.
_PART = re.compile(r"[/:]\d|[⁰¹²³⁴-⁹]|[十百千万亿億萬兆]")
_PART_BEFORE = re.compile(r"(?:\d[/:]|[十百千万亿億萬兆])\Z")


def last_number(text: str) -> Decimal | None:
    """The last number in a text, None where there is none, or where the last digits are part of a fraction, a
    time or a power.

    Separators before groups of three digits are those of thousands (1,000 and 1.000 are a thousand), a single
    other one is the decimal point (2,5 and 2.5 are two and a half), and so is one behind a zero (0.125). The
    zero may be left out (.5 is one half).
    """
    for separator, usual in _SEPARATORS:
        text = separator.sub(usual, text)
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    found = numbers[-1]
    if _PART.match(text, found.end()) or _PART_BEFORE.search(text[max(0, found.start() - 2) : found.start()]):
        return None
    return _value(found[0])


def same_number(answer: str, number: int | float) -> bool:
    """Whether the last number of an answer is `number`, as it is written in decimals: 3.14 is 3.14, though no
    float64 is.
    """
    return last_number(answer) == Decimal(str(number))


def _value(written: str) -> Decimal:
    sign = -1 if written[0] in "-−" else 1
    written, exponent, power = written.partition("e") if "e" in written else written.partition("E")
    if exponent:
        return _value(written).scaleb(int(power))
    digits = "".join(
        str(unicodedata.digit(letter)) if letter.isdigit() else letter for letter in written.lstrip("-−")
    )
    whole, point, fraction = re.fullmatch(r"(.*?)(?:([.,٫])(\d+))?", digits, re.DOTALL).groups()  # type: ignore[union-attr]
    if _GROUPS.fullmatch(digits) or point is None:
        return sign * Decimal(re.sub(r"\D", "", digits))
    if _GROUPS.fullmatch(whole) or whole.isdigit() or not whole:
        return sign * Decimal(f"0{re.sub(r'[^0-9]', '', whole)}.{fraction}")
    return sign * Decimal(re.sub(r"\D", "", digits))
