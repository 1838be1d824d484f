"""`evaluate` on the items of the fixtures: what it gives, what it writes, how it goes on, and what it
refuses.
"""

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from babel_jax.errors import BadInput
from babel_jax.evaluation import scoring
from babel_jax.evaluation.benchmarks.data import files_of, read_rows
from babel_jax.evaluation.benchmarks.evaluate import Request, evaluate
from babel_jax.evaluation.benchmarks.tasks import load_tasks
from babel_jax.inference import generation

TASKS = ("mmmlu", "m3exam", "xcopa", "mgsm", "xnli", "flores200")


def compilations():
    return scoring.compilations() + generation.prefill._cache_size() + generation.extend._cache_size()


@pytest.fixture(scope="module")
def compared(tiny_folder, benchmarks, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation") / "out"
    before = compilations()
    found = evaluate(
        str(tiny_folder()),
        [str(tiny_folder(seed=1))],
        Request(tasks=("all",), data=benchmarks, few_shot=1),
        out,
    )
    return found, out, compilations() - before


def test_all_benchmarks_in_both_models(compared, tiny_folder):
    found, _, _ = compared
    assert tuple(found["tasks"]) == TASKS
    assert {task: set(by_language) for task, by_language in found["tasks"].items()} == {
        "mmmlu": {"sw"}, "m3exam": {"th"}, "xcopa": {"id"}, "mgsm": {"sw"}, "xnli": {"sw"},
        "flores200": {"sw"},
    }  # fmt: skip
    assert found["tasks"]["mmmlu"]["sw"]["n"] == 5
    assert found["tasks"]["flores200"]["sw"]["n"] == 6
    assert set(found["tasks"]["xcopa"]["id"]) == {"score", "stderr", "n"}
    scores = {task: next(iter(by_language.values()))["score"] for task, by_language in found["tasks"].items()}
    assert found["means"]["high"] == pytest.approx(scores["xcopa"])
    assert found["means"]["low"] == pytest.approx(
        np.mean([scores[task] for task in TASKS if task != "xcopa"])
    )
    assert found["means"]["all"] == pytest.approx(np.mean(list(scores.values())))
    other = found["baselines"][str(tiny_folder(seed=1))]
    for task, by_language in other["tasks"].items():
        for code, score in by_language.items():
            change = other["differences"][task][code]
            assert change["difference"] == pytest.approx(found["tasks"][task][code]["score"] - score["score"])
            # Flores-200 has three sentences in each direction, too few for an interval.
            assert (change["low"] is None) == (task == "flores200")
            assert change["low"] is None or change["low"] <= change["difference"] <= change["high"]


def test_what_is_written(compared, tiny_folder):
    found, out, _ = compared
    assert json.loads((out / "evaluation.json").read_text(encoding="utf-8")) == found
    tables = (out / "tables.md").read_text(encoding="utf-8")
    assert (
        "The published means of Babel-9B and Qwen2.5-7B (arXiv 2503.00865) are over all languages" in tables
    )
    assert "(published) |" not in tables
    assert "No data for en, zh, hi" in tables
    rows = list(csv.DictReader((out / "scores.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 12
    row = next(row for row in rows if row["task"] == "xnli" and row["model"] == "qwen2-0")
    assert float(row["score"]) == found["tasks"]["xnli"]["sw"]["score"]
    assert (
        float(row["difference"])
        == found["baselines"][str(tiny_folder(seed=1))]["differences"]["xnli"]["sw"]["difference"]
    )
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in (*TASKS, "means"))


def test_few_programs_are_compiled(compared):
    # Both models have the same shapes, so the second compiles nothing.
    assert 0 < compared[2] <= 12


def test_an_interrupted_evaluation_goes_on(compared, tiny_folder, benchmarks, tmp_path, monkeypatch):
    found, _, _ = compared
    request = Request(tasks=("xcopa", "mgsm"), data=benchmarks, few_shot=1)
    asked = []
    score_rows = scoring._score_rows

    def counted(*arguments):
        asked.append(arguments)
        return score_rows(*arguments)

    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "_score_rows", counted)
    with monkeypatch.context() as patch:
        patch.setattr("babel_jax.evaluation.benchmarks.harness.prefill", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate(str(tiny_folder()), [], request, tmp_path)
    assert len(asked) == 1
    (responses,) = (tmp_path / "responses").iterdir()
    whole = responses.read_text(encoding="utf-8")
    responses.write_text(whole + whole.splitlines()[0][:40], encoding="utf-8")  # a line that a kill has cut
    again = evaluate(str(tiny_folder()), [], request, tmp_path)
    assert len(asked) == 1
    assert again["tasks"] == {task: found["tasks"][task] for task in ("xcopa", "mgsm")}
    monkeypatch.setattr("babel_jax.evaluation.benchmarks.harness.prefill", interrupt)
    assert evaluate(str(tiny_folder()), [], request, tmp_path)["tasks"] == again["tasks"]


def test_bits_per_byte_and_fertility(tiny_folder, tmp_path, write_rows):
    texts = ["Habari ya asubuhi, rafiki yangu.", "Maji ni uhai " * 150]
    write_rows(tmp_path / "sw.jsonl", [{"text": text} for text in texts])
    found = evaluate(str(tiny_folder()), [str(tiny_folder(seed=1))], Request(data=tmp_path))
    score = found["tasks"]["bits_per_byte"]["sw"]
    assert score["n"] == 2
    assert found["means"] == {
        "all": pytest.approx(score["score"]),
        "high": None,
        "low": pytest.approx(score["score"]),
    }
    assert 0.1 < found["fertility"]["sw"] < 1
    (row,) = [
        line for line in found["summary"].splitlines() if line.startswith("| Swahili (sw) | low | 2 | ")
    ]
    assert row.endswith(f" | {found['fertility']['sw']:.3f} | {found['fertility']['sw']:.3f} |")
    assert "| tokens a byte, qwen2-0 | tokens a byte, qwen2-1 |" in found["summary"]
    assert "published" not in found["summary"]


def test_a_chat_template_is_used_and_needed(tiny_folder, benchmarks):
    request = Request(tasks=("xcopa",), data=benchmarks, chat=True)
    assert evaluate(str(tiny_folder(chat=True)), [], request)["tasks"]["xcopa"]["id"]["n"] == 3
    with pytest.raises(
        BadInput, match=r"no chat template \(chat_template.jinja, or chat_template in tokenizer_config.json\)"
    ):
        evaluate(str(tiny_folder()), [], request)


def test_items_that_are_too_long_lose_their_beginning_and_are_counted(tiny_folder, tmp_path, write_rows):
    premise = "Hujan turun deras sekali pada malam itu " * 60
    row = {
        "premise": premise,
        "choice1": "Jalanan basah.",
        "choice2": "Anak tidur.",
        "question": "effect",
        "label": 0,
    }
    for split in ("test", "validation"):
        write_rows(tmp_path / f"xcopa/id.{split}.jsonl", [row])
    found = evaluate(str(tiny_folder()), [], Request(tasks=("xcopa",), data=tmp_path), tmp_path / "out")
    assert found["truncated"] == 2
    # Also where the answers are there already.
    assert (
        evaluate(str(tiny_folder()), [], Request(tasks=("xcopa",), data=tmp_path), tmp_path / "out") == found
    )
    assert (
        "qwen2-0: 2 requests were longer than the model's positions; their beginnings were cut."
        in found["summary"]
    )


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (
            Request(tasks=("xcop",)),
            "unknown task 'xcop': did you mean xcopa? there are all broad mmmlu m3exam",
        ),
        (Request(tasks=("xcopa",), languages=("idn",)), "unknown language 'idn': did you mean id"),
        (Request(tasks=("xcopa",), languages=("en",)), "xcopa: no data for en; cambridgeltl/xcopa has zh id"),
        (
            Request(tasks=("mmmlu",), languages=("ta",)),
            "mmmlu: no data for ta in DIR; for ta it needs DIR/mmmlu/ta.test.jsonl (from openai/MMMLU)",
        ),
        # XCOPA has no prompts for English: no file would do.
        (
            Request(tasks=("xcopa",), languages=("en", "it")),
            "xcopa: no data for it in DIR; for it it needs DIR/xcopa/it.test.jsonl, DIR/",
        ),
        (
            Request(tasks=("xcopa",), languages=("en", "ha")),
            "xcopa: no data for en ha; cambridgeltl/xcopa has zh id",
        ),
        (
            Request(tasks=("xnli",), few_shot=9),
            "xnli, sw: 9 examples are asked for and there are 2; give a smaller --few-shot",
        ),
    ],
)
def test_bad_requests(request_, says, tiny_folder, benchmarks):
    folder = None if "cambridgeltl" in says else benchmarks
    request_ = Request(**{**vars(request_), "data": folder})
    with pytest.raises(BadInput, match=re.escape(says.replace("DIR", str(benchmarks)))):
        evaluate(str(tiny_folder()), [], request_)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (
            "xcopa/id.test.jsonl",
            {"choice2": " "},
            "xcopa/id.test.jsonl:1: choice2 is empty; correct or remove the row",
        ),
        ("xcopa/id.test.jsonl", {"premise": 5}, "xcopa/id.test.jsonl:1: premise is no text"),
        (
            "m3exam/th.test.jsonl",
            {"background_description": "x"},
            "m3exam/th.test.jsonl:1: background_description is no list of texts",
        ),
        ("m3exam/th.test.jsonl", {"answer_text": 1}, "m3exam, th: a key has values of several kinds"),
        ("mgsm/sw.test.jsonl", {"answer": 5}, "mgsm/sw.test.jsonl:1: answer is neither a text nor null"),
        ("xcopa/id.test.jsonl", {"label": 4}, "xcopa/id.test.jsonl:1: label is 4, neither 0 nor 1"),
        ("xcopa/id.test.jsonl", {"label": 1.0}, "xcopa/id.test.jsonl:1: label is 1.0, neither 0 nor 1"),
        ("xcopa/id.test.jsonl", {"label": True}, "xcopa/id.test.jsonl:1: label is True, neither 0 nor 1"),
        (
            "xcopa/id.test.jsonl",
            {"premise": "half \ud83d"},
            "xcopa/id.test.jsonl:1: not a readable JSON file: 'utf-8' codec can't encode",
        ),
        (
            "mgsm/sw.test.jsonl",
            {"answer_number": float("nan")},
            "mgsm/sw.test.jsonl:1: not a readable JSON file: NaN is no number",
        ),
        (
            "mgsm/sw.test.jsonl",
            {"answer_number": 10**4000},
            "mgsm/sw.test.jsonl:1: not a readable JSON file: a number of 4001 digits",
        ),
        ("mmmlu/sw.test.jsonl", {"B": ""}, "mmmlu/sw.test.jsonl:1: choice B is empty"),
        ("mmmlu/sw.test.jsonl", {"Answer": "E"}, "Answer is 'E', not A, B, C or D"),
        (
            "m3exam/th.test.jsonl",
            {"options": []},
            "m3exam/th.test.jsonl:1: options is empty, or one of them is",
        ),
        (
            "m3exam/th.dev.jsonl",
            {"answer_text": "9"},
            "m3exam/th.dev.jsonl:1: answer_text is '9', none of 1, 2, 3, 4",
        ),
        (
            "mgsm/sw.test.jsonl",
            {"answer_number": "x"},
            "mgsm/sw.test.jsonl:1: answer_number is 'x', no number",
        ),
        (
            "xnli/sw.validation.jsonl",
            {"premise": None},
            "xnli/sw.validation.jsonl:1: no premise; a row of xnli has premise, hypothesis, label",
        ),
    ],
)
def test_bad_rows_are_named(name, change, says, tiny_folder, benchmarks, tmp_path):
    for file in (path for path in benchmarks.rglob("*") if path.is_file()):
        (tmp_path / file.relative_to(benchmarks)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.relative_to(benchmarks)).write_bytes(file.read_bytes())
    first, *rest = (tmp_path / name).read_text(encoding="utf-8").splitlines()
    row = {
        key: value
        for key, value in {**json.loads(first), **change}.items()
        if value is not None or key not in change
    }
    (tmp_path / name).write_text("\n".join([json.dumps(row), *rest]) + "\n", encoding="utf-8")
    with pytest.raises(BadInput, match=re.escape(says)):
        evaluate(str(tiny_folder()), [], Request(tasks=(name.split("/")[0],), data=tmp_path))


