"""The page and the card of prepared data, read by parsers that this project did not write."""

import html.parser
import json
import re
import shutil

import pytest

from babel_jax.cli import main
from babel_jax.config import DataSettings, Source
from babel_jax.data.sources.rows import Row
from babel_jax.data.windows.language_statistics import language_statistics
from babel_jax.data.windows.prepare import prepare
from babel_jax.data.windows.prepared import open_prepared
from babel_jax.data.windows.statistics import write_statistics


class Reader(html.parser.HTMLParser):
    """Tags that are open, links, the tables' cells, quotations with their direction, and what would need the
    network.
    """

    def __init__(self):
        super().__init__()
        self.open, self.cells, self.quotes, self.links, self.ids, self.outside = [], [], [], [], set(), []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.outside += [
            value
            for name, value in attributes.items()
            if name in ("src", "href") and not value.startswith("#") and value != "data:,"
        ]
        if tag in ("script", "img", "iframe"):
            self.outside.append(tag)
        if tag == "a":
            self.links.append(attributes["href"])
        if "id" in attributes:
            self.ids.add(attributes["id"])
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag == "blockquote":
            self.quotes.append([attributes["lang"], attributes["dir"], ""])
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += data
        if "blockquote" in self.open:
            self.quotes[-1][2] += data


@pytest.fixture
def folder(small_prepared, tmp_path):
    """The small prepared corpus with one language turned Arabic, rows that have scores, and what cleaning
    would report.
    """
    shutil.copytree(small_prepared, tmp_path / "data")
    folder = tmp_path / "data"
    report = json.loads((folder / "prepared.json").read_text())
    report["languages"]["ar"] = report["languages"].pop("ha")
    for entry in report["languages"].values():
        entry.pop("heldout_sha256", None)  # the held-out text is changed below
    for path in list(folder.rglob("*ha*")):
        if path.name in ("ha.jsonl", "ha-web"):
            path.rename(path.with_name(path.name.replace("ha", "ar")))
    rows = [
        {"id": str(number), "text": f"<b>نص {number}</b> & {'x' * 500}", "kind": "web"} for number in range(4)
    ]
    (folder / "heldout" / "ar.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report["languages"]["ar"]["cleaning"] = {
        "wiki <1>": {
            "licence": "CC-BY-SA-4.0",
            "documents": 100,
            "kept": 80,
            "dropped": {"digits": 7, "characters": 10},
            "duplicates": {"exact": 2, "near": 1},
            "examples": {"characters": ["<i>نص</i>", "2", "3"], "digits": ["4711"]},
        },
        "web": {
            "licence": None,
            "documents": 10,
            "kept": 5,
            "dropped": {"characters": 6},
            "duplicates": {"exact": 0, "near": 0},
            "examples": {"characters": ["4"]},
        },
    }
    (folder / "prepared.json").write_text(json.dumps(report))
    return folder


