"""Sources beyond local files of rows: object storage, WARC, Hugging Face and TFDS datasets.

Small files in the real schemas.
"""

import gzip
import io
import json
import zlib

import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from babel_jax.config import BadRows, DataSettings, Source
from babel_jax.config.catalogue import catalogue, expand
from babel_jax.config.file import parse_settings
from babel_jax.data.sources import parquet, records
from babel_jax.data.sources.records import parts, read_records
from babel_jax.data.sources.rows import RowCounts, read_rows
from babel_jax.errors import BadInput
from babel_jax.languages import BABEL


def read(source, part=None):
    counts = RowCounts()
    return list(read_rows(source, BadRows.REFUSE, counts, part)), counts


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


# --- object storage ---------------------------------------------------------------------------------------


@pytest.fixture
def memory():
    """An object store in memory, the one that fsspec has for tests."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.pipe("/madlad/sw/sw_clean_0001.jsonl.gz", gzip.compress(as_jsonl([{"text": "tatu"}])))
    system.pipe(
        "/madlad/sw/sw_clean_0000.jsonl.gz", gzip.compress(as_jsonl([{"text": "moja"}, {"text": "mbili"}]))
    )
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["nne"], "url": ["u"]}), buffer)
    system.pipe("/culturax/sw.parquet", buffer.getvalue())
    yield system
    system.rm("/madlad", recursive=True)
    system.rm("/culturax", recursive=True)


def test_files_of_an_object_store_are_read_as_local_ones(memory):
    source = Source(language="sw", path="memory://madlad/sw/sw_clean_*.jsonl.gz")
    assert [row.text for row in read(source)[0]] == ["moja", "mbili", "tatu"]
    assert len(parts(source)) == 2
    assert [row.text for row in read(source, parts(source)[1])[0]] == ["tatu"]
    rows, _ = read(Source(language="sw", path="memory://culturax/sw.parquet", id_key="url"))
    assert [(row.id, row.text) for row in rows] == [("u", "nne")]


def test_what_is_not_in_the_store_is_named(memory):
    with pytest.raises(
        BadInput, match=r"memory://nothing/\*.jsonl: no file matches \(source of language sw\)"
    ):
        read(Source(language="sw", path="memory://nothing/*.jsonl"))
    with pytest.raises(BadInput, match=r"nosuch://x/y.jsonl: cannot be reached"):
        read(Source(language="sw", path="nosuch://x/y.jsonl"))
    memory.pipe(
        "/madlad/sw/cut.jsonl.gz",
        gzip.compress(as_jsonl([{"text": str(number)} for number in range(9999)]))[:-900],
    )
    with pytest.raises(BadInput, match=r"cut.jsonl.gz: unreadable after line \d+"):
        read(Source(language="sw", path="memory://madlad/sw/cut.jsonl.gz"))


# --- files ------------------------------------------------------------------------------------------------


def test_rows_of_other_languages_are_passed_over(tmp_path):
    """As CC-News, where one file holds all languages."""
    rows = [
        {
            "plain_text": f"habari {number}",
            "requested_url": f"u{number}",
            "language": "sw" if number % 2 else "en",
        }
        for number in range(6)
    ]
    source = {
        "language": "sw",
        "text_key": "plain_text",
        "id_key": "requested_url",
        "where": {"language": "sw"},
    }
    (tmp_path / "news.jsonl").write_bytes(as_jsonl(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "news.parquet")
    for name in ("news.jsonl", "news.parquet"):
        found, counts = read(Source(path=str(tmp_path / name), **source))
        assert [row.id for row in found] == ["u1", "u3", "u5"]
        assert counts.rows == 3


def test_scores_are_read(tmp_path):
    path = tmp_path / "sw.jsonl"
    path.write_bytes(as_jsonl([{"text": "a", "score": 0.5}, {"text": "b"}, {"text": "c", "score": 2}]))
    assert [row.score for row in read(Source(language="sw", path=str(path)))[0]] == [0.5, None, 2.0]
    path.write_bytes(as_jsonl([{"text": "a", "score": "high"}]))
    with pytest.raises(BadInput, match="score 'high' is not a number"):
        read(Source(language="sw", path=str(path)))


def test_lines_and_paragraphs_beyond_any_document_are_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_DOCUMENT_BYTES", 1000)
    long = b"x" * 2500
    (tmp_path / "a.txt").write_bytes(
        b"one\ntwo\n\n" + long + b"\n\nthree\n" + b"y" * 600 + b"\n" + b"z" * 600 + b"\n\nfour"
    )
    found = list(read_records(Source(language="en", path=str(tmp_path / "a.txt")), str(tmp_path / "a.txt")))
    assert [type(record).__name__ for _, record in found] == ["dict", "BadRowError", "BadRowError", "dict"]
    assert [place.rsplit(":", 1)[1] for place, _ in found] == ["1", "4", "6", "10"]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + long + b'\n{"text": "b"}')
    found = list(
        read_records(Source(language="en", path=str(tmp_path / "a.jsonl")), str(tmp_path / "a.jsonl"))
    )
    assert [record if isinstance(record, dict) else "bad" for _, record in found] == [
        {"text": "a"},
        "bad",
        {"text": "b"},
    ]


def warc(kind, uri, content, content_type):
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\nWARC-Record-ID: "
        f"<urn:uuid:{uri}>\r\nContent-Type: {content_type}\r\n"
    )
    return (
        (head + f"WARC-Date: 2024-01-01T00:00:00Z\r\nContent-Length: {len(content)}\r\n\r\n").encode()
        + content
        + b"\r\n\r\n"
    )


def page(body, charset="utf-8", content_type="text/html", head=""):
    return f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}; charset={charset}\r\n{head}\r\n".encode() + body


def test_web_archives(tmp_path):
    pytest.importorskip("fastwarc")
    html = (
        "<html><head><title>x</title><script>var a;</script></head>"
        "<body><nav><a href='/'>Home</a></nav><article><p>{}</p></article></body></html>"
    )
    archive = [
        warc("warcinfo", "i", b"software: x", "application/warc-fields"),
        warc("request", "http://a/1", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"),
        warc(
            "response",
            "http://a/1",
            page(html.format("Habari za asubuhi, rafiki.").encode()),
            "application/http; msgtype=response",
        ),
        warc(
            "response",
            "http://a/2",
            page(b"\x89PNG", content_type="image/png"),
            "application/http; msgtype=response",
        ),
        warc(
            "response",
            "http://a/3",
            page(html.format("Déjà vu à l'école.").encode("latin-1"), "iso-8859-1"),
            "application/http; msgtype=response",
        ),
    ]
    (tmp_path / "news.warc.gz").write_bytes(b"".join(map(gzip.compress, archive)))
    rows, _ = read(Source(language="sw", path=str(tmp_path / "news.warc.gz")))
    assert [(row.id, row.text.strip()) for row in rows] == [
        ("http://a/1", "Habari za asubuhi, rafiki."),
        ("http://a/3", "Déjà vu à l'école."),
    ]
    text = warc("conversion", "http://a/4", b"Jua linawaka.\nSasa.", "text/plain")
    (tmp_path / "crawl.warc.wet.gz").write_bytes(gzip.compress(archive[0]) + gzip.compress(text))
    rows, _ = read(Source(language="sw", path=str(tmp_path / "crawl.warc.wet.gz")))
    assert [(row.id, row.text) for row in rows] == [("http://a/4", "Jua linawaka.\nSasa.")]
    (tmp_path / "cut.warc.gz").write_bytes(b"".join(map(gzip.compress, archive))[:-40])
    with pytest.raises(BadInput, match=r"cut.warc.gz: unreadable after record \d+"):
        read(Source(language="sw", path=str(tmp_path / "cut.warc.gz")))


def chunked(body):
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:50], body[50:], b""))


@pytest.mark.parametrize(
    ("head", "sent"),
    [
        ("transfer-encoding: chunked\r\n", chunked),
        ("Content-Encoding: gzip\r\n", gzip.compress),
        ("Content-Encoding: deflate\r\n", zlib.compress),
        (
            "Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
            lambda body: chunked(gzip.compress(body)),
        ),
        (
            "Content-Encoding: br\r\nTransfer-Encoding: chunked\r\n",
            lambda body: body,
        ),  # as archives that have taken it off
    ],
)
def test_pages_of_web_archives_that_stand_there_as_they_were_sent(tmp_path, head, sent):
    pytest.importorskip("fastwarc")
    bodies = [
        f"<html><body><article><p>Habari za asubuhi, {name}.</p></article></body></html>".encode()
        for name in ("Asha", "Juma")
    ]
    kind = "application/http; msgtype=response"
    archive = [
        warc("response", f"http://a/{number}", page(sent(body), head=head), kind)
        for number, body in enumerate(bodies)
    ]
    (tmp_path / "news.warc").write_bytes(b"".join(archive))
    rows, _ = read(Source(language="sw", path=str(tmp_path / "news.warc")))
    assert [row.text.strip() for row in rows] == ["Habari za asubuhi, Asha.", "Habari za asubuhi, Juma."]


# --- datasets ---------------------------------------------------------------------------------------------


def test_hugging_face_datasets_are_streamed_shard_by_shard(tmp_path):
    pytest.importorskip("datasets")
    for shard in range(2):
        rows = [
            {"id": f"{shard}{row}", "url": "u", "title": "t", "text": f"makala {shard} {row}"}
            for row in range(3)
        ]
        (tmp_path / "wiki" / "sw").mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), tmp_path / "wiki" / "sw" / f"train-0000{shard}-of-00002.parquet"
        )
    (tmp_path / "wiki" / "README.md").write_text(
        "---\nconfigs:\n- config_name: 20231101.sw\n  data_files:\n  - split: train\n    path: "
        "sw/train-*\n---\n"
    )
    source = Source(
        language="sw",
        huggingface=str(tmp_path / "wiki"),
        huggingface_config="20231101.sw",
        kind="encyclopedia",
    )
    assert parts(source) == ["0/2", "1/2"]
    rows, _ = read(source)
    assert [row.id for row in rows] == ["00", "01", "02", "10", "11", "12"]
    assert {row.kind for row in rows} == {"encyclopedia"}
    assert [row.id for row in read(source, "1/2")[0]] == ["10", "11", "12"]
    version = records.dataset_version(source)
    assert records.dataset_version(source) == version
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"text": "other"}]), next((tmp_path / "wiki" / "sw").iterdir())
    )
    assert records.dataset_version(source) != version
    with pytest.raises(BadInput, match=r"Hugging Face dataset .*nothing.* cannot be read"):
        parts(Source(language="sw", huggingface=str(tmp_path / "nothing")))


def test_one_long_value_in_many_rows_of_a_small_parquet_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_PARQUET_FREE_BYTES", 1 << 20)
    source = Source(language="sw", path=str(tmp_path / "sw.parquet"))
    value = "habari ya asubuhi " * 2_000
    pyarrow.parquet.write_table(pyarrow.table({"text": [value] * 300}), source.path, compression="zstd")
    # The file alone cannot tell: its metadata counts the value once.
    assert (tmp_path / "sw.parquet").stat().st_size < 10_000
    with pytest.raises(BadInput, match=r"its first \d+ rows have over 200 times the bytes of the file"):
        read(source)

    # Rows that differ take as many bytes in the file as they have.
    texts = [value + str(number) for number in range(300)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), source.path, compression="none", use_dictionary=False
    )
    assert len(read(source)[0]) == 300


def test_ranges_of_tfds_datasets(tmp_path, monkeypatch):
    class Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "some_rows"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(5):
                yield number, {"text": f"maandishi {number}"}

    Rows.url_infos = {}
    monkeypatch.setattr(tfds.core.DatasetInfo, "initialize_from_bucket", lambda self: None)
    monkeypatch.setattr(records, "_TFDS_PART", 2)
    Rows(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = Source(language="sw", tfds="some_rows", tfds_folder=str(tmp_path))
    assert parts(source) == ["0:2", "2:4", "4:5"]
    assert [row.text for row in read(source)[0]] == [f"maandishi {number}" for number in range(5)]
    assert [row.text for row in read(source, "2:4")[0]] == ["maandishi 2", "maandishi 3"]
    assert records.dataset_version(source).startswith("some_rows/1.0.0 {'train': (5, ")


# --- the catalogue ----------------------------------------------------------------------------------------


def settings(*sources):
    return parse_settings(DataSettings, {"folder": "d", "sources": list(sources)}, "a.toml").sources


def test_every_corpus_of_the_catalogue_gives_sources_for_each_language_that_it_has():
    assert {
        "wikipedia",
        "culturax",
        "madlad-400",
        "cc-news",
        "cosmopedia",
        "redpajama",
        "proof-pile-2",
        "yayi2",
    } <= set(catalogue())
    for name, entry in catalogue().items():
        has = [code for code in BABEL if code in entry["configurations"]]
        assert sorted([*has, *entry["absent"]]) == sorted(BABEL), name
        found = settings({"catalogue": name})
        assert list(dict.fromkeys(source.language for source in found)) == has
        assert all(source.name == name and source.licence and "{" not in source.label for source in found)
        assert entry["home"].startswith("https://")
        assert entry["title"]


def test_what_the_catalogue_stands_for():
    (one,) = settings({"catalogue": "madlad-400", "language": "tl"})
    assert one.path == "hf://datasets/allenai/MADLAD-400/data/fil/fil_clean_*.jsonl.gz"
    (wiki,) = settings({"catalogue": "wikipedia", "language": "my", "weight": 9.0, "name": "wiki"})
    assert wiki.path == "hf://datasets/wikimedia/wikipedia/20231101.my/*.parquet"
    assert (wiki.weight, wiki.name, wiki.kind) == (9.0, "wiki", "encyclopedia")
    assert len(settings({"catalogue": "cosmopedia"})) == 8
    (web,) = settings({"catalogue": "fineweb-2", "language": "zh"})
    assert web.path == "hf://datasets/HuggingFaceFW/fineweb-2/data/cmn_Hani/train/*.parquet"
    (news,) = settings({"catalogue": "cc-news", "language": "sw", "year": "2023"})
    assert news.path == "hf://datasets/stanford-oval/ccnews/2023_*.parquet"
    (both,) = settings({"catalogue": "finetranslations", "language": "ha"})
    assert (both.kind, both.parallel.text_key) == ("parallel", "translated_text")
    # Languages beyond the 25, by the corpus's rule.
    (yoruba,) = settings({"catalogue": "fineweb-2", "language": "yo"})
    assert yoruba.path == "hf://datasets/HuggingFaceFW/fineweb-2/data/yor_Latn/train/*.parquet"
    (amharic,) = settings({"catalogue": "wikipedia", "language": "am"})
    assert amharic.path == "hf://datasets/wikimedia/wikipedia/20231101.am/*.parquet"
    mixed = settings({"language": "sw", "path": "a.jsonl"}, {"catalogue": "cc-news", "language": "sw"})
    assert [source.where for source in mixed] == [{}, {"language": "sw"}]
    assert expand({"language": "sw", "path": "a"}, ()) == [{"language": "sw", "path": "a"}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"catalogue": "madlad"}, r"no corpus 'madlad' in the catalogue; it has wikipedia, .*madlad-400"),
        (
            {"catalogue": "yayi2", "language": "sw"},
            "yayi2 has no text in sw; it has zh; corpora with sw: wikipedia, .*fineweb-2",
        ),
        ({"catalogue": "yayi2", "language": "xx"}, "xx"),
        ({"catalogue": "fineweb-2", "language": "en"}, "fineweb-2 has no text in en; .*fineweb-edu"),
        (
            {"catalogue": "yayi2", "wight": 2.0},
            r"yayi2: unknown key wight; did you mean weight\? valid keys: .*catalogue",
        ),
        # Once, and not for each of its 25 languages.
        (
            {"catalogue": "wikipedia", "languages": ["sw"]},
            r"^[^;]*unknown key languages; did you mean language\?[^;]*$",
        ),
        ({"language": "sw"}, "exactly one of path, tfds and huggingface"),
    ],
)
def test_mistakes_with_the_catalogue(source, message):
    with pytest.raises(BadInput, match=message):
        settings(source)
