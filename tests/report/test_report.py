"""The page of a run: well formed, alone, legible to a screen reader; the gate and the samples behind it."""

import dataclasses
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from babel_jax.cli import main
from babel_jax.config import ExpansionSettings
from babel_jax.errors import BadInput
from babel_jax.evaluation.items import accuracy, bits_per_byte_of
from babel_jax.evaluation.points import results_of, write_point
from babel_jax.expansion.plan import plan_from_settings
from babel_jax.pages.charts import Figure, Table, averaged, layers, number, ticks
from babel_jax.pages.document import paired
from babel_jax.report.gate import gate_text, regression_gate
from babel_jax.report.head import duration, facts
from babel_jax.report.page import write_report
from babel_jax.report.record import read_run
from babel_jax.report.run_report import report_run
from babel_jax.report.run_watch import with_page

_VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """The elements of a page, with what each stands in; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, **dict(attributes), "inside": list(self._open), "text": ""}
        self.elements.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, **dict(attributes), "inside": list(self._open), "text": ""})

    def handle_endtag(self, tag):
        assert self._open[-1]["tag"] == tag, f"{tag} closes {self._open[-1]['tag']}"
        self._open.pop()

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag, inside=None):
        return [
            element
            for element in self.elements
            if element["tag"] == tag
            and (inside is None or any(outer is inside for outer in element["inside"]))
        ]


@pytest.fixture
def run_folder(grown, tmp_path):
    return Path(
        shutil.copytree(
            grown["out"], tmp_path / "grown", ignore=shutil.ignore_patterns("checkpoints", "tensorboard")
        )
    )


@pytest.fixture
def page(grown):
    return Page((Path(grown["out"]) / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_whole_and_needs_nothing_else(page):
    assert [element["tag"] for element in page.elements[:2]] == ["html", "head"]
    assert len(page.all("title", page.elements[1])) == len(page.all("h1")) == len(page.all("main")) == 1
    for element in page.elements:
        for name, value in element.items():
            if name in ("src", "href", "data", "poster", "srcset", "action"):
                assert value.startswith(("#", "data:")), value
    assert not page.all("script")
    assert "url(" not in page.all("style")[0]["text"]
    assert "@import" not in page.all("style")[0]["text"]
    ids = [element["id"] for element in page.elements if "id" in element]
    assert len(ids) == len(set(ids))
    targets = [element["href"][1:] for element in page.all("a")]
    assert targets
    assert set(targets) <= set(ids)


def test_every_chart_has_its_caption_and_its_table(page):
    figures = page.all("figure")
    assert len(figures) >= 9
    for figure in figures:
        (caption,) = page.all("figcaption", figure)
        assert figure["aria-labelledby"] == caption["id"]
        (table,) = page.all("table", figure)
        heads = [head for head in page.all("th", table) if head.get("scope") == "col"]
        rows = page.all("tr", table)[1:]
        assert rows
        for row in rows:
            assert len(page.all("td", row)) + len(page.all("th", row)) == len(heads)
        drawings = page.all("svg", figure)
        assert drawings or figure["id"] == "figure-sources"
        for drawing in drawings:
            assert any(outer.get("aria-hidden") == "true" for outer in [drawing, *drawing["inside"]])


def test_what_was_measured_between_steps(page, grown):
    lines = (Path(grown["out"]) / "evaluation" / "during.jsonl").read_text().splitlines()
    measured = [json.loads(line) for line in lines]
    assert [line["step"] for line in measured] == [3, 6]
    assert list(measured[0]["tasks"]) == list(grown["tasks"]["base"])
    best = json.loads((Path(grown["out"]) / "evaluation" / "best.json").read_text())
    means = {}
    for line in measured:
        scores = [result["score"] for result in line["tasks"]["bits_per_byte"].values()]
        means[line["step"]] = np.mean(scores)
    assert best["step"] == min(means, key=means.get)
    assert best["bits_per_byte"] == pytest.approx(min(means.values()))
    assert grown["best"] == best
    (figure,) = [figure for figure in page.all("figure") if figure["id"] == "figure-during"]
    assert f"after step {best['step']}: {best['bits_per_byte']:.3f}" in figure["text"]


def test_the_table_says_what_was_measured(page, grown):
    table = next(
        table
        for table in page.all("table")
        if any(outer.get("id") == "figure-bits_per_byte" for outer in table["inside"])
    )
    rows = {}
    for row in page.all("tr", table)[1:]:
        rows[row["text"].split("\n")[0]] = [cell["text"] for cell in page.all("td", row)]
    swahili = next(cells for text, cells in rows.items() if text.startswith("Swahili"))
    measured = [
        grown["bits_per_byte"][point]["sw"] for point in ("base", "expanded", "recovered", "continued")
    ]
    # On a phone the change is beside the name.
    assert swahili[0].startswith(f"{100 * (measured[-1] / measured[0] - 1):+.1f}% [")
    assert swahili[1:6] == ["low", *(f"{value:.3f}" for value in measured)]
    score = grown["tasks"]["continued"]["bits_per_byte"]["sw"]
    assert swahili[6:] == [str(score["n"]), f"{score['bytes']:,}"]


def test_samples_are_in_their_language_and_direction(run_folder, grown):
    samples = json.loads((run_folder / "samples.json").read_text(encoding="utf-8"))
    assert set(samples) == {"en", "zh", "sw", "ha"}
    assert samples["sw"]["prompt"] in "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa."
    samples["ur"] = {"prompt": "تمام <b>", "text": "انسان"}
    (run_folder / "samples.json").write_text(json.dumps(samples))
    write_report(run_folder, run_folder / "again.html")
    page = Page((run_folder / "again.html").read_text(encoding="utf-8"))
    found = {element["lang"]: element for element in page.all("p") if "lang" in element}
    assert {code: element["dir"] for code, element in found.items()} == {
        "en": "ltr",
        "zh": "ltr",
        "sw": "ltr",
        "ha": "ltr",
        "ur": "rtl",
    }
    assert found["ur"]["text"].startswith("تمام <b> انسان")


def test_what_is_missing_is_left_out_and_samples_are_made_anew(run_folder):
    before = json.loads((run_folder / "samples.json").read_text(encoding="utf-8"))
    for name in ("samples.json", "summary.json", "metrics.jsonl", "mixture.json", "goodput.json"):
        (run_folder / name).unlink()
    shutil.rmtree(run_folder / "evaluation")
    found = report_run(run_folder)
    assert found["gate"] is None
    assert found["summary"].startswith("There is no parent model to compare with.\nReport: ")
    again = json.loads((run_folder / "samples.json").read_text(encoding="utf-8"))
    assert {code: sample["prompt"] for code, sample in again.items()} == {
        code: sample["prompt"] for code, sample in before.items()
    }
    page = Page((run_folder / "report.html").read_text(encoding="utf-8"))
    assert {figure["id"] for figure in page.all("figure")} == {"figure-expansion-0", "figure-sources"}
    assert "under way" in page.all("header")[0]["text"]


def test_a_point_that_is_no_file_of_results_is_named(run_folder):
    (run_folder / "evaluation" / "base.json").write_text('{"en": 3.0}')
    with pytest.raises(BadInput, match=r"base.json: damaged, or of an older version"):
        report_run(run_folder)


def test_a_demo_folder_and_a_benchmark_beside_the_points(run_folder, tmp_path):
    scores = {"xnli": {"sw": {"score": 53.5, "stderr": 1.0, "n": 100}}}
    others = {"Qwen": {"tasks": {"xnli": {"sw": {"score": 41.5, "stderr": 1.0, "n": 100}}}}}
    both = {"model": "Babel", "tasks": scores, "baselines": others}
    (run_folder / "evaluation" / "benchmarks.json").write_text(json.dumps(both))
    (run_folder / "evaluation" / "other.json").write_text("[]")
    (run_folder / "goodput.json").write_text(json.dumps({"seconds": {"step": 75.0, "compile": 25.0}}))
    lines = [
        json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    lines[0] |= {"device_memory_peak_gib": 11.5, "device_memory_limit_gib": 15.75}
    lines[1] |= {"slowest_process": 3, "slowest_process_seconds": 0.5, "median_process_seconds": 0.25}
    (run_folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    (tmp_path / "demo").mkdir()
    run_folder.rename(tmp_path / "demo" / "run")
    found = report_run(tmp_path / "demo")
    assert found["path"] == str(tmp_path / "demo" / "report.html")
    page = Page((tmp_path / "demo" / "report.html").read_text(encoding="utf-8"))
    assert page.all("h1")[0]["text"] == "demo"
    (figure,) = [figure for figure in page.all("figure") if figure["id"] == "figure-goodput"]
    assert "75.0% of 100 s" in figure["text"]
    assert "The fullest device of process 0 held 11.5 of 15.8 GiB." in figure["text"]
    assert (
        "The slowest process, 3 up to step 2, took 0.500 s of its own for a step, the median process 0.250 s."
    ) in figure["text"]
    (figure,) = [figure for figure in page.all("figure") if figure["id"] == "figure-xnli"]
    assert "XNLI" in figure["text"]
    head, *rows = page.all("tr", figure)
    assert [cell["text"] for cell in page.all("th", head)] == [
        "Language",
        "Change [95%]",
        "Class",
        "Babel",
        "Qwen",
        "Items",
    ]
    (row,) = [row for row in rows if row["text"].startswith("Swahili")]
    assert [cell["text"] for cell in page.all("td", row)] == ["", "low", "53.5", "41.5", "100"]


def test_the_code_in_the_card_loads_the_model(grown, monkeypatch, capsys):
    monkeypatch.chdir(grown["hf"])
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    written = capsys.readouterr().out.strip()
    (prompt,) = re.findall(r'tokenizer\((".*?"), return', code)
    assert len(json.loads(prompt)) > 5
    assert written.startswith(json.loads(prompt)[:5])


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(BadInput, match=r"not a run folder \(it has no config.toml\), nor a demo's"):
        report_run(tmp_path)


def point(change, documents=20, **scores):
    """Items of a point: documents of 100 bytes; every other one is `change` percent higher."""
    factors = 1 + np.resize([change / 100, 0.0], documents)
    by_language = {}
    for code, score in scores.items():
        by_language[code] = [bits_per_byte_of(100 * score * factors, [100] * documents)]
    return {"bits_per_byte": by_language}


def gate_of(base, continued, tolerance=0.0):
    items = {"base": base, "continued": continued}
    results = {name: results_of(of_point) for name, of_point in items.items()}
    return regression_gate(results, items, "continued", tolerance)


def test_the_gate_names_the_languages_that_got_worse():
    base, continued = point(0, en=2.0, sw=4.0, th=1.0), point(0, en=2.1, sw=3.0, th=1.01)
    gate = gate_of(base, continued)
    assert gate["worse"] == {"en": pytest.approx(5.0), "th": pytest.approx(1.0)}
    assert list(gate["worse"]) == ["en", "th"]
    assert gate["changes"]["sw"] == pytest.approx(-25.0)
    assert gate["verdict"] == "NOT passed"
    assert not gate["passed"]
    assert gate_text(gate) == (
        "Regression gate: NOT passed (continued against base): worse in bits per byte: English +5.0% "
        "[+5.0, +5.0], Thai +1.0% [+1.0, +1.0]."
    )
    assert list(gate_of(base, continued, 1.5)["worse"]) == ["en"]
    assert gate_of(base, continued, 5.5)["passed"]
    results = {name: results_of(base) for name in ("base", "continued")}
    assert regression_gate(results, {}, "base") is None
    assert regression_gate({"continued": results["base"]}, {}, "continued") is None


def test_a_language_is_worse_only_with_its_whole_interval():
    # Half of the documents are 4% higher, the others 3% lower: in the mean 0.5% higher.
    gate = gate_of(point(0, sw=2.0), point(7.2, sw=1.94))
    assert gate["changes"]["sw"] == pytest.approx(0.49, abs=0.01)
    assert gate["worse"] == {}
    assert list(gate["unclear"]) == ["sw"]
    assert gate["verdict"] == "passed"
    assert "may be worse or better: Swahili +0.5% [-1." in gate_text(gate)


def test_a_language_without_a_figure_of_the_parent_is_named():
    """A run got Nepali after its base was measured."""

    def point(**scores):
        return {"bits_per_byte": {code: {"score": score, "n": 9} for code, score in scores.items()}}

    gate = regression_gate({"base": point(en=2.0), "end": point(en=2.0, ne=3.0)}, {}, "end")
    assert gate["unmeasured"] == ["ne"]
    assert "not measured at base: Nepali" in gate_text(gate)


@pytest.mark.parametrize("keeps_items", [True, False])
def test_too_little_text_is_no_pass(keeps_items):
    items = {"base": point(0, 5, sw=2.0), "continued": point(0, 5, sw=1.0)}
    results = {name: results_of(of_point) for name, of_point in items.items()}
    # A run of an older version kept no items.
    gate = regression_gate(results, items if keeps_items else {}, "continued")
    assert (gate["verdict"], gate["passed"]) == ("not enough text to tell", False)
    assert gate["unknown"] == ["sw"]
    assert gate_text(gate).endswith("worse in bits per byte: none; not enough text to tell in Swahili.")


def test_a_task_is_worse_with_its_whole_interval():
    def of_task(hits):
        return point(0, sw=1.0) | {"cloze": {"sw": [accuracy([1.0] * hits + [0.0] * (100 - hits))]}}

    assert gate_of(of_task(60), of_task(40))["tasks"] == {"cloze": {"sw": pytest.approx(-20)}}
    assert not gate_of(of_task(60), of_task(40))["passed"]
    assert gate_of(of_task(60), of_task(58))["passed"]
    assert gate_of(of_task(60), of_task(80))["passed"]
    # Without items of the task nothing is said of it.
    assert gate_of(point(0, sw=1.0), of_task(0))["passed"]


def test_worse_rows_are_marked_and_intervals_are_on_the_page(run_folder):
    """Items of eight documents for the first and the last point: Swahili is worse, Hausa is better."""
    base, last = point(0, 8, sw=2.0, ha=2.0), point(0, 8, sw=2.2, ha=1.8)
    write_point(run_folder, "base", base)
    write_point(run_folder, "continued", last)
    write_report(run_folder, run_folder / "again.html")
    page = Page((run_folder / "again.html").read_text(encoding="utf-8"))
    table = next(
        table
        for table in page.all("table")
        if any(outer.get("id") == "figure-bits_per_byte" for outer in table["inside"])
    )
    rows = {row["text"].split("\n")[0]: row for row in page.all("tr", table)}
    (swahili,) = [row for text, row in rows.items() if text.startswith("Swahili")]
    (hausa,) = [row for text, row in rows.items() if text.startswith("Hausa")]
    assert swahili["class"] == "bad"
    assert "class" not in hausa
    assert "+10.0% [+10.0, +10.0]" in swahili["text"]
    assert "-10.0% [-10.0, -10.0]" in hausa["text"]
    result = page.all("section")[0]["text"]
    assert "Regression gate: NOT passed" in result
    assert "Swahili +10.0% [+10.0, +10.0]" in result


def test_the_head_and_what_is_next(page, grown):
    head = page.all("header")[0]["text"]
    seconds = json.loads((Path(grown["out"]) / "goodput.json").read_text())
    assert time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds["until"])) in head
    assert "4 languages from " in head
    assert "of wall time" in head
    assert "tokens/s" in head
    assert "peak rate" in head
    (next_steps,) = [section for section in page.all("section") if section["id"] == "next"]
    assert f"babel generate {grown['hf']}" in next_steps["text"]
    assert f"babel push {grown['hf']} OWNER/NAME" in next_steps["text"]
    ids = {figure["id"] for figure in page.all("figure")}
    assert {"figure-rate", "figure-gradient-norm"} <= ids


def test_the_head_has_the_layers_that_this_run_began_with(run_folder):
    """A model's list of expansions begins with those that its parent had."""
    record = read_run(run_folder)
    _, plan = record.plans[-1]
    earlier = plan_from_settings(ExpansionSettings(insert_after=(0,)), plan.depth - 1)
    longer = dataclasses.replace(record, plans=[("grandparent", earlier), *record.plans])
    words = f"{plan.depth} → {len(plan.layers)} layers"
    assert words in facts(record)
    assert words in facts(longer)


