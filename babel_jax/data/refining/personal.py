"""Masks personal data in text: e-mail addresses, phone numbers and card numbers, with the digits of any
script.

Most numbers in a text are no personal data: dates, lists of years, ISBNs, amounts. So a number is masked only
if its form leaves little doubt. docs/reference/cleaning.md has precision and recall on a list of numbers,
and the errors met in real text.
"""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from babel_jax.data.sources.streams import BadRowError
from babel_jax.errors import BadInput

# Looking a number up in the numbering plans of several countries takes some milliseconds. A document with
# more numbers is a directory.
MAX_LOOKED_UP = 1_000

# Letters of scripts without spaces never belong to an address: 邮箱a@b.com联系我 is an address in a sentence.
_DENSE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef"
_LOCAL = re.compile(rf"(?:(?![{_DENSE}])[\w.+%-]){{1,64}}\Z")
_LOCAL_CHARACTERS = 64
_DOMAIN = re.compile(rf"@(?:(?:(?![{_DENSE}])[\w-]){{1,63}}\.){{1,8}}(?:(?![{_DENSE}])[^\W\d_]){{2,24}}")

_DASHES = "\\-\u2010-\u2014\uff0d"
# A number as it is written, with its separators: one, or two beside a parenthesis.
_NUMBER = re.compile(
    rf"(?<![\d.,/=:{_DASHES}])(?<!(?![{_DENSE}])\w)(?:[(\uff08](?=[+\uff0b]?\d{{1,5}}[)\uff09]))?[+\uff0b]?"
    rf"\d(?:[ ./()\uff08\uff09\u00a0\u202f{_DASHES}]{{0,2}}\d)*+"
)
_CONTINUES = re.compile(rf"(?![{_DENSE}])\w|[/=:{_DASHES}]|[.,]\d|\.[a-z]")
_GROUP = re.compile(r"\d+")
_PHONE_DIGITS = range(7, 16)  # ITU-T E.164
_NATIONAL_DIGITS = range(9, 13)

# Card numbers in the groups in which they are printed. The characters around them exclude lists of years and
# tables of numbers.
_CARD_AFTER = r"(?![\w.-]?\d|[ -]\d{4}(?!\d)|\w)"
_CARD = re.compile(
    (
        r"(?<![\w.,+-])(?<!\d[ -])(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|\d{4}([ "
        r"-]?)\d{6}\2\d{4,5}|\d{14,19})"
    )
    + _CARD_AFTER
)
# Issuers (ISO/IEC 7812): the first six digits and the lengths of their cards. Visa no longer has cards of 13
# digits; EAN codes have 13.
_ISSUERS: tuple[tuple[range, tuple[int, ...]], ...] = (
    (range(400000, 500000), (16, 19)),  # Visa
    (range(510000, 560000), (16,)),  # Mastercard
    (range(222100, 272100), (16,)),
    (range(340000, 350000), (15,)),  # American Express
    (range(370000, 380000), (15,)),
    (range(300000, 306000), (14, 16)),  # Diners Club
    (range(360000, 370000), (14, 16)),
    (range(380000, 400000), (14, 16)),
    (range(352800, 359000), (16, 19)),  # JCB
    (range(601100, 601200), (16, 19)),  # Discover
    (range(644000, 660000), (16, 19)),
    (range(620000, 630000), (16, 17, 18, 19)),  # UnionPay
    (range(220000, 220500), (16, 19)),  # Mir
    (range(506099, 506199), (16, 19)),  # Verve
    (range(508500, 509000), (16,)),  # RuPay
    (range(607000, 609000), (16,)),
    (range(979200, 979300), (16,)),  # Troy
)

_DAY = rf"(?:\d{{4,5}}|\d{{1,2}})[ ./{_DASHES}]\d{{1,2}}[ ./{_DASHES}](?:\d{{4,5}}|\d{{1,2}})"
_DATE = re.compile(rf"{_DAY}(?:[ {_DASHES}]{{1,3}}(?:{_DAY}|\d{{1,2}}(?:\.\d{{2}}){{0,2}}))?")
_SOCIAL_SECURITY = re.compile(r"\d{3}-\d{2}-\d{4}")
_DECIMAL = re.compile(r"\d+\.\d+")
_THOUSANDS = re.compile(r"\d{1,3}(?:([ .\u00a0\u202f])\d{3})(?:\1\d{3})*")
_NORTH_AMERICAN = re.compile(r"[2-9]\d\d([-.])\d{3}\1\d{4}")
_AREA_CODE = re.compile(r"[(\uff08](\d{2,5})[)\uff09]")
_CONTEXT_CHARACTERS = 16
# Words before a phone number, in Babel's 25 languages.
_CONTEXT = re.compile(
    r"(?:\b(?:tel|telp|tél|telf|phone|telephone|fax|whatsapp|viber|hotline|téléphone|telefon|telefono"
    r"|teléfono|telefone|celular|móvil|cellulare|ponsel|waya|telepono|đt|sđt|điện thoại|тел|телефон|моб)\b"
    r"|هاتف|تلفن|تليفون|جوال|موبايل|فون|फ़ोन|फोन|मोबाइल|ফোন|মোবাইল|தொலைபேசி|电话|手机|電話|電話番号|携帯"
    r"|전화|휴대폰|โทร|โทรศัพท์|ဖုန်း)"
    r"[^\d\n]{0,8}\Z",
    re.IGNORECASE,
)
# Words with other meanings too, such as horsepower: they count only before numbers that begin with 0.
_WEAK_CONTEXT = re.compile(r"\b(?:mobile|cell|handy|cep|gsm|hp|simu)\b[^\d\n]{0,8}\Z", re.IGNORECASE)
_OTHER_NUMBER = re.compile(
    r"(?:\b(?:isbn|issn|doi|ean|rfc|bug|id|imei|ip|vat|p\.? ?iva|cpf|cnpj|инн)(?:-1[03])?|№|#)\W{0,3}\Z",
    re.IGNORECASE,
)

