"""The data sets of the benchmarks in many languages, and the checks of their rows: Belebele (Bandarkar et al.
2023), SIB-200 (Adelani et al. 2023), Global-MMLU (Singh et al. 2024), INCLUDE (Romanou et al. 2024) and
MMLU-ProX (Xuan et al. 2025).

The names of their configurations follow from the registry: names of Flores-200, ISO 639-1 codes, or names in
English.
"""

from babel_jax.evaluation.benchmarks.dataset import Dataset, Item, is_one_of
from babel_jax.languages import REGISTRY, language

LETTERS = "ABCDEFGHIJ"
TOPICS = ("science/technology", "travel", "politics", "sports", "health", "entertainment", "geography")
# The subjects of MMLU-ProX, in the order of the harness.
SUBJECTS = (
    "biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history",
    "law", "math", "other", "philosophy", "physics", "psychology",
)  # fmt: skip
_BELEBELE_TEXTS = ("flores_passage", "question", "mc_answer1", "mc_answer2", "mc_answer3", "mc_answer4")
_OPTIONS = ("option_a", "option_b", "option_c", "option_d")
PROX_OPTIONS = tuple(f"option_{number}" for number in range(10))

_GLOBAL_MMLU = (
    "am ar bn cs de el en es fa fil fr ha he hi id ig it ja ko ky lt mg ms ne nl ny pl pt ro ru si sn so sr "
    "sv sw te tr uk vi yo zh"
)
_INCLUDE = (
    "Albanian Arabic Armenian Azerbaijani Basque Belarusian Bengali Bulgarian Chinese Croatian Dutch "
    "Estonian Finnish French Georgian German Greek Hebrew Hindi Hungarian Indonesian Italian Japanese "
    "Kazakh Korean Lithuanian Malay Malayalam Nepali Macedonian Persian Polish Portuguese Russian Serbian "
    "Spanish Tagalog Tamil Telugu Turkish Ukrainian Urdu Uzbek Vietnamese"
)
# Names of INCLUDE that are not those of the registry.
_INCLUDE_NAMES = {"Macedonian": "North Macedonian"}
_MMLU_PROX = "af ar bn cs de en es fr hi hu id it ja ko mr ne pt ru sr sw te th uk ur vi wo yo zh zu"


def _of_set(name: str) -> dict[str, str]:
    """{our code: name in Flores-200} of the languages of a set."""
    return {code: one.flores for code, one in REGISTRY.items() if name in one.sets}


def _by_code(codes: str) -> dict[str, str]:
    return {language(code).code: code for code in codes.split()}


def _by_name(names: str) -> dict[str, str]:
    ours = {one.name: code for code, one in REGISTRY.items()} | {"Tagalog": "tl"}
    return {ours[name]: _INCLUDE_NAMES.get(name, name) for name in names.split()}


def _empty(row: Item, keys: tuple[str, ...]) -> str | None:
    return next((f"{key} is empty" for key in keys if not row[key].strip()), None)


def _belebele(row: Item) -> str | None:
    if empty := _empty(
        row, ("flores_passage", "question", "mc_answer1", "mc_answer2", "mc_answer3", "mc_answer4")
    ):
        return empty
    answer = row["correct_answer_num"]
    return None if answer in tuple("1234") else f"correct_answer_num is {answer!r}, not a text from 1 to 4"


def _sib200(row: Item) -> str | None:
    if empty := _empty(row, ("text",)):
        return empty
    return None if row["category"] in TOPICS else f"category is {row['category']!r}, not {', '.join(TOPICS)}"


def _global_mmlu(row: Item) -> str | None:
    if empty := _empty(row, ("question", *_OPTIONS)):
        return empty
    return None if row["answer"] in tuple("ABCD") else f"answer is {row['answer']!r}, not A, B, C or D"


def _include(row: Item) -> str | None:
    if empty := _empty(row, ("question", *_OPTIONS)):
        return empty
    return None if is_one_of(row["answer"], 4) else f"answer is {row['answer']!r}, not 0, 1, 2 or 3"


def _with_options(row: Item) -> Item:
    """A row of INCLUDE with its options by letter: an earlier revision had a list of choices."""
    choices = row.get("choices")
    if _OPTIONS[0] in row or not isinstance(choices, list) or len(choices) != len(_OPTIONS):
        return row
    return {**row, **dict(zip(_OPTIONS, choices, strict=True))}


def _mmlu_prox(row: Item) -> str | None:
    # A row has ten options; those that its question lacks are null.
    given = []
    for letter, key in zip(LETTERS, PROX_OPTIONS, strict=True):
        if row[key] is not None:
            given.append(letter)
    not_text = [key for key in PROX_OPTIONS if not isinstance(row[key], str | None)]
    if not_text:
        return f"{not_text[0]} is neither a text nor null"
    if row["answer"] not in given:
        return f"answer is {row['answer']!r}, none of {', '.join(given)}"
    if row["category"] not in SUBJECTS:
        return f"category is {row['category']!r}, not {', '.join(SUBJECTS)}"
    return None if isinstance(row["cot_content"], str | None) else "cot_content is neither a text nor null"


BROAD_DATASETS = {
    "belebele": Dataset(
        "facebook/belebele",
        _of_set("belebele"),
        ("test",),
        (*_BELEBELE_TEXTS, "correct_answer_num"),
        (*_BELEBELE_TEXTS, "correct_answer_num"),
        _belebele,
    ),
    "sib200": Dataset(
        "Davlan/sib200",
        _of_set("sib200"),
        ("test", "validation"),
        ("text", "category"),
        ("text", "category"),
        _sib200,
    ),
    "global_mmlu": Dataset(
        "CohereLabs/Global-MMLU",
        _by_code(_GLOBAL_MMLU),
        ("test", "dev"),
        ("question", *_OPTIONS, "answer", "subject"),
        ("question", *_OPTIONS, "answer", "subject"),
        _global_mmlu,
    ),
    "include": Dataset(
        "CohereLabs/include-base-44",
        _by_name(_INCLUDE),
        ("test", "validation"),
        ("question", *_OPTIONS, "answer", "domain"),
        ("question", *_OPTIONS, "domain"),
        _include,
        _with_options,
    ),
    "mmlu_prox": Dataset(
        "li-lab/MMLU-ProX",
        _by_code(_MMLU_PROX),
        ("test", "validation"),
        ("question", *PROX_OPTIONS, "answer", "category", "cot_content"),
        ("question", "answer", "category"),
        _mmlu_prox,
    ),
}