def test_the_page_of_a_run_is_written_again_while_it_is_watched(run_folder):
    """A browser loads such a page again; the last page stays as it is."""
    page = run_folder / "report.html"
    texts = []
    with_page(run_folder, 7.0, texts.append)("step 1")
    assert texts == ["step 1"]
    assert '<meta http-equiv="refresh" content="7">' in page.read_text()
    assert main(["watch", str(run_folder), "--page", "--once"]) == 0
    assert 'http-equiv="refresh"' not in page.read_text()


def test_a_translation_near_zero_is_folded(page):
    (figure,) = [figure for figure in page.all("figure") if figure["id"] == "figure-to_english"]
    (details, _) = page.all("details", figure)
    assert "open" not in details
    assert page.all("svg", details)
    assert "All scores are below 5: the model cannot translate yet." in figure["text"]


def test_the_parent_s_sample_is_beside_the_child_s(page, grown):
    parent = json.loads((Path(grown["out"]) / "samples-parent.json").read_text(encoding="utf-8"))
    child = json.loads((Path(grown["out"]) / "samples.json").read_text(encoding="utf-8"))
    assert {code: sample["prompt"] for code, sample in parent.items()} == {
        code: sample["prompt"] for code, sample in child.items()
    }
    (swahili,) = [article for article in page.all("article") if article["text"].strip().startswith("Swahili")]
    labels = [element["text"] for element in page.all("p", swahili) if element.get("class") == "who"]
    assert labels == ["parent", "this model"]


