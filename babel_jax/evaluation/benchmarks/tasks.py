"""The benchmarks as tasks of lm-evaluation-harness, in every language with data: the six of the technical
report here, the others in broad_tasks.py.

XCOPA, XNLI and MGSM are tasks of the harness (prompts, metrics, splits); the others are configured here.
Few-shot examples are the first rows, so that they are computed once for many items; for MMMLU and M3Exam the
first rows of the item's own subject or exam. An item is never its own example.
"""

import dataclasses
import functools
import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.api.task
import lm_eval.tasks
import pyarrow
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import Task
from tqdm import tqdm

from babel_jax.errors import BadInput, one_line
from babel_jax.evaluation.benchmarks import broad_tasks
from babel_jax.evaluation.benchmarks.broad_tasks import first_of, mean_of, of_one_kind
from babel_jax.evaluation.benchmarks.data import read_rows
from babel_jax.evaluation.benchmarks.dataset import Item
from babel_jax.evaluation.benchmarks.datasets import DATASETS, answer_index, option_labels
from babel_jax.evaluation.benchmarks.numbers import same_number
from babel_jax.languages import LANGUAGES

log = logging.getLogger("babel")

# The harness logs each of its steps, and warns of settings that are intended. Its progress bars follow the
# same rules as ours.
logging.getLogger("lm_eval").setLevel(logging.ERROR)
lm_eval.api.task.tqdm = functools.partial(tqdm, desc="prompts", leave=False, disable=None)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark: the harness's metric that is its score, and the default number of examples in a prompt.

    configs(language) gives {name of a task: its config}. If the harness has a task of that name, the config
    changes the harness's own.
    """

    metric: str
    few_shot: int
    configs: Callable[[str], dict[str, dict[str, Any]]]


class _SameKind(ContextSampler):  # type: ignore[misc]
    """The first examples that agree with the item in some fields, without the item itself."""

    fields: tuple[str, ...]

    def sample(self, n: int, eval_doc: Item | None = None, df: Any = None, **_: Any) -> list[Item]:
        assert eval_doc is not None
        # The examples may be from the evaluated split, and then contain the item.
        same = self._by_kind.get(self._kind(eval_doc), [])
        return list(itertools.islice((row for row in same if row != eval_doc), n))

    @functools.cached_property
    def _by_kind(self) -> dict[tuple[Any, ...], list[Item]]:
        """The rows of each kind. MMMLU has 14,042 rows: a search through all of them for each item would take
        minutes.
        """
        rows = defaultdict(list)
        for row in self.df:
            rows[self._kind(row)].append(row)
        return dict(rows)

    def _kind(self, row: Item) -> tuple[Any, ...]:
        return tuple(row[field] for field in self.fields)


class _SameSubject(_SameKind):
    fields = ("Subject",)


class _SameExam(_SameKind):
    fields = ("level", "subject_category")


class _SameTranslatedSubject(_SameKind):
    fields = ("subject",)


class _SameCategory(_SameKind):
    fields = ("category",)


# The benchmarks whose examples are of the same kind as the item, and the split of the examples.
_OF_ONE_KIND: dict[str, tuple[type[_SameKind], str]] = {
    "mmmlu": (_SameSubject, "test"),
    "m3exam": (_SameExam, "dev"),
    "global_mmlu": (_SameTranslatedSubject, "dev"),
    "mmlu_prox": (_SameCategory, "validation"),
}


def _mmmlu(code: str) -> dict[str, dict[str, Any]]:
    # The prompts of the harness's mmmlu tasks; the harness has a task for each subject.
    name = {"pt": "Brazilian Portuguese", "zh": "Simplified Chinese"}.get(code, LANGUAGES[code].name)
    return {
        f"mmmlu_{code}": {
            "output_type": "multiple_choice",
            "test_split": "test",
            "fewshot_split": "test",
            "fewshot_config": {"sampler": _SameSubject},
            "description": "The following are multiple choice questions (with answers) about "
            f"{{{{Subject.split('_test')[0].replace('_', ' ')}}}} ({name}).\n\n",
            "doc_to_text": "{{Question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\nAnswer:",
            "doc_to_choice": ["A", "B", "C", "D"],
            "doc_to_target": "Answer",
            "metric_list": mean_of("acc"),
        }
    }


# "Answer" in the languages of M3Exam, as its own prompts say it.
_ANSWER = {
    "en": "Answer:",
    "zh": "答案：",
    "pt": "Responder:",
    "sw": "Jibu:",
    "vi": "Câu trả lời:",
    "it": "La risposta:",
    "jv": "Wangsulan:",
    "th": "คำตอบ:",
}


def _m3exam(code: str) -> dict[str, dict[str, Any]]:
    answer = _ANSWER.get(code, _ANSWER["en"])

    def text(row: Item) -> str:
        return "\n".join(
            [*row["background_description"], row["question_text"], *map(str, row["options"]), answer]
        )

    return {
        f"m3exam_{code}": {
            "output_type": "multiple_choice",
            "test_split": "test",
            **of_one_kind(_SameExam),
            "doc_to_text": text,
            "doc_to_choice": lambda row: option_labels(row["options"]),
            "doc_to_target": answer_index,
            "metric_list": mean_of("acc"),
        }
    }


def _xcopa(code: str) -> dict[str, dict[str, Any]]:
    return {f"xcopa_{code}": first_of("validation")}


def _mgsm(code: str) -> dict[str, dict[str, Any]]:
    take = [{"name": "none", "filter": [{"function": "take_first"}]}]
    settings = {"process_results": _same_number, "metric_list": mean_of("exact_match"), "filter_list": take}
    return {f"mgsm_native_cot_{code}": {**first_of("train"), **settings}}


def _same_number(row: Item, results: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(same_number(results[0], row["answer_number"]))}


def _xnli(code: str) -> dict[str, dict[str, Any]]:
    # The harness evaluates on the validation split. As a test split, its examples leave out the item itself.
    splits = {"training_split": None, "validation_split": None, "test_split": "validation"}
    return {f"xnli_{code}": {**first_of("validation"), **splits}}


def _flores(code: str) -> dict[str, dict[str, Any]]:
    # The two directions differ in the names of languages and keys alone.
    def direction(
        name: str, source: str, target: str, source_key: str, target_key: str
    ) -> dict[str, dict[str, Any]]:
        config = {
            "output_type": "generate_until",
            "test_split": "devtest",
            "doc_to_text": f"{source}: {{{{{source_key}}}}}\n{target}:",
            "doc_to_target": target_key,
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 256},
            "metric_list": [{"metric": "chrf++", "aggregation": "chrf++", "higher_is_better": True}],
            **first_of("dev"),
        }
        return {f"flores200_{name}": config}

    name, english = LANGUAGES[code].name, LANGUAGES["en"].name
    to_english = direction(f"{code}_to_en", name, english, "source", "target")
    return to_english | direction(f"en_to_{code}", english, name, "target", "source")


BENCHMARKS: Mapping[str, Benchmark] = {
    "mmmlu": Benchmark("acc", 5, _mmmlu),
    "m3exam": Benchmark("acc", 3, _m3exam),
    "xcopa": Benchmark("acc", 0, _xcopa),
    "mgsm": Benchmark("exact_match", 8, _mgsm),
    "xnli": Benchmark("acc", 0, _xnli),
    "flores200": Benchmark("chrf++", 5, _flores),
    "belebele": Benchmark("acc", 0, broad_tasks.belebele),
    "sib200": Benchmark("acc", 0, broad_tasks.sib200),
    "global_mmlu": Benchmark("acc", 5, functools.partial(broad_tasks.global_mmlu, _SameTranslatedSubject)),
    "include": Benchmark("acc", 0, broad_tasks.include),
    "mmlu_prox": Benchmark("exact_match", 5, functools.partial(broad_tasks.mmlu_prox, _SameCategory)),
}


def examples_in(benchmark: str, few_shot: int | None) -> bool:
    """True if prompts have examples; few_shot: their number, None for the benchmark's default."""
    return (BENCHMARKS[benchmark].few_shot if few_shot is None else few_shot) > 0


