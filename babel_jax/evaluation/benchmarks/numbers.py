"""Numbers with the digits of any script, compared as the answers of MGSM are."""

import re
import unicodedata
from decimal import Decimal

# Digits with separators between them: points, commas, the Arabic separators, an apostrophe, thin and fixed
# spaces; or groups of three after spaces. A minus is a sign unless it follows a word or a number: 10-15 is no
# negative number. 1e3 is a thousand. .5 is one half, unless its point ends a sentence.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-−])?(?:\d{1,3}(?: \d{3})+(?:[.,٫]\d+)?(?![\d.,]*\d)"
    r"|(?<![\w.)\]])[.٫]\d+|\d(?:[\d.,٬٫'’\u00a0\u202f\u2009]*\d)?(?:[eE][+-]?\d{1,2}(?!\w))?)"
)
_GROUPS = re.compile(r"[1-9]\d{0,2}(?:([ .,٬'’\u00a0\u202f\u2009])\d{3})(?:\1\d{3})*")
# The comma and the point beside full-width digits, and the comma and the spaces of thousands in LaTeX, each
# with its usual form. The full-width comma also separates the items of a list, so it counts only before
# groups of three digits.
_SEPARATORS = (
    (re.compile(r"(?<=[０-９])，(?=[０-９]{3}(?![０-９]))"), ","),
    (re.compile(r"(?<=[０-９])．(?=[０-９])"), "."),
    (re.compile(r"(?<=\d)(?:\{,\}|\\[,;: ]) ?(?=\d{3}(?!\d))"), ","),
)
# Signs that change the number before or after them: fractions, times, powers, and Chinese and Japanese
# multipliers.
_PART = re.compile(r"[/:]\d|[⁰¹²³⁴-⁹]|[十百千万亿億萬兆]")
_PART_BEFORE = re.compile(r"(?:\d[/:]|[十百千万亿億萬兆])\Z")


def last_number(text: str) -> Decimal | None:
    """The last number in a text; None if there is none, or if its digits are part of a fraction, a time or a
    power.

    Separators before groups of three digits separate thousands: 1,000 and 1.000 are a thousand. A single
    other separator is the decimal point: 2,5 and 2.5 are two and a half; so is one after a zero: 0.125. The
    zero may be missing: .5 is one half.
    """
    for separator, usual in _SEPARATORS:
        text = separator.sub(usual, text)
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    if _PART.match(text, last.end()) or _PART_BEFORE.search(text[max(0, last.start() - 2) : last.start()]):
        return None
    return _value(last[0])


def same_number(answer: str, number: int | float) -> bool:
    """True if the last number of an answer is `number` in its decimal form: 3.14 equals 3.14, although no
    float64 does.
    """
    return last_number(answer) == Decimal(str(number))


def _value(written: str) -> Decimal:
    sign = -1 if written[0] in "-−" else 1
    written, exponent, power = written.partition("e") if "e" in written else written.partition("E")
    if exponent:
        return _value(written).scaleb(int(power))

    # Digits of all scripts become 0 to 9.
    digits = ""
    for letter in written.lstrip("-−"):
        digits += str(unicodedata.digit(letter)) if letter.isdigit() else letter
    match = re.fullmatch(r"(.*?)(?:([.,٫])(\d+))?", digits, re.DOTALL)
    assert match is not None, "every text matches"
    whole, point, fraction = match.groups()
    # 1,000 and 1.000 are a thousand, and a number without a separator is itself.
    if _GROUPS.fullmatch(digits) or point is None:
        return sign * Decimal(re.sub(r"\D", "", digits))
    if _GROUPS.fullmatch(whole) or whole.isdigit() or not whole:
        return sign * Decimal(f"0{re.sub(r'[^0-9]', '', whole)}.{fraction}")
    return sign * Decimal(re.sub(r"\D", "", digits))