def test_the_page(folder, capsys):
    assert main(["statistics", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    reader = Reader()
    reader.feed((folder / "statistics.html").read_text(encoding="utf-8"))
    assert reader.open == []
    assert reader.outside == []
    assert {link[1:] for link in reader.links} == {"tokens", "left-out", "en", "zh", "sw", "ar"}
    assert {link[1:] for link in reader.links} <= reader.ids
    prepared = open_prepared(folder)
    english = next(row for row in reader.cells if row[0] == "English")
    tokens = sum(count for (code, _), count in prepared.available.items() if code == "en")
    assert english[1] == f"{tokens:,}"
    assert found["languages"]["en"]["kinds"].keys() == {"web", "textbook"}
    assert found["tokens"] == sum(prepared.available.values())
    part = f"{100 * 16 / prepared.report['languages']['ar']['rows']:.2f}%"
    too_short = "too short: min_characters = 100"
    assert ["Arabic", "16", part, "rule characters", too_short] in reader.cells
    digits = "7 too many digits: max_digit_fraction = 0.3"
    assert ["wiki <1>", "100", "80", "2", "1", f"10 {too_short}; {digits}"] in reader.cells
    # Three samples, three examples of the first rule and one of the second.
    arabic = [quote for quote in reader.quotes if quote[0] == "ar"]
    assert [text for *_, text in arabic[3:]] == ["<i>نص</i>", "2", "3", "4711"]
    page = (folder / "statistics.html").read_text(encoding="utf-8")
    assert f"Arabic, web: cleaning dropped 6 of 10 documents (60%): 6 {too_short}." in page
    assert "wiki &lt;1&gt;: cleaning dropped" not in page
    assert "examples" not in found["languages"]["ar"]["sources"]["web"]
    assert arabic[0][1] == "rtl"
    assert arabic[0][2].startswith("<b>نص 0</b> & xxx")
    assert all(len(text) < 420 for *_, text in reader.quotes)
    assert {direction for code, direction, _ in reader.quotes if code != "ar"} == {"ltr"}


def test_names_of_strangers_are_text_in_page_and_card(small_model, write_rows, rows_of, tmp_path):
    name = "[x](http://a/) <img src=x onerror=alert(1)>\n# head \x1b[31m `|"
    path = write_rows(tmp_path / "sw.jsonl", rows_of("sw", ("web",)))
    source = Source(language="sw", path=str(path), name=name, licence="<script>")
    prepare(
        DataSettings(folder=str(tmp_path / "<b>"), seq_len=64, heldout_fraction=0.2, sources=(source,)),
        small_model,
    )
    write_statistics(tmp_path / "<b>")
    text, page = (
        (tmp_path / "<b>" / file).read_text(encoding="utf-8") for file in ("README.md", "statistics.html")
    )
    body = text.split("## Made with")[0].split("---\n", 2)[2]
    for own in ("`babel prepare`", "`windows/LANGUAGE-KIND`", "`statistics.html`"):
        body = body.replace(own, "")
    assert not re.search(r"(?<!\\)[<\[`]|^# head|\x1b", body, re.MULTILINE)
    assert "<script" not in page
    assert "<img" not in page
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page


def test_the_card(folder):
    yaml = pytest.importorskip("yaml")
    write_statistics(folder)
    _, front, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["language"] == ["en", "zh", "sw", "ar"]
    assert values["size_categories"] == ["n<1K"]
    assert values["license"] == "other"
    assert "| Arabic (ar) |" in body
    assert "Named are: CC-BY-SA-4.0." in body
    assert "- ar: wiki \\<1\\> (CC-BY-SA-4.0)" in body
    assert '"seq_len": 64' in body


def test_fertility_and_quality(folder, monkeypatch):
    prepared = open_prepared(folder)
    own = language_statistics(prepared, "zh")
    heldout = prepared.heldout("zh")
    bytes_per_character = sum(len(row.text.encode()) for row in heldout) / sum(
        len(row.text) for row in heldout
    )
    assert own.tokens_per_character == pytest.approx(bytes_per_character / own.bytes_per_token)
    assert own.scores == []

    rows = [Row(str(score), "x", "web", score) for score in (0.0, 0.05, 0.95, 1.0, 1.5, -1.0, 0.5)]
    monkeypatch.setattr(type(prepared), "heldout", lambda *_: rows)
    assert language_statistics(prepared, "zh").scores == [3, 0, 0, 0, 0, 1, 0, 0, 0, 3]


def test_scores_and_licences_of_rows_as_they_are(small_model, write_rows, rows_of, tmp_path):
    rows = [{**row, "score": number / 80} for number, row in enumerate(rows_of("sw", ("web",)))]
    path = write_rows(tmp_path / "sw.jsonl", rows)
    source = Source(language="sw", path=str(path), name="scored", licence="CC0-1.0")
    prepare(
        DataSettings(folder=str(tmp_path / "data"), seq_len=64, heldout_fraction=0.2, sources=(source,)),
        small_model,
    )
    write_statistics(tmp_path / "data")
    scores = {row["id"]: row["score"] for row in rows}
    assert {row.score == scores[row.id] for row in open_prepared(tmp_path / "data").heldout("sw")} == {True}
    page = (tmp_path / "data" / "statistics.html").read_text(encoding="utf-8")
    assert "Held-out documents by tenths of the quality score" in page
    assert "- sw: scored (CC0-1.0)" in (tmp_path / "data" / "README.md").read_text(encoding="utf-8")