def load_tasks(
    benchmark: str, code: str, folder: Path | None, few_shot: int | None = None
) -> dict[str, Task]:
    """The harness's tasks of a benchmark in a language, with their rows.

    Raises BadInput for missing or wrong rows.
    """
    shots = BENCHMARKS[benchmark].few_shot if few_shot is None else few_shot
    rows = read_rows(benchmark, code, folder, examples=shots > 0)
    try:
        # Arrow needs one type for each key.
        data = _as_datasets(rows)
    except pyarrow.ArrowException as error:
        raise BadInput(
            f"{benchmark}, {code}: a key has values of several kinds: {one_line(error, 150)}"
        ) from error
    configs = BENCHMARKS[benchmark].configs(code)
    _warn_of_fewer_shots(benchmark, code, rows, shots)
    for config in configs.values():
        if not shots:
            # There is no other split than the evaluated one; the harness asks for one all the same.
            evaluated = DATASETS[benchmark].splits[0]
            config |= {
                "fewshot_split": evaluated,
                "test_split": evaluated,
                "fewshot_config": {"sampler": "first_n"},
            }
            config |= {"training_split": None, "validation_split": None}
        # Examples of the item's kind come from another split than `fewshot_split` says: see `of_one_kind`.
        elif "process_docs" in config.get("fewshot_config", {}):
            dev = rows[_OF_ONE_KIND[benchmark][1]]
            config["fewshot_config"]["process_docs"] = lambda _, dev=dev: dev
        elif config["fewshot_config"]["sampler"] == "first_n":
            # An item of the same split is no example for itself.
            is_same_split = config["fewshot_split"] == config.get("test_split")
            examples = len(rows[config["fewshot_split"]]) - is_same_split
            if shots > examples:
                raise BadInput(
                    f"{benchmark}, {code}: {shots} examples are asked for and there are {examples}; give a "
                    "smaller --few-shot"
                )
        config |= {"custom_dataset": lambda **_: data, "num_fewshot": shots}

    # The harness accepts our settings for its own tasks only if they are members of a group.
    manager = _manager()
    named = [{"task": name, **config} for name, config in configs.items()]
    are_harness_tasks = all(name in manager.all_subtasks for name in configs)
    result: dict[str, Task] = manager.load(
        [{"group": benchmark, "task": named}] if are_harness_tasks else named
    )["tasks"]
    return result