def test_a_byte_order_mark_and_blank_lines_make_no_difference(benchmarks, tmp_path):
    for benchmark, code in (("xcopa", "id"), ("mgsm", "sw"), ("flores200", "sw")):
        plain = read_rows(benchmark, code, benchmarks)
        for file in files_of(benchmark, code, benchmarks):
            copy = tmp_path / file.relative_to(benchmarks)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(b"\xef\xbb\xbf" + file.read_bytes() + b"\n \n")
        assert read_rows(benchmark, code, tmp_path) == plain


@pytest.mark.parametrize(
    ("benchmark", "code"), [("mgsm", "sw"), ("xcopa", "id"), ("mmmlu", "sw"), ("flores200", "sw")]
)
def test_without_examples_their_file_is_not_needed(benchmark, code, benchmarks, tmp_path):
    first, *_ = files_of(benchmark, code, benchmarks)
    for file in files_of(benchmark, code, benchmarks, examples=False):
        copy = tmp_path / file.relative_to(benchmarks)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    (task, *_) = load_tasks(benchmark, code, tmp_path, 0).values()
    assert len(list(task.eval_docs)) == len(first.read_text().splitlines())
    (whole, *_) = load_tasks(benchmark, code, benchmarks, 0).values()
    assert list(task.eval_docs) == list(whole.eval_docs)
    if benchmark in ("mgsm", "flores200"):
        with pytest.raises(BadInput, match="no "):
            load_tasks(benchmark, code, tmp_path, 2)