def test_no_narrow_figure_is_alone_in_its_row():
    def figure(name, drawings=1):
        return Figure(name, name, "", [("", "", "")] * drawings, Table([], []))

    def widths(figures):
        return {figure.name: figure.is_wide for figure in paired(figures)}

    assert widths([figure("a"), figure("b")]) == {"a": False, "b": False}
    assert widths([figure("a"), figure("b"), figure("c", 3), figure("d")]) == {
        "a": False,
        "b": False,
        "c": True,
        "d": True,
    }
    assert widths([figure("a"), figure("c", 3)]) == {"a": True, "c": True}
    assert widths([]) == {}


@pytest.mark.parametrize(
    ("seconds", "words"), [(41.6, "42 s"), (185, "3 min 5 s"), (7800, "2 h 10 min"), (273600, "3 d 4 h")]
)
def test_durations_for_people(seconds, words):
    assert duration(seconds) == words


def test_ticks_are_round_and_enclose():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.24, 4.43) == [1, 2, 3, 4, 5]
    assert ticks(-0.3, 0.3)[0] <= -0.3
    assert ticks(0.0, 0.0)[0] == 0.0
    assert ticks(0.0, 0.0)[-1] > 0.0
    assert [number(value) for value in (0.25, 3.0, 1234.5, 27_000, 9_013_963_264)] == [
        "0.25",
        "3",
        "1,234",
        "27k",
        "9.01G",
    ]


