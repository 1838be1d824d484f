"""The benchmarks in many languages as tasks of lm-evaluation-harness. Their prompts are those of the harness,
of which some have a task for each subject, or for few languages; here each language is one task.
"""

import functools
import json
from typing import Any

from babel_jax.evaluation.benchmarks.broad_datasets import (
    BROAD_DATASETS,
    LETTERS,
    PROX_OPTIONS,
    SUBJECTS,
    TOPICS,
)
from babel_jax.evaluation.benchmarks.dataset import Item

Configs = dict[str, dict[str, Any]]

_FOUR = ["A", "B", "C", "D"]
PROX_NEW_TOKENS = 2048  # of an answer to MMLU-ProX, as in the harness


def mean_of(metric: str) -> list[dict[str, Any]]:
    """The harness's setting of a metric that is averaged over items."""
    return [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]


def first_of(split: str) -> dict[str, Any]:
    """The harness's settings of examples: the first rows of a split."""
    return {"fewshot_split": split, "fewshot_config": {"sampler": "first_n"}}


def of_one_kind(sampler: type, **more: Any) -> dict[str, Any]:
    """The harness's settings of examples of the item's own kind, from another split than the items.

    The harness passes the item to the sampler only if the examples are of its split. So the settings name
    "test", and `load_tasks` replaces the examples by those of the split.
    """
    return {"fewshot_split": "test", "fewshot_config": {"sampler": sampler, "process_docs": None, **more}}


def belebele(code: str) -> Configs:
    """Questions about a passage, with four answers."""
    answers = [f"{letter}: {{{{mc_answer{number}}}}}" for number, letter in enumerate(_FOUR, 1)]
    return {
        f"belebele_{BROAD_DATASETS['belebele'].configs.get(code, code)}": {
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "P: {{flores_passage}}\nQ: {{question.strip()}}\n"
            + "\n".join(answers)
            + "\nAnswer:",
            "doc_to_choice": _FOUR,
            "doc_to_target": "{{['1', '2', '3', '4'].index(correct_answer_num)}}",
            "metric_list": mean_of("acc"),
            **first_of("test"),
        }
    }


def sib200(code: str) -> Configs:
    """The topic of a sentence, of seven."""
    topics = f"{', '.join(TOPICS[:-1])}, or {TOPICS[-1]}"
    return {
        f"sib200_{code}": {
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": f"Given the categories {topics}; what category does the text: "
            "'{{text}}' belong to: \n\n",
            "doc_to_choice": list(TOPICS),
            "doc_to_target": "category",
            "metric_list": mean_of("acc"),
            **first_of("validation"),
        }
    }


_OF_FOUR = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question.strip()}}\nA. {{option_a}}\nB. {{option_b}}\nC. {{option_c}}\nD. {{option_d}}"
    "\nAnswer:",
    "doc_to_choice": _FOUR,
    "doc_to_target": "answer",
    "metric_list": mean_of("acc"),
}


def global_mmlu(sampler: type, code: str) -> Configs:
    """MMLU's questions, translated. sampler: of the examples of the item's subject."""
    return {f"global_mmlu_{code}": {**_OF_FOUR, **of_one_kind(sampler)}}


def include(code: str) -> Configs:
    """Questions of local exams."""
    about = "The following is multiple-choice question about {{domain}}."
    # A slip of the harness: its scores can only be compared with those of the same prompt.
    text = str(_OF_FOUR["doc_to_text"]).replace("\nD.", "\n D.")
    return {
        f"include_{code}": {
            **_OF_FOUR,
            "description": about,
            "doc_to_text": text,
            **first_of("validation"),
        }
    }


def mmlu_prox(sampler: type, code: str) -> Configs:
    """MMLU-Pro's questions, translated, answered step by step. sampler: of the examples of the item's
    category.
    """
    # Slow to import, and only this benchmark needs it.
    from lm_eval.tasks.mmlu_prox.lang_libs import LANG_LIBS, LANG_SUBJECTS

    # The words of a prompt: question, options, the beginning of an answer, the task, "A: ..." as the data has
    # it, and the last sentence of an answer.
    question, options, answer, task, stored, last = LANG_LIBS[code]
    subjects = LANG_SUBJECTS[code]

    # A Jinja expression, the one kind of description that the harness makes for each item.
    about = {}
    for category in SUBJECTS:
        subject = subjects[category.replace(" ", "_")]
        about[category] = task.format(subject=subject, ans_suffix=last.format("X")) + "\n"
    description = f"{{{{ {json.dumps(about, ensure_ascii=False)}[category] }}}}"

    def text(row: Item, with_answer: bool = False) -> str:
        lines = [question, row["question"], options]
        for letter, key in zip(LETTERS, PROX_OPTIONS, strict=True):
            if row[key] is not None:
                lines.append(f"{letter}. {row[key]}")
        lines.append((row["cot_content"] or "").replace(stored, answer) + "\n\n" if with_answer else answer)
        return "\n".join(lines)

    # The answer is read by the last sentence of a solution, in which the letter may be in parentheses.
    pattern = last.replace("({})", rf"\(?([{LETTERS}])\)?")
    pattern = pattern.removeprefix("the ") if code == "en" else pattern
    extract = [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]
    return {
        f"mmlu_prox_{code}": {
            "output_type": "generate_until",
            "test_split": "test",
            "description": description,
            "doc_to_text": text,
            "doc_to_target": "answer",
            "filter_list": [{"name": "custom-extract", "filter": extract}],
            "generation_kwargs": {
                "until": ["</s>", "Q:", question, "<|im_end|>"],
                "do_sample": False,
                "temperature": 0.0,
                "max_gen_toks": PROX_NEW_TOKENS,
            },
            "metric_list": [
                {**mean_of("exact_match")[0], "ignore_case": True, "ignore_punctuation": True},
            ],
            **of_one_kind(sampler, doc_to_text=functools.partial(text, with_answer=True), doc_to_target=""),
        }
    }
