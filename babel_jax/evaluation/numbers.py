"""Numbers in the digits of any script, as answers to MGSM are compared."""

import re
import unicodedata
from decimal import Decimal

# Digits with what may stand between them: points, commas, the Arabic separators, an apostrophe, thin and fixed spaces.
_NUMBER = re.compile(r"[-−]?\d(?:[\d.,٫٬'’\u00a0\u202f\u2009]*\d)?")
_GROUPS = re.compile(r"[1-9]\d{0,2}(?:([.,٬'’\u00a0\u202f\u2009])\d{3})(?:\1\d{3})*")


def last_number(text: str) -> Decimal | None:
    """The last number in a text, None where there is none.

    Separators before groups of three digits are those of thousands (1,000 and 1.000 are a thousand), a single other one is the decimal
    point (2,5 and 2.5 are two and a half), and so is one behind a zero (0.125).
    """
    found = _NUMBER.findall(text)
    return _value(found[-1]) if found else None


def _value(written: str) -> Decimal:
    sign = -1 if written[0] in "-−" else 1
    digits = "".join(str(unicodedata.digit(letter)) if letter.isdigit() else letter for letter in written.lstrip("-−"))
    whole, point, fraction = re.fullmatch(r"(.*?)(?:([.,٫])(\d+))?", digits, re.DOTALL).groups()  # type: ignore[union-attr]
    if _GROUPS.fullmatch(digits) or point is None:
        return sign * Decimal(re.sub(r"\D", "", digits))
    if _GROUPS.fullmatch(whole) or whole.isdigit():
        return sign * Decimal(f"{re.sub(r'[^0-9]', '', whole)}.{fraction}")
    return sign * Decimal(re.sub(r"\D", "", digits))