def _warn_of_fewer_shots(benchmark: str, code: str, rows: Mapping[str, list[Item]], shots: int) -> None:
    """Warns if items have fewer examples of their subject or exam than `shots`, because their scores are
    lower.
    """
    if benchmark not in _OF_ONE_KIND:
        return
    sampler, split = _OF_ONE_KIND[benchmark]

    def kind_of(row: Item) -> tuple[Any, ...]:
        return tuple(row[field] for field in sampler.fields)

    kinds = Counter(kind_of(row) for row in rows[split])
    # An item is no example for itself.
    itself = 1 if split == "test" else 0
    examples_of_items = []
    for row in rows["test"]:
        examples_of_items.append(kinds[kind_of(row)] - itself)
    fewer = [examples for examples in examples_of_items if examples < shots]
    if fewer:
        log.warning(
            "%s, %s: %d of %d items have fewer examples than the %d that are asked for, and get what there "
            "is (at least %d)",
            benchmark, code, len(fewer), len(examples_of_items), shots, min(fewer),
        )  # fmt: skip


def _as_datasets(rows: Mapping[str, list[Item]]) -> dict[str, Any]:
    import datasets

    return {split: datasets.Dataset.from_list(split_rows) for split, split_rows in rows.items()}


def _manager() -> lm_eval.tasks.TaskManager:
    """The harness's tasks that are used here and no others: reading all of them takes ten seconds."""
    bundled = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(
        include_path=[bundled / name for name in ("xcopa", "xnli", "mgsm/native_cot")], include_defaults=False
    )