def test_fewer_examples_than_asked_for_are_told(benchmarks, caplog):
    load_tasks("mmmlu", "sw", benchmarks, 0)
    assert not caplog.records
    rows = read_rows("mmmlu", "sw", benchmarks)["test"]
    subjects = Counter(row["Subject"] for row in rows)
    load_tasks("mmmlu", "sw", benchmarks, 100)
    assert [record.getMessage() for record in caplog.records] == [
        f"mmmlu, sw: {len(rows)} of {len(rows)} items have fewer examples than the 100 that are asked for, "
        "and get what there is "
        f"(at least {min(subjects.values()) - 1})"
    ]


def test_damaged_files_are_named(tiny_folder, tmp_path):
    for split in ("test", "validation"):
        (tmp_path / "xcopa").mkdir(exist_ok=True)
        (tmp_path / f"xcopa/id.{split}.jsonl").write_text("{}\n{nothing\n")
    with pytest.raises(BadInput, match=r"xcopa/id.test.jsonl:2: not a readable JSON"):
        evaluate(str(tiny_folder()), [], Request(tasks=("xcopa",), data=tmp_path))


def test_without_network_it_says_which_files_to_give(tiny_folder, monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    says = (
        r"cambridgeltl/xcopa \(id\) cannot be had from the hub: Couldn't reach the hub; .* --data DIR with "
        r"DIR/xcopa/id.test.jsonl, DIR/"
    )
    with pytest.raises(BadInput, match=says):
        evaluate(str(tiny_folder()), [], Request(tasks=("xcopa",), languages=("id",)))


def test_a_model_without_tokenizer(tiny_folder, benchmarks, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_folder() / name).read_bytes())
    with pytest.raises(
        BadInput,
        match=r"no tokenizer \(tokenizer.json or tokenizer.model\); copy the model's tokenizer files there",
    ):
        evaluate(str(tmp_path), [], Request(tasks=("xcopa",), data=benchmarks))


