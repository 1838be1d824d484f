"""Tasks of lm-evaluation-harness by name: their languages by the harness's metadata, their items and scores
beside the harness's own, and what is refused. The hub's rows are made here.
"""

import functools
import re
from pathlib import Path

import lm_eval.tasks
import pytest

from babel_jax.errors import BadInput
from babel_jax.evaluation.benchmarks import named_tasks
from babel_jax.evaluation.benchmarks.evaluate import Request, evaluate
from babel_jax.evaluation.benchmarks.named_tasks import languages_of_task, load_named

# Tasks of the harness, in all the ways in which it names languages.
LANGUAGES = {
    "afrimmlu_direct_yor_prompt_1": "yo",  # dataset_name: yor
    "belebele_zho_Hant": "zho_Hant",
    "belebele_arb_Latn": "arb_Latn",
    "global_mmlu_full_fil_anatomy": "tl",
    "include_base_44_tamil_stem": "ta",  # dataset_name: Tamil
    "mmlu_prox_sw_law": "sw",
    "xcopa_qu": "qu",
    "arc_de": "de",
    "xnli_th": "th",
    "mmmlu_ko_kr_anatomy": "ko",  # dataset_name: KO_KR; kr alone is Kanuri
    "flores_eng_Latn-knc_Latn_prompt_2": "kr",
}
# The harness's folders of these tasks: to read all takes 10 seconds and more.
FOLDERS = (
    "afrimmlu", "belebele", "global_mmlu/full/fil", "include/default/Tamil", "mmlu_prox/sw", "xcopa",
    "okapi/arc_multilingual", "xnli", "openai-mmmlu/default", "afrobench/flores/prompt_2",
    "afrobench/mafand/prompt_1/african-english", "hellaswag", "gsm8k", "winogrande",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _few_tasks(monkeypatch):
    monkeypatch.setattr(named_tasks, "_manager", _manager)


@functools.cache
def _manager():
    bundled = Path(lm_eval.tasks.__file__).parent
    folders = [bundled / name for name in FOLDERS]
    assert all(folder.is_dir() for folder in folders)
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)


@pytest.mark.parametrize("name", LANGUAGES)
def test_the_language_of_a_task_is_that_of_the_harness(name):
    assert languages_of_task(name) == {LANGUAGES[name]}


@pytest.mark.parametrize("name", ["hellaswag", "winogrande", "gsm8k", "mafand_pcm-en_prompt_1"])
def test_a_task_that_names_no_language_has_none(name):
    assert languages_of_task(name) == set()


def rows_of(config):
    number = {"yor": 1, "hau": 2, "swa": 0}.get(config, 0)
    rows = []
    for count in range(7):
        choices = [f"{config} {letter} {count}" for letter in "abcd"]
        rows.append(
            {
                "question": f"Ibeere {config} {count}?",
                "choices": str(choices),
                "answer": "ABCD"[(count + number) % 4],
                "subject": "global_facts",
            }
        )
    return rows


@pytest.fixture
def hub(monkeypatch):
    """afrimmlu's data set, with a few rows of our own; each language that is read is noted."""
    import datasets

    read = []

    def load_dataset(path=None, name=None, **_):
        assert path == "masakhane/afrimmlu"
        read.append(name)
        rows = datasets.Dataset.from_list(rows_of(name))
        return datasets.DatasetDict({"test": rows, "validation": rows, "dev": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return read


def test_a_tag_is_grouped_by_language_and_only_what_is_asked_for_is_read(hub):
    chosen = load_named("lm-eval:afrimmlu_tasks_prompt_1", ["yor", "ha"])
    assert [one.language for one in chosen] == ["ha", "yo"] or [one.language for one in chosen] == [
        "yo",
        "ha",
    ]
    assert sorted(set(hub)) == ["hau", "yor"]


def test_scores_are_the_harnesss_own(hub, tiny_folder, our_model, tmp_path):
    from lm_eval.evaluator import evaluate as run_harness

    asked = "lm-eval:afrimmlu_direct_yor_prompt_1"
    found = evaluate(str(tiny_folder()), [], Request(tasks=(asked,)), tmp_path / "out")
    (one,) = load_named(asked)
    theirs = run_harness(our_model(tiny_folder()), {"tasks": one.tasks}, bootstrap_iters=0)
    (metrics,) = theirs["results"].values()
    score = found["tasks"][asked]["yo"]
    assert score["n"] == 7
    assert score["score"] == pytest.approx(100 * metrics["acc,none"])
    assert "| Yoruba (yo) | low | 7 |" in found["summary"]
    assert (tmp_path / "out" / "lm-eval-afrimmlu_direct_yor_prompt_1.png").is_file()


@pytest.mark.parametrize(
    ("asked", "languages", "says"),
    [
        (
            "afrimmlu_direct_yoruba",
            None,
            "the harness has no task of this name: did you mean afrimmlu_direct",
        ),
        ("hellaswag", None, "does not say which language hellaswag is in; write lm-eval:hellaswag=en, with"),
        ("hellaswag=eng_Lat", None, "unknown language 'eng_Lat'"),
        ("afrimmlu_direct_yor_prompt_1", ["sw"], "no data for sw; it has yo"),
    ],
)
def test_what_is_refused(asked, languages, says):
    with pytest.raises(BadInput, match=re.escape(says)):
        load_named(f"lm-eval:{asked}", languages)


def test_a_data_set_that_cannot_be_had_is_one_line(monkeypatch):
    import datasets

    def scripts(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found afrimmlu.py")

    monkeypatch.setattr(datasets, "load_dataset", scripts)
    with pytest.raises(
        BadInput, match=r"afrimmlu_direct_yor_prompt_1 cannot be had: .*scripts are no longer"
    ):
        load_named("lm-eval:afrimmlu_direct_yor_prompt_1")


def test_an_item_of_the_wrong_type_is_named(monkeypatch, tiny_folder):
    import datasets

    def load_dataset(path=None, name=None, **_):
        rows = [{**row, "choices": 5} for row in rows_of(name)]
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split in ("test", "validation", "dev")}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    asked = "lm-eval:afrimmlu_direct_yor_prompt_1"
    with pytest.raises(
        BadInput, match="an item of afrimmlu_direct_yor_prompt_1 gives no prompt|cannot be had"
    ):
        evaluate(str(tiny_folder()), [], Request(tasks=(asked,)))
