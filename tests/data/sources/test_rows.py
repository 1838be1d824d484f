import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from babel_jax.config import BadRows, Source
from babel_jax.data.sources import parquet, records
from babel_jax.data.sources.origins import file_digest
from babel_jax.data.sources.rows import LONGEST_WORD, MAX_LOCATED, Row, RowCounts, read_rows
from babel_jax.data.sources.streams import explained
from babel_jax.errors import BadInput

DOCUMENTS = [("a", "one\ntwo"), ("b", "  drei, vier "), ("c", "பின்னர்")]


def read(path, bad_rows=BadRows.REFUSE, **settings):
    counts = RowCounts()
    return list(read_rows(Source(language="en", path=str(path), **settings), bad_rows, counts)), counts


def as_jsonl(documents):
    return "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in documents).encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"en{suffix}"
    content = as_jsonl(DOCUMENTS)
    if suffix == ".parquet":
        pyarrow.parquet.write_table(
            pyarrow.table({"text": [text for _, text in DOCUMENTS], "id": [name for name, _ in DOCUMENTS]}),
            path,
        )
    else:
        path.write_bytes({".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(content))
    rows, counts = read(path)
    assert rows == [Row(name, text, "web") for name, text in DOCUMENTS]
    assert (counts.rows, counts.bad, counts.empty) == (3, 0, 0)


def test_compressed_files_of_several_members_are_read_whole(tmp_path):
    (tmp_path / "en.jsonl.gz").write_bytes(
        b"".join(gzip.compress(as_jsonl([document])) for document in DOCUMENTS)
    )
    (tmp_path / "en.jsonl.zst").write_bytes(
        b"".join(zstandard.compress(as_jsonl([document])) for document in DOCUMENTS)
    )
    for path in tmp_path.iterdir():
        assert [row.text for row in read(path)[0]] == [text for _, text in DOCUMENTS]


def test_documents_of_plain_text_stand_between_blank_lines(tmp_path):
    path = tmp_path / "en.txt"
    path.write_bytes(b"\n\nfirst line\nsecond line\r\n \n\n\nother\n")
    assert read(path)[0] == [
        Row("en.txt:3", "first line\nsecond line", "web"),
        Row("en.txt:8", "other", "web"),
    ]


def test_files_of_a_glob_come_in_the_order_of_their_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        (tmp_path / name).write_bytes(as_jsonl([(name, name)]))
    assert [row.id for row in read(tmp_path / "*.jsonl")[0]] == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_keys_kinds_and_ids_of_their_own(tmp_path):
    path = tmp_path / "en.jsonl"
    rows = [
        {"content": "x", "key": 7},
        {"content": "y", "kind": "textbook"},
        {"content": "z", "kind": None, "key": None},
    ]
    path.write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read(path, text_key="content", id_key="key", kind="curated")[0] == [
        Row("7", "x", "curated"),
        Row("en.jsonl:2", "y", "textbook"),
        Row("en.jsonl:3", "z", "curated"),
    ]


BAD_LINES = {
    b'{"text": "cut': "not readable JSON",
    b"[1, 2]": "a JSON object is needed, not list",
    b'{"id": "x", "content": "y"}': "no 'text'; its keys are id, content",
    b'{"text": null}': "'text' is null",
    b'{"text": "x", "score": 1' + b"0" * 400 + b"}": "score is not a finite number of up to 1e+38",
    b'{"text": "x", "score": 1e39}': "score is not a finite number",
    b'{"text": "x", "score": true}': "score True is not a number",
    b'{"te\\ud83dxt": "x"}': "no 'text'; its keys are te\\ud83dxt",
    b'{"a\\nb\\u001b": "x"}': "no 'text'; its keys are a b\\x1b",
    b'{"text": "x", "kind": "' + b"a" * 100_000 + b'"}': "is not of up to 64 lower-case letters",
    b"{" + b", ".join(b'"k%d": 1' % number for number in range(50_000)) + b"}": "and 49990 more",
    b'{"text": 5}': "'text' is not a string but int",
    b'{"text": "caf\xe9"}': "not UTF-8",
    b'{"text": "\\ud83d half a pair"}': "'text' is not UTF-8",
    b'{"text": "x", "id": [1]}': "'id' is not a string but list",
    b'{"text": "x", "kind": "../web"}': "kind '../web' is not of up to 64 lower-case letters",
    b"[" * 100_000: "not readable JSON",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_bad_row_is_located_and_refused_or_skipped(tmp_path, line, reason):
    path = tmp_path / "en.jsonl"
    path.write_bytes(as_jsonl(DOCUMENTS[:1]) + b"\n" + line + b"\n" + as_jsonl(DOCUMENTS[1:]))
    with pytest.raises(BadInput) as raised:
        read(path)
    assert f"{path}:3: " in str(raised.value)
    assert reason in str(raised.value)
    assert 'data.bad_rows = "skip"' in str(raised.value)
    assert "\n" not in str(raised.value)
    rows, counts = read(path, BadRows.SKIP)
    assert [row.id for row in rows] == ["a", "b", "c"]
    assert (counts.rows, counts.bad) == (4, 1)
    assert counts.located[0].startswith(f"{path}:3: ")
    assert len(counts.located[0]) < 500 + len(str(path))
    counts.located[0].encode()  # it is written into reports


@pytest.mark.parametrize(
    "name", ["en.jsonl.gz", "en.jsonl.zst", "en.parquet", "en.warc", "en.warc.gz", "en.wet"]
)
def test_an_archive_of_no_bytes_was_cut_short(tmp_path, name):
    """A compressed file of nothing has some bytes. Beside other files of a glob it would pass in silence."""
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadInput, match=f"{name}: .*cut short"):
        read(tmp_path / name)


def test_a_line_without_end_is_refused(tmp_path):
    path = tmp_path / "en.jsonl"
    path.write_bytes(b'{"text": "a"}\n')
    with open(path, "r+b") as file:
        file.truncate(4 * 10**12)  # holes: no byte of them is on the disk
    with pytest.raises(
        BadInput, match=r"en.jsonl:2: a line of more than 1,073,741,824 bytes; the file is no text"
    ):
        read(path)
    with pytest.raises(
        BadInput, match=r"en.jsonl: 4,000,000,000,000 bytes, of which next to none are on the disk"
    ):
        file_digest(str(path))


def test_lines_of_nothing_without_end_are_refused(tmp_path, monkeypatch):
    """A megabyte of gzip can be a gigabyte of line ends, which took minutes."""
    monkeypatch.setattr(records, "_MAX_BLANK_LINES", 1000)
    path = tmp_path / "en.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' + b"\n" * 1000 + b'{"text": "b"}\n'))
    assert len(read(path)[0]) == 2
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' + b"\r\n" * 5000))
    with pytest.raises(BadInput, match=r"en.jsonl.gz:1002: more than 1,000 lines of nothing in a row"):
        read(path)


def test_where_finds_numbers_as_settings_name_them(tmp_path):
    path = tmp_path / "en.jsonl"
    rows = [{"id": str(value), "text": "x", "year": value} for value in (2023, 2024, "2024", None, True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.id for row in read(path, where={"year": "2024"})[0]] == ["2024", "2024"]


def test_only_the_first_bad_rows_are_located(tmp_path):
    path = tmp_path / "en.jsonl"
    path.write_bytes(b"nonsense\n" * 100)
    rows, counts = read(path, BadRows.SKIP)
    assert (rows, counts.bad, len(counts.located)) == ([], 100, MAX_LOCATED)


def test_empty_text_is_counted_and_not_bad(tmp_path):
    path = tmp_path / "en.jsonl"
    path.write_bytes(as_jsonl([("a", ""), ("b", " \n\t"), ("c", "x")]))
    rows, counts = read(path)
    assert [row.id for row in rows] == ["c"]
    assert (counts.rows, counts.empty, counts.bad) == (3, 2, 0)


def test_bad_values_of_parquet(tmp_path):
    path = tmp_path / "en.parquet"
    spoiled = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xffc")],
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": spoiled}), path)
    rows, counts = read(path, BadRows.SKIP)
    assert [(row.id, row.text) for row in rows] == [("en.parquet:1", "a"), ("en.parquet:3", "c")]
    assert "en.parquet:2: 'text' is not UTF-8" in counts.located[0]
    with pytest.raises(BadInput, match=r"no column 'content'; set text_key to one of text"):
        read(path, text_key="content")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("kept", [-1, 0.5, 3])
def test_a_truncated_stream_is_named(tmp_path, suffix, kept):
    path = tmp_path / f"en{suffix}"
    content = {".gz": gzip.compress, ".zst": zstandard.compress}[path.suffix](
        as_jsonl([(str(i), str(hash(str(i)))) for i in range(20_000)])
    )
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(BadInput, match=r"unreadable after line \d+.*corrupt or cut short") as raised:
        read(path, BadRows.SKIP)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["en.parquet", "en.jsonl.gz", "en.jsonl.zst"])
def test_a_file_of_another_format_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is not what the name says" * 100)
    with pytest.raises(BadInput, match=rf"{name}: unreadable"):
        read(tmp_path / name)


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "en.csv").write_text("x")
    for path, message in {
        tmp_path / "en.jsonl": "no such file",
        tmp_path / "*.jsonl": "no file matches",
        tmp_path: "a folder; name its files",
        tmp_path / "en.csv": r"readable are \.jsonl, \.json, \.txt",
    }.items():
        with pytest.raises(BadInput, match=message) as raised:
            read(path)
        assert str(path) in str(raised.value)
    with pytest.raises(BadInput, match="kind = 'Web page'"):
        read(tmp_path / "en.csv", kind="Web page")


WRITE_TFDS = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Prose(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "id": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for number in range(5):
            yield number, {"text": f"Satz {number}: größer", "id": number}

Prose(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


def test_tfds_by_name(tmp_path):
    (tmp_path / "prose.py").write_text(WRITE_TFDS)
    subprocess.run(
        [sys.executable, str(tmp_path / "prose.py"), str(tmp_path)], check=True, capture_output=True
    )
    source = Source(language="de", tfds="prose", tfds_folder=str(tmp_path))
    rows = list(read_rows(source, BadRows.REFUSE, RowCounts()))
    assert sorted(rows, key=lambda row: row.id) == [
        Row(str(number), f"Satz {number}: größer", "web") for number in range(5)
    ]
    missing = Source(language="de", tfds="nowhere_to_be_found", tfds_folder=str(tmp_path))
    with pytest.raises(BadInput, match=r"TFDS dataset nowhere_to_be_found \(split train\) cannot be read"):
        list(read_rows(missing, BadRows.REFUSE, RowCounts()))


def test_a_word_that_no_language_has_is_a_bad_row(tmp_path):
    """BPE takes the longer for each letter of a word, the longer the word is."""
    path = tmp_path / "en.jsonl"
    path.write_bytes(
        as_jsonl([("a", "x" * (LONGEST_WORD + 1)), ("b", "x" * LONGEST_WORD), ("c", "word, " * LONGEST_WORD)])
    )
    rows, counts = read(path, BadRows.SKIP)
    assert [row.id for row in rows] == ["b", "c"]
    assert "a word of more than 262,144 letters" in counts.located[0]


def test_rows_of_parquet_that_memory_is_not_meant_for(tmp_path, monkeypatch):
    path = tmp_path / "en.parquet"
    monkeypatch.setattr(parquet, "_PARQUET_LONGEST_BYTES", 10_000)
    table = pyarrow.table({"text": ["first", "x" * 20_000 + "y", "last"]})
    pyarrow.parquet.write_table(table, path, row_group_size=1, use_dictionary=False, compression="none")
    rows, counts = read(path, BadRows.SKIP)
    assert [row.text for row in rows] == ["first", "last"]
    assert "en.parquet:2: longer than 16 MiB" in counts.located[0]
    table = pyarrow.table({"text": ["first", "x" * 40_000]})
    pyarrow.parquet.write_table(table, path, use_dictionary=False, compression="none")
    with pytest.raises(BadInput, match=r"values of its column 'text' have over .* in the mean"):
        read(path, BadRows.SKIP)


def test_metadata_of_parquet_beyond_what_arrow_reads_is_not_called_corrupt():
    """Arrow's words, for a footer of 110 MB."""
    words = "Couldn't deserialize thrift: TProtocolException: Exceeded size limit"
    with (
        pytest.raises(BadInput, match=r"en.parquet: the description of its columns .* than Arrow reads"),
        explained("en.parquet", str),
    ):
        raise OSError(words)