# The countries where each language is spoken most. National numbers are looked up in their numbering plans.
_COUNTRIES = {
    "en": "US GB IN NG PK AU KE",
    "zh": "CN TW SG",
    "hi": "IN",
    "es": "ES MX CO AR PE CL",
    "ar": "EG SA DZ MA IQ AE",
    "fr": "FR BE CH CI SN CM",
    "bn": "BD IN",
    "pt": "BR PT AO MZ",
    "ru": "RU BY KZ",
    "ur": "PK IN",
    "id": "ID",
    "de": "DE AT CH",
    "ja": "JP",
    "sw": "TZ KE UG",
    "tl": "PH",
    "ta": "IN LK",
    "vi": "VN",
    "tr": "TR",
    "it": "IT CH",
    "jv": "ID",
    "ko": "KR",
    "ha": "NG",
    "fa": "IR AF",
    "th": "TH",
    "my": "MM",
}
_ALL_COUNTRIES = tuple(
    dict.fromkeys(country for countries in _COUNTRIES.values() for country in countries.split())
)


def _countries_of(language: str) -> tuple[str, ...]:
    """The countries of a language; for a language that is not in the table, all countries."""
    return tuple(_COUNTRIES[language].split()) if language in _COUNTRIES else _ALL_COUNTRIES


def mask(text: str, masked: Counter[str], digits: int, language: str | None = None) -> str:
    """The text with "[email]", "[phone]" and "[card]" in the place of personal data; `masked` counts them.

    digits: the number of digits in the text. National phone numbers have the formats of the countries of
    `language`, or of all countries. Raises BadRowError for a document with more than MAX_LOOKED_UP numbers
    that may be phone numbers.
    """
    if "@" in text:
        text = _without_addresses(text, masked)

    # A text with few digits has no such number: most texts end here.
    if digits >= 14:
        text = _CARD.sub(lambda match: _masked("card", match[0], is_card(match[0]), masked), text)
    if digits >= _PHONE_DIGITS.start:
        countries = _ALL_COUNTRIES if language is None else _countries_of(language)
        looked_up = itertools.count()
        text = _NUMBER.sub(
            lambda match: _masked("phone", match[0], _is_phone(match, countries, looked_up), masked), text
        )
    return text


def masked_text(text: str) -> str:
    """The output of `mask`; the unchanged text if `mask` refuses it."""
    try:
        return mask(text, Counter(), sum(map(str.isdecimal, text)))
    except BadRowError:
        return text


def _masked(name: str, written: str, is_personal: bool, masked: Counter[str]) -> str:
    masked[name] += is_personal
    return f"[{name}]" if is_personal else written


def _without_addresses(text: str, masked: Counter[str]) -> str:
    """The text with "[email]". It searches from each @ backwards and forwards, so the time is linear in the
    length.
    """
    kept, end = [], 0
    for domain in _DOMAIN.finditer(text):
        # No further back than a local part may be long, and not into the address before.
        start = max(end, domain.start() - _LOCAL_CHARACTERS)
        local = _local_part(text[start : domain.start()])
        if local:
            kept += [text[end : domain.start() - len(local)], "[email]"]
            end = domain.end()
            masked["email"] += 1
    return "".join([*kept, text[end:]])


_NOT_LOCAL = re.compile(rf"[{_DENSE}]|[^\w.+%-]")


def _local_part(before: str) -> str:
    return _NOT_LOCAL.split(before)[-1]


def _digits(text: str) -> str:
    return "".join(str(int(character)) for character in text if character.isdecimal())


def is_card(text: str) -> bool:
    """True if the digits of a text can be a card number: first digits and length of an issuer, and a correct
    check digit (Luhn 1960, US patent 2,950,048).
    """
    digits = _digits(text)
    first_six = int(digits[:6] or 0)
    # A check digit alone is not enough: one random number in ten has a correct one.
    if not any(first_six in prefixes and len(digits) in lengths for prefixes, lengths in _ISSUERS):
        return False

    # Every second digit from the right is doubled; the digits of the result are added.
    total = 0
    for position, digit in enumerate(reversed(digits)):
        total += int(digit) if position % 2 == 0 else sum(divmod(2 * int(digit), 10))
    return total % 10 == 0


