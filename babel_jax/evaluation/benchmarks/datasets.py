"""The data sets of all benchmarks by name, with the checks of their rows: those of the report's six here, the
others in broad_datasets.py.
"""

import math
import re
import unicodedata
from collections.abc import Sequence

from babel_jax.evaluation.benchmarks.broad_datasets import BROAD_DATASETS
from babel_jax.evaluation.benchmarks.dataset import Dataset, Item, is_one_of
from babel_jax.languages import BABEL, REGISTRY


def _mmmlu(row: Item) -> str | None:
    empty = [letter for letter in "ABCD" if not str(row[letter]).strip()]
    if empty:
        return f"choice {empty[0]} is empty"
    return None if row["Answer"] in tuple("ABCD") else f"Answer is {row['Answer']!r}, not A, B, C or D"


def _m3exam(row: Item) -> str | None:
    background = row["background_description"]
    if not isinstance(background, list) or not all(isinstance(text, str) for text in background):
        return "background_description is no list of texts"
    if (
        not isinstance(row["options"], list)
        or not row["options"]
        or not all(str(option).strip() for option in row["options"])
    ):
        return "options is empty, or one of them is"
    labels = ", ".join(option_labels(row["options"]))
    if answer_index(row) is None:
        return f"answer_text is {row['answer_text']!r}, none of {labels}"
    return None


def _xcopa(row: Item) -> str | None:
    for key in ("premise", "choice1", "choice2"):
        if not str(row[key]).strip():
            return f"{key} is empty"
    if row["question"] not in ("cause", "effect"):
        return f"question is {row['question']!r}, neither cause nor effect"
    return None if is_one_of(row["label"], 2) else f"label is {row['label']!r}, neither 0 nor 1"


def _mgsm(row: Item) -> str | None:
    if not isinstance(row["answer"], str | None):
        return "answer is neither a text nor null"
    number = row["answer_number"]
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or abs(number) >= math.inf or number != number:
        return f"answer_number is {number!r}, no number"
    return None


def _xnli(row: Item) -> str | None:
    for key in ("premise", "hypothesis"):
        if not str(row[key]).strip():
            return f"{key} is empty"
    return None if is_one_of(row["label"], 3) else f"label is {row['label']!r}, not 0, 1 or 2"


def _translation(row: Item) -> str | None:
    for key in ("source", "target"):
        if not row[key].strip():
            return f"the {key} is empty"
    return None


def _same(*codes: str) -> dict[str, str]:
    return {code: code for code in codes}


# The names of FLORES+. A folder and the official archive have those of Flores-200.
_FLORES_PLUS = {}
for _code, _language in REGISTRY.items():
    if _code != "en" and "flores_plus" in _language.sets:
        _FLORES_PLUS[_code] = _language.flores_plus

DATASETS: dict[str, Dataset] = {
    "mmmlu": Dataset(
        "openai/MMMLU",
        {
            "ar": "AR_XY", "bn": "BN_BD", "de": "DE_DE", "es": "ES_LA", "fr": "FR_FR", "hi": "HI_IN",
            "id": "ID_ID", "it": "IT_IT",
            "ja": "JA_JP", "ko": "KO_KR", "pt": "PT_BR", "sw": "SW_KE", "zh": "ZH_CN",
        },
        ("test",),
        ("Question", "A", "B", "C", "D", "Answer", "Subject"),
        ("Question", "Subject"),
        _mmmlu,
    ),
    "m3exam": Dataset(
        "chiayewken/m3exam",
        {
            "en": "english", "zh": "chinese", "pt": "portuguese", "sw": "swahili", "vi": "vietnamese",
            "it": "italian", "jv": "javanese",
            "th": "thai",
        },
        ("test", "dev"),
        ("question_text", "background_description", "options", "answer_text", "level", "subject_category"),
        ("question_text", "level", "subject_category"),
        _m3exam,
    ),
    "xcopa": Dataset(
        "cambridgeltl/xcopa",
        _same("zh", "id", "sw", "ta", "vi", "tr", "it", "th"),
        ("test", "validation"),
        ("premise", "choice1", "choice2", "question", "label"),
        ("premise", "choice1", "choice2", "question"),
        _xcopa,
    ),
    "mgsm": Dataset(
        "juletxara/mgsm",
        _same("en", "zh", "es", "fr", "bn", "ru", "de", "ja", "sw", "th"),
        ("test", "train"),
        ("question", "answer", "answer_number"),
        ("question",),
        _mgsm,
    ),
    "xnli": Dataset(
        "facebook/xnli",
        _same("en", "zh", "hi", "es", "ar", "fr", "ru", "ur", "de", "sw", "vi", "tr", "th"),
        ("validation",),
        ("premise", "hypothesis", "label"),
        ("premise", "hypothesis"),
        _xnli,
    ),
    "flores200": Dataset(
        "openlanguagedata/flores_plus",
        _FLORES_PLUS,
        ("devtest", "dev"),
        ("source", "target"),
        ("source", "target"),
        _translation,
    ),
    **BROAD_DATASETS,
}  # fmt: skip
# The six of the report; `--tasks all` means these.
REPORTED = ("mmmlu", "m3exam", "xcopa", "mgsm", "xnli", "flores200")


def of_babel(benchmark: str) -> list[str]:
    """The languages of Babel's 25 that a benchmark has."""
    return [code for code in BABEL if code in DATASETS[benchmark].configs]


def option_labels(options: Sequence[str]) -> list[str]:
    """The labels of the options of an M3Exam question: "(1) ..." and "1. ..." give 1; A, B, ... if there are
    no labels.
    """
    # Labels must all differ: else the first letters of the answers would be taken for labels.
    matches = [re.match(r"\W*(\w)(?=[\W_])", str(option)) for option in options]
    labels = [match.group(1) for match in matches if match]
    if len(set(labels)) == len(options):
        return labels
    return [chr(ord("A") + number) for number in range(len(options))]


def answer_index(row: Item) -> int | None:
    """The index of the correct option of an M3Exam question; None if the answer is no option. The answer may
    have a digit of another script than its label, or a letter in the other case.
    """
    labels = [_plain_label(label) for label in option_labels(row["options"])]
    answer = _plain_label(str(row["answer_text"]).strip())
    return labels.index(answer) if answer in labels else None


def _plain_label(label: str) -> str:
    folded = unicodedata.normalize("NFKC", label).casefold()
    return "".join(str(unicodedata.digit(letter, letter)) for letter in folded)
