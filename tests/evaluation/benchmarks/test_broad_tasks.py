"""The benchmarks in many languages: their prompts beside those of the harness's own tasks, the languages that
they have, and rows that are refused.
"""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import lm_eval.tasks
import pytest

from babel_jax.errors import BadInput
from babel_jax.evaluation.benchmarks import flores_archive
from babel_jax.evaluation.benchmarks.data import chosen_tasks, languages_of, read_rows
from babel_jax.evaluation.benchmarks.datasets import DATASETS, of_babel
from babel_jax.evaluation.benchmarks.evaluate import Request, evaluate
from babel_jax.evaluation.benchmarks.tasks import load_tasks
from babel_jax.languages import BABEL

BUNDLED = Path(lm_eval.tasks.__file__).parent
# Our benchmark, its language, the harness's folder, and the harness's task whose prompts must be the same.
THEIRS = {
    "belebele": ("sw", "belebele", "belebele_swh_Latn", 0),
    "sib200": ("sw", "afrobench/sib/prompt_1", "sib_swa_prompt_1", 1),
    "global_mmlu": ("sw", "global_mmlu/full/sw", "global_mmlu_full_sw_high_school_geography", 1),
    "include": ("tl", "include/default/Tagalog", "include_base_44_tagalog_arts_humanities", 0),
    "mmlu_prox": ("sw", "mmlu_prox/sw", "mmlu_prox_sw_law", 1),
}


def prompts(task):
    task.build_all_requests()
    return [(request.doc_id, request.args) for request in task.instances]


@pytest.mark.parametrize("benchmark", THEIRS)
def test_prompts_are_those_of_the_harness(benchmark, benchmarks):
    code, folder, name, shots = THEIRS[benchmark]
    (ours,) = load_tasks(benchmark, code, benchmarks, shots).values()
    rows = read_rows(benchmark, code, benchmarks)
    # The harness has a task for each subject.
    key, subject = {
        "global_mmlu": ("subject", "high_school_geography"),
        "include": ("domain", "Arts & Humanities"),
        "mmlu_prox": ("category", "law"),
    }.get(benchmark, (None, None))
    if key is not None:
        rows = {split: [row for row in of_split if row[key] == subject] for split, of_split in rows.items()}
    import datasets

    data = {split: datasets.Dataset.from_list(of_split) for split, of_split in rows.items()}
    manager = lm_eval.tasks.TaskManager(include_path=[BUNDLED / folder], include_defaults=False)
    config = {"task": name, "custom_dataset": lambda **_: data, "num_fewshot": shots}
    theirs = manager.load([{"group": "one", "task": [config]}])["tasks"][name]
    if benchmark == "sib200":
        # The harness draws examples at random.
        theirs.config.fewshot_config = {"sampler": "first_n"}
        theirs.sampler = lm_eval.api.samplers.get_sampler("first_n")(list(theirs.fewshot_docs()))
    expected = prompts(theirs)
    assert expected
    assert prompts(ours)[: len(expected)] == expected


def test_each_of_babels_languages_has_at_least_three_benchmarks():
    """English has no pair of its own in Flores-200, and MMLU stands in for MMMLU."""
    for code in BABEL:
        has = [benchmark for benchmark in DATASETS if code in of_babel(benchmark)]
        assert len(has) >= 3, (code, has)


def test_names_of_configurations_are_those_of_the_harness():
    for benchmark, folder in (("global_mmlu", "global_mmlu/full"), ("mmlu_prox", "mmlu_prox")):
        theirs = {path.name for path in (BUNDLED / folder).iterdir() if len(path.name) in (2, 3)}
        assert set(DATASETS[benchmark].configs.values()) == theirs
    include = {path.name for path in (BUNDLED / "include/default").iterdir() if path.name[0].isupper()}
    assert set(DATASETS["include"].configs.values()) == include
    assert DATASETS["include"].configs["tl"] == "Tagalog"
    assert DATASETS["global_mmlu"].configs["tl"] == "fil"
    assert DATASETS["belebele"].configs["zh"] == "zho_Hans"
    assert DATASETS["flores200"].configs["zh"] == "cmn_Hans"
    counts = {name: len(DATASETS[name].configs) for name in ("belebele", "sib200", "flores200")}
    assert counts == {"belebele": 122, "sib200": 205, "flores200": 211}


def test_broad_means_the_five():
    assert chosen_tasks(["broad"]) == list(THEIRS)
    assert chosen_tasks(["xnli", "lm-eval:arc_yo"]) == ["xnli", "lm-eval:arc_yo"]