def test_averages_keep_the_mean():
    curve = [(float(step), float(step % 7)) for step in range(1000)]
    few = averaged(curve, 40)
    assert len(few) == 40
    assert sum(y for _, y in few) / 40 == pytest.approx(sum(y for _, y in curve) / 1000)


def test_layers_are_joined_to_their_sources():
    drawing = str(layers([0, 1, 1, 2], {2: "copy of 1"}, 3))
    assert drawing.count('class="layer new"') == 1
    assert drawing.count('class="layer kept"') == 3 + 3
    starts = [float(start) for start in re.findall(r'd="M110 ([\d.]+)C', drawing)]
    assert starts[1] == starts[2]
    assert starts[0] > starts[1] > starts[3]


def test_the_exported_model_has_a_card(grown):
    card = ModelCard.load(Path(grown["hf"]) / "README.md")
    assert card.data.language == ["en", "zh", "sw", "ha"]
    assert card.data.tags == ["babel-jax", "multilingual", "depth-expansion"]
    assert card.data.base_model is None
    assert "from a model that babel-jax trained from random weights" in card.text
    means = {
        result.dataset_config: result.metric_value
        for result in card.data.eval_results
        if result.metric_type == "bits_per_byte"
    }
    expected = grown["means"]["continued"] | grown["bits_per_byte"]["continued"]
    assert means == {name: pytest.approx(value, abs=1e-4) for name, value in expected.items()}
    assert card.data.model_name == "grown"
    # The front matter is that of the hub's own library.
    index = card.data.to_dict()["model-index"]
    assert index == eval_results_to_model_index("grown", card.data.eval_results)
    assert {result["dataset"]["name"] for result in index[0]["results"]} >= {
        "held-out text, all 4 languages",
        "held-out text, Swahili",
    }
    assert "| Swahili (sw) | low |" in card.text
    assert "| 2 | 1 | zeros |" in card.text
    assert card.text.strip().startswith("# grown\n")
    for title in ("Intended use", "Expansion", "Training", "Training data", "Evaluation", "Limits"):
        assert f"\n## {title}\n" in card.text
    assert "| recovery | " in card.text.split("## Training\n")[1]
    data = card.text.split("## Training data\n")[1].split("## Evaluation")[0]
    assert "| Hausa | " in data
    assert "| sw.jsonl | not named | sw |" in data
    # Tables are short, and no path of this machine is told.
    for table in re.findall(r"(?:^\|.*\n)+", card.text, re.MULTILINE):
        assert table.count("\n") <= 2 + 30
    assert "/tmp" not in card.text
    assert "Regression gate: " in card.text.split("## Limits")[1]
    assert "to english, chrF++" in card.text