def _is_phone(match: re.Match[str], countries: tuple[str, ...], looked_up: Iterator[int]) -> bool:
    """True if a number is a phone number: by its plus sign, the word before it, its area code, or the form of
    national numbers.
    """
    written, text = match[0], match.string
    groups = tuple(_GROUP.findall(written))
    digits = _digits(written)
    if len(digits) not in _PHONE_DIGITS or _CONTINUES.match(text, match.end()):
        return False

    # The word before a number can exclude it, or a plus sign can decide.
    before = text[max(0, match.start() - _CONTEXT_CHARACTERS) : match.start()]
    if _OTHER_NUMBER.search(before):
        return False
    if written[0] in "+\uff0b" or written[1] in "+\uff0b":
        _count(looked_up)
        return _is_international(digits, groups)

    if _is_another_number(written, groups, digits):
        return False
    # 1 000 000 may be an amount or a phone number, and 0 at the start is never an amount.
    amount = digits[0] != "0" and _THOUSANDS.fullmatch(written) is not None
    in_context = _CONTEXT.search(before) or (digits[0] == "0" and _WEAK_CONTEXT.search(before))
    if in_context and not (amount and len(groups[0]) < 3):
        return True
    if amount or len(digits) not in _NATIONAL_DIGITS:
        return False
    if digits[0] != "0" and (len(groups) == 1 or (len(groups) == 2 and "-" not in written)):
        # Two numbers side by side, such as columns of a table, are more common than phone numbers of two
        # groups without 0 or dash.
        return False

    # Only now: the numbering plans are slow.
    _count(looked_up)
    if area := _AREA_CODE.match(written):
        return _digits(area[1])[0] == "0" or _is_national(written, countries)
    if "US" in countries and _NORTH_AMERICAN.fullmatch(written):
        return True
    return not _is_isbn(digits) and _is_national(written, countries)


def _count(looked_up: Iterator[int]) -> None:
    if next(looked_up) >= MAX_LOOKED_UP:
        raise BadRowError(
            f"more than {MAX_LOOKED_UP:,} numbers that may be phone numbers; a directory is no text to "
            "train on"
        )


def _is_another_number(written: str, groups: tuple[str, ...], digits: str) -> bool:
    """True for a date, a decimal, a list of years, binary digits, or numbers with equal steps such as 02 04
    06 08 10.
    """
    if (
        _DATE.fullmatch(written)
        or _DECIMAL.fullmatch(written)
        or _SOCIAL_SECURITY.fullmatch(written)
        or _are_years(groups)
    ):
        return True
    steps = {int(after) - int(before) for before, after in itertools.pairwise(groups)}
    return (len(groups) > 3 and len(steps) == 1) or set(digits) <= {"0", "1"}


def _are_years(groups: tuple[str, ...]) -> bool:
    return len(groups) > 1 and all(
        len(group) == 4 and _digits(group)[:2] in ("17", "18", "19", "20") for group in groups
    )


def _is_isbn(digits: str) -> bool:
    """True if ten digits have the check digit of an ISBN."""
    if len(digits) != 10:
        return False
    return sum((10 - position) * int(digit) for position, digit in enumerate(digits)) % 11 == 0


@functools.lru_cache(maxsize=4096)
def _is_international(digits: str, groups: tuple[str, ...]) -> bool:
    library = _phonenumbers()
    try:
        number = library.parse(f"+{digits}", None)
    except library.NumberParseException:
        return False
    # The first group is the country code alone, or the code with two or more digits after it.
    code = str(number.country_code)
    return library.is_valid_number(number) and (_digits(groups[0]) == code or len(groups[0]) > len(code) + 1)


@functools.lru_cache(maxsize=4096)
def _is_national(written: str, countries: tuple[str, ...]) -> bool:
    """True if a number has the groups that one of the countries uses. Without groups, it must be a mobile
    number with a leading 0.
    """
    library = _phonenumbers()
    personal = (
        library.PhoneNumberType.FIXED_LINE,
        library.PhoneNumberType.MOBILE,
        library.PhoneNumberType.FIXED_LINE_OR_MOBILE,
    )
    # Digits without groups are more often an amount or an id than a telephone number.
    grouped = len(_GROUP.findall(written)) > 1
    for country in countries:
        matches = library.PhoneNumberMatcher(
            written, country, leniency=library.Leniency.STRICT_GROUPING, max_tries=1
        )
        for match in matches:
            kind = library.number_type(match.number)
            is_right_kind = kind in personal if grouped else kind == library.PhoneNumberType.MOBILE
            if match.raw_string == written.strip() and is_right_kind:
                return True
    return False


@functools.cache
def _phonenumbers() -> Any:
    """The library of numbering plans, imported only when a text has a number that may be a phone number."""
    try:
        import phonenumbers
    except ImportError:
        raise BadInput(
            "data.cleaning.mask_personal_data needs the package phonenumbers; pip install phonenumberslite, "
            "or set it to false"
        ) from None
    return phonenumbers