def test_items_are_looked_for_in_a_run_s_windows(tiny_folder, benchmarks, tmp_path, monkeypatch):
    def looked_for(run, items):
        return {
            task: {
                code: {"items": len(rows), "long_enough": 2, "overlapping": 1} for code, rows in own.items()
            }
            for task, own in items.items()
        }

    monkeypatch.setattr("babel_jax.evaluation.benchmarks.evaluate.contamination", looked_for)
    found = evaluate(
        str(tiny_folder()), [], Request(tasks=("xcopa",), data=benchmarks, limit=2, trained_in=tmp_path)
    )
    assert found["contamination"] == {"xcopa": {"id": {"items": 2, "long_enough": 2, "overlapping": 1}}}
    assert (
        "XCOPA, id: 1 of 2 items share 13 tokens in a row with the training windows "
        "(2 have 13 tokens or more)." in found["summary"]
    )


WITHOUT_TORCH = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
hidden = ("torch", "transformers")
PathFinder.find_spec = lambda name, *rest: None if name in hidden else find_spec(name, *rest)
"""


@pytest.mark.slow
def test_the_command_needs_neither_torch_nor_transformers(compared, tiny_folder, benchmarks, tmp_path):
    """On a pod neither is installed: here both are hidden."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH)
    command = [
        sys.executable,
        "-m",
        "babel_jax.cli",
        "evaluate",
        str(tiny_folder()),
        "--tasks",
        "all",
        "--few-shot",
        "1",
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "HF_HUB_OFFLINE": "1",
    }
    options = ["--data", str(benchmarks), "--out", str(tmp_path / "table")]
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "table" / "evaluation.json").read_text())
    assert found["tasks"] == compared[0]["tasks"]
