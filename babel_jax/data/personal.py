"""Personal data in text, replaced by what it is: e-mail addresses, phone numbers and card numbers, in any script's digits."""

import re
from collections import Counter

_EMAIL = re.compile(r"[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}")
_ZERO = "[0٠۰०০௦๐၀０]"
_SEPARATED = r"[ .\-\u2010-\u2013\u00a0]"
# 13 to 19 digits in groups; the first digit says who issued it (ISO/IEC 7812), and the last is Luhn's check digit.
_CARD = re.compile(r"(?<![\w.,+-])\d(?:[ -]?\d){12,18}(?![\w-])")
# International with +, or with an area code in parentheses or behind a 0, in at least two groups: 7 to 15 digits (ITU-T E.164).
_PHONE = re.compile(
    rf"(?<![\w.,/=-])(?:\+\d{{1,3}}(?:{_SEPARATED}?\(?\d{{1,4}}\)?){{2,5}}|\({_ZERO}?\d{{1,4}}\){_SEPARATED}?\d{{3,4}}(?:{_SEPARATED}\d{{2,4}}){{1,2}}"
    rf"|{_ZERO}\d{{1,4}}(?:{_SEPARATED}\d{{2,4}}){{2,3}}|\d{{3}}[-.]\d{{3}}[-.]\d{{4}})(?![\w/-]|[.,]\d)"
)
_ISSUERS = (2, 3, 4, 5, 6)


def mask(text: str, masked: Counter[str], digits: int) -> str:
    """The text with "[email]", "[phone]" and "[card]" in the place of such; `masked` counts them. `digits` is how many the text has."""
    if "@" in text:
        text = _replace(_EMAIL, "email", text, masked)
    if digits >= 13:
        text = _replace(_CARD, "card", text, masked)
    if digits >= 7:
        text = _replace(_PHONE, "phone", text, masked)
    return text


def _replace(pattern: re.Pattern[str], name: str, text: str, masked: Counter[str]) -> str:
    def replaced(found: re.Match[str]) -> str:
        if not _POSSIBLE[name](found.group()):
            return found.group()
        masked[name] += 1
        return f"[{name}]"

    return pattern.sub(replaced, text)


def _digits(text: str) -> list[int]:
    return [int(character) for character in text if character.isdecimal()]


def is_card(text: str) -> bool:
    """Whether the digits of a text can be a card's: an issuer's first digit and a right check digit (Luhn 1960, US patent 2,950,048)."""
    digits = _digits(text)
    doubled = [digit if place % 2 == 0 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and digits[0] in _ISSUERS and sum(doubled) % 10 == 0


_POSSIBLE = {"email": lambda text: True, "card": is_card, "phone": lambda text: 7 <= len(_digits(text)) <= 15}