def test_a_folder_may_have_more_than_babels_languages(benchmarks, tmp_path):
    for name in ("sw.test.jsonl", "sw.validation.jsonl"):
        target = tmp_path / "sib200" / name.replace("sw", "yo")
        target.parent.mkdir(exist_ok=True)
        shutil.copy(benchmarks / "sib200" / name, target)
    present, absent = languages_of("sib200", None, tmp_path)
    assert present == ["yo"]
    assert absent == list(BABEL)
    assert languages_of("sib200", ["yor"], tmp_path) == (["yo"], [])
    assert languages_of("belebele", ["yor", "quy"], None) == (["yo"], ["qu"])


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("belebele/sw.test", {"correct_answer_num": 2}, "correct_answer_num is no text"),
        (
            "belebele/sw.test",
            {"correct_answer_num": "5"},
            "correct_answer_num is '5', not a text from 1 to 4",
        ),
        ("belebele/sw.test", {"mc_answer3": " "}, "mc_answer3 is empty"),
        ("sib200/sw.test", {"category": "sport"}, "category is 'sport', not science/technology, travel"),
        ("sib200/sw.test", {"text": ["a"]}, "text is no text"),
        ("global_mmlu/sw.test", {"answer": 1}, "answer is no text"),
        ("global_mmlu/sw.test", {"answer": "E"}, "answer is 'E', not A, B, C or D"),
        ("include/tl.test", {"answer": "A"}, "answer is 'A', not 0, 1, 2 or 3"),
        ("include/tl.test", {"answer": True}, "answer is True, not 0, 1, 2 or 3"),
        ("mmlu_prox/sw.test", {"answer": "D"}, "answer is 'D', none of A, B, C"),
        ("mmlu_prox/sw.test", {"option_1": 7}, "option_1 is neither a text nor null"),
        ("mmlu_prox/sw.test", {"category": "laws"}, "category is 'laws', not biology"),
    ],
)
def test_an_item_of_the_wrong_type_is_named(name, change, says, benchmarks, tmp_path):
    benchmark, file = name.split("/")
    shutil.copytree(benchmarks / benchmark, tmp_path / benchmark)
    path = tmp_path / f"{name}.jsonl"
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), **change}), *rest]), encoding="utf-8")
    with pytest.raises(BadInput, match=re.escape(f"{name}.jsonl:1: {says}")):
        read_rows(benchmark, file.split(".")[0], tmp_path)


def test_an_earlier_revision_of_include_has_a_list_of_choices(benchmarks, tmp_path):
    today = read_rows("include", "tl", benchmarks, examples=False)
    rows = []
    for row in today["test"]:
        choices = [row[f"option_{letter}"] for letter in "abcd"]
        rows.append(
            {
                "question": row["question"],
                "choices": choices,
                "answer": row["answer"],
                "domain": row["domain"],
            }
        )
    (tmp_path / "include").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "include/tl.test.jsonl").write_text(text, encoding="utf-8")
    assert read_rows("include", "tl", tmp_path, examples=False) == today


@pytest.fixture
def archive(tmp_path, monkeypatch, benchmarks):
    """The official archive's form: a folder of its own, other files, and a path that leaves it."""
    path = tmp_path / "flores200_dataset.tar.gz"
    with tarfile.open(path, "w:gz") as made:
        for file in sorted((benchmarks / "flores200").rglob("*.dev*")):
            made.add(file, f"./flores200_dataset/{file.relative_to(benchmarks / 'flores200')}")
        for name in ("./flores200_dataset/README", "../flores200_dataset/dev/../../evil.dev"):
            member = tarfile.TarInfo(name)
            member.size = 4
            made.addfile(member, io.BytesIO(b"evil"))
    monkeypatch.setattr(flores_archive, "URL", path.as_uri())
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return path


def test_flores_is_read_from_the_official_archive(archive, benchmarks, tmp_path):
    rows = read_rows("flores200", "sw", None)
    assert rows == read_rows("flores200", "sw", benchmarks)
    files = {path.name for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert files == {"swh_Latn.dev", "eng_Latn.dev", "swh_Latn.devtest", "eng_Latn.devtest"}
    # Once is enough, and the folder itself serves as --data.
    archive.unlink()
    assert read_rows("flores200", "sw", None) == rows
    assert read_rows("flores200", "sw", tmp_path / "home/babel-jax") == rows


def test_an_archive_that_was_cut_leaves_nothing(archive, tmp_path):
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(
        BadInput, match=r"Flores-200 cannot be had from file:.*; on a machine without network, give --data"
    ):
        read_rows("flores200", "sw", None)
    assert not list((tmp_path / "home").rglob("*.dev*"))


def test_all_five_are_evaluated_and_written(tiny_folder, benchmarks, tmp_path, monkeypatch):
    # The prompts of MMLU-ProX ask for 2,048 new tokens, more than the small model has positions.
    from babel_jax.evaluation.benchmarks import broad_tasks

    monkeypatch.setattr(broad_tasks, "PROX_NEW_TOKENS", 24)
    request = Request(tasks=("broad",), data=benchmarks, few_shot=1)
    found = evaluate(str(tiny_folder()), [], request, tmp_path / "out")
    assert {task: set(scores) for task, scores in found["tasks"].items()} == {
        task: {code} for task, (code, *_) in THEIRS.items()
    }
    assert found["tasks"]["mmlu_prox"]["sw"]["n"] == 4
    assert "| qwen2-0 | 2 of 25 languages |" in found["summary"]
    assert "published" not in found["summary"]
    assert (tmp_path / "out" / "mmlu_prox.png").is_file()
