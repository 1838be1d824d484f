"""The report on a tokenizer, against counts by the `tokenizers` library; and the two commands."""

import json

import pytest
import tokenizers

from babel_jax.cli import main
from babel_jax.data.sources.embedded import embedded_folder
from babel_jax.errors import BadInput
from babel_jax.vocabulary.editable import byte_letters, open_vocabulary
from babel_jax.vocabulary.marks import joined, splits_marks
from babel_jax.vocabulary.reach import unreachable
from babel_jax.vocabulary.report import tokenizer_report


@pytest.fixture(scope="module")
def report(qwen_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return tokenizer_report(qwen_files, None, ["en", "my", "de"], out), out


def test_the_figures_are_those_of_the_library(report, qwen_files, corpus):
    result, _ = report
    theirs = tokenizers.Tokenizer.from_file(str(qwen_files / "tokenizer.json"))
    counts, single = {}, 0
    continuation = {letter for byte, letter in byte_letters().items() if byte >= 0x80}
    for code in ("en", "my", "de"):
        encoded = theirs.encode_batch(corpus[code], add_special_tokens=False)
        counts[code] = sum(len(encoding.ids) for encoding in encoded)
        if code == "my":
            single = sum(token in continuation for encoding in encoded for token in encoding.tokens)
    burmese = result["languages"]["my"]
    size = sum(len(text.encode()) for text in corpus["my"])
    assert burmese["tokens"] == counts["my"]
    assert burmese["tokens_per_byte"] == pytest.approx(counts["my"] / size)
    assert burmese["tokens_per_character"] == pytest.approx(counts["my"] / sum(map(len, corpus["my"])))
    # All rows of the package's text are translations of each other.
    assert burmese["relative"] == pytest.approx(counts["my"] / counts["en"])
    assert burmese["single_byte"] == pytest.approx(single / counts["my"])
    assert burmese["window_bytes"] == pytest.approx(4096 * size / counts["my"])
    assert burmese["window_english"] == pytest.approx(4096 * counts["en"] / counts["my"])
    assert result["languages"]["en"]["relative"] == 1.0
    assert result["entries"] == 600


def test_it_writes_a_page_a_table_and_a_plot(report):
    result, out = report
    assert json.loads((out / "tokenizer.json").read_text())["languages"] == result["languages"]
    assert "| Burmese |" in (out / "tokenizer.md").read_text()
    assert "Words end at combining marks" in (out / "tokenizer.html").read_text()
    assert (out / "tokenizer.png").stat().st_size > 1000


def test_entries_that_no_text_gives(qwen_files):
    vocabulary = open_vocabulary(qwen_files)
    space = byte_letters()[ord(" ")]
    # "10" is split into digits before any merge; "zq" has no merge.
    for text, merge in (("10", ["1", "0"]), ("zq", None), (f"{space}th", None)):
        if text not in vocabulary.description["model"]["vocab"]:
            vocabulary.description["model"]["vocab"][text] = len(vocabulary.texts)
            vocabulary.texts.append(text)
            if merge:
                vocabulary.description["model"]["merges"].append(merge)
    found = unreachable(vocabulary, {})
    assert [vocabulary.texts[number] for number in found.by_merges] == ["zq"]
    assert [vocabulary.texts[number] for number in found.by_splitting] == ["10"]
    assert {vocabulary.texts[number] for number in found.dead} == {"10", "zq"}


def test_joined_marks_are_the_pattern_of_qwen35(qwen_files):
    description = open_vocabulary(qwen_files).description
    changed = joined(description)
    # llama.cpp's src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_QWEN35.
    assert changed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert splits_marks(description)
    assert not splits_marks(changed)


def test_a_language_without_text(qwen_files, tmp_path):
    with pytest.raises(BadInput, match="no text for yo"):
        tokenizer_report(qwen_files, embedded_folder(), ["yo"], tmp_path)


def test_the_commands(make_model, qwen_files, tmp_path, capsys):
    model, data = make_model(qwen_files, 640), embedded_folder()
    assert (
        main(["tokenizer", "report", str(model), "--languages", "en,ta", "--out", str(tmp_path / "r")]) == 0
    )
    assert "| Tamil |" in capsys.readouterr().out
    extend = [
        "tokenizer",
        "extend",
        str(model),
        str(tmp_path / "x"),
        "--data",
        str(data),
        "--languages",
        "ta",
    ]
    assert main([*extend, "--tokens", "30", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 640
    # 603 tokens and 30 new ones fit into the 640 rows that there are.
    for arguments, message in (
        ([*extend, "--tokens", "30"], "exists already"),
        ([*extend[:3], str(tmp_path / "y"), *extend[4:], "--tokens", "999999"], "supports"),
        ([*extend[:3], str(tmp_path / "y"), *extend[4:-1], "xx", "--tokens", "5"], "unknown language 'xx'"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
