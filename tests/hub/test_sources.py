"""Text from the hub and from web servers: one listing, ranges, a busy hub, commits that are kept."""

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from babel_jax.config import BadRows, DataSettings, Source
from babel_jax.data.sources.origins import changed_text, origin_of
from babel_jax.data.sources.records import parts
from babel_jax.data.sources.rows import RowCounts, read_rows
from babel_jax.data.windows.prepare import prepare
from babel_jax.errors import BadInput
from babel_jax.hub import datasets, patience, ranges
from tests.conftest import ARTICLE_1
from tests.hub.stand_in import jsonl


def parquet(rows, **options):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, **options)
    return file.getvalue()


def rows_of(language, start, count=6):
    words = ARTICLE_1[language].split()
    return [
        {"id": f"{n}", "text": f"{n} {' '.join(words[n % 5 :] + words[: n % 5])}", "language_score": n / 100}
        for n in range(start, start + count)
    ]


def put_web(hub, languages=("sw", "ha"), shards=3):
    files = {"README.md": "# Text"}
    for language in languages:
        for shard in range(shards):
            files[f"data/{language}/train/{shard:03}.parquet"] = parquet(rows_of(language, 10 * shard))
    return hub.put("me/web", files, kind="datasets")


def texts(source, **options):
    return [row.text for row in read_rows(source, BadRows.REFUSE, RowCounts(), **options)]


def forget(hub):
    """As in a new process."""
    for memory in (datasets.dataset_commit, datasets._listing):
        memory.cache_clear()
    hub.requests.clear()


def test_one_listing_a_folder_and_nothing_twice(hub):
    sha = put_web(hub)
    source = Source(language="sw", path="hf://datasets/me/web/data/sw/train/*.parquet")
    assert parts(source) == [f"hf://datasets/me/web@{sha}/data/sw/train/{n:03}.parquet" for n in range(3)]
    assert texts(source) == [row["text"] for n in range(3) for row in rows_of("sw", 10 * n)]
    assert [request.path for request in hub.seen("/api/*")] == [
        "/api/datasets/me/web",
        f"/api/datasets/me/web/tree/{sha}/data/sw/train",
    ]
    # A file: one question for its address, one range.
    assert hub.count("*/resolve/*") == hub.count("/files/*") == 3
    assert not any(request.has_key for request in hub.seen("/files/*"))

    # A second reading, and another process, which is told the commit: nothing.
    forget(hub)
    again = source.model_copy(update={"revision": sha})
    assert len(texts(again)) == 18
    assert origin_of(again)["files"][parts(again)[0]]["digest"].startswith("hub:")
    assert hub.requests == []


def test_revisions(hub):
    old = put_web(hub, shards=1)
    hub.put("me/web", {"data/sw/train/000.parquet": parquet([{"text": "new"}])}, kind="datasets")
    path = "hf://datasets/me/web{}/data/sw/train/*.parquet"
    assert texts(Source(language="sw", path=path.format(""))) == ["new"]
    assert len(texts(Source(language="sw", path=path.format(f"@{old}")))) == 6
    assert len(texts(Source(language="sw", path=path.format(""), revision=old))) == 6
    with pytest.raises(BadInput, match=r"me/web: has no revision 'v9'; it has main"):
        texts(Source(language="sw", path=path.format(""), revision="v9"))


def test_what_is_not_there(hub, monkeypatch):
    put_web(hub)
    with pytest.raises(
        BadInput, match=r"no file matches \(source of language jv\); me/web/data has no jv, near: ha, sw"
    ):
        parts(Source(language="jv", path="hf://datasets/me/web/data/jv/train/*.parquet"))
    with pytest.raises(BadInput, match=r"me/wep: no such dataset on the hub.*; near: me/web"):
        parts(Source(language="sw", path="hf://datasets/me/wep/data/sw/train/*.parquet"))
    with pytest.raises(
        BadInput, match=r"no column 'content'; set text_key to one of id, text, language_score"
    ):
        texts(Source(language="sw", path="hf://datasets/me/web/data/sw/train/*.parquet", text_key="content"))
    hub.put("me/gated", {"sw.jsonl": jsonl([{"text": "a"}])}, kind="datasets", gated=True)
    with pytest.raises(
        BadInput, match=r"me/gated: this dataset is gated: log in, accept its terms at .*/datasets/me/gated"
    ):
        texts(Source(language="sw", path="hf://datasets/me/gated/sw.jsonl"))


def test_answers_that_are_cut_slow_or_refused(hub, monkeypatch, caplog):
    put_web(hub, shards=1)
    source = Source(language="sw", path="hf://datasets/me/web/data/sw/train/*.parquet")
    hub.fail("/api/datasets/me/web/tree/*", status=429, headers={"Retry-After": "0"})
    hub.fail("*/resolve/*", status=503, times=2)
    hub.fail("/files/*", cut_after=100)
    hub.fail("/files/*", status=403)  # an address that has expired
    assert len(texts(source)) == 6
    # As often as the faults, and once more.
    assert hub.count("*/resolve/*") == 4

    # An hour of 429: said, and the next start goes on.
    forget(hub)
    waits = []
    monkeypatch.setattr(patience, "_clock", lambda: sum(waits))
    monkeypatch.setattr(patience, "_sleep", waits.append)
    put_web(hub, shards=2)
    hub.fail("*/resolve/*/001.parquet", status=429, headers={"RateLimit": '"resolvers";r=0;t=200'}, times=99)
    caplog.set_level("WARNING", "babel")
    with pytest.raises(BadInput, match=r"the hub has answered 429 .* minutes; run the same command later"):
        texts(source)
    assert 3000 < sum(waits) <= 3600
    assert "next try in" in caplog.text
    hub.faults.clear()
    forget(hub)
    assert len(texts(source)) == 12
    assert [request.path[-10:] for request in hub.seen("*/resolve/*")] == ["01.parquet"]


def test_a_file_of_many_blocks(hub, monkeypatch, tmp_path):
    """Blocks of 100 kB: what came before a stop is not fetched again, and the bound is kept."""
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 100_000)
    rows = [{"text": f"{number} " + "Habari. " * 100} for number in range(3000)]
    for number in range(2):
        hub.put(f"me/{number}", {"a.jsonl": jsonl(rows)}, kind="datasets")
    reading = read_rows(Source(language="sw", path="hf://datasets/me/0/a.jsonl"), BadRows.REFUSE, RowCounts())
    for _ in range(20):
        next(reading)
    reading.close()
    size = len(jsonl(rows))
    first = sum(request.sent for request in hub.seen("/api/resolve-cache/*", method="GET"))
    assert first < size / 2
    texts(Source(language="sw", path="hf://datasets/me/0/a.jsonl"))
    assert sum(request.sent for request in hub.seen("/api/resolve-cache/*", method="GET")) == size
    blocks = tmp_path / "scratch" / "hub" / "blocks"
    assert sum(path.stat().st_size for path in blocks.rglob("*") if path.is_file()) == size
    # A bound of little more than one file: the first one's blocks go when the second is opened.
    monkeypatch.setenv("BABEL_CACHE_GIB", str(1.1 * size / 2**30))
    texts(Source(language="sw", path="hf://datasets/me/1/a.jsonl"))
    assert sum(path.stat().st_size for path in blocks.rglob("*") if path.is_file()) == size
    monkeypatch.setenv("BABEL_CACHE_GIB", "0")
    before = len(hub.requests)
    assert len(texts(Source(language="sw", path="hf://datasets/me/0/a.jsonl"))) == 3000
    assert len(hub.requests) > before


def test_a_configuration_of_a_data_set(hub):
    card = "---\nconfigs:\n- config_name: sw\n  data_files: data/sw/train/*.parquet\n---\n"
    sha = put_web(hub)
    hub.repos["datasets", "me/web"].commits[sha]["README.md"] = card.encode()
    source = Source(language="sw", huggingface="me/web", huggingface_config="sw")
    assert parts(source)[0] == f"hf://datasets/me/web@{sha}/data/sw/train/000.parquet"
    assert len(texts(source)) == 18
    # The questions of the package `datasets`, once.
    asked = hub.count("/api/*")
    assert len(texts(source)) == 18
    assert hub.count("/api/*") == asked < 9
    forget(hub)
    assert len(texts(source.model_copy(update={"revision": sha}))) == 18
    assert hub.requests == []
    with pytest.raises(BadInput, match=r"has no split 'test'; its splits are train"):
        parts(source.model_copy(update={"huggingface_split": "test"}))
    # Kinds of files that are not read here are left to the package.
    hub.put("me/csv", {"a.csv": "text\nHabari\n"}, kind="datasets")
    assert texts(Source(language="sw", huggingface="me/csv")) == ["Habari"]


def test_lists_of_files_on_web_servers(hub):
    hub.web["/maps/sw.map"] = b"".join(
        f"{hub.storage}/sorted/{name}.jsonl.gz\n".encode() for name in ("10_1", "9_1", "9_2")
    )
    for name in ("10_1", "9_1", "9_2"):
        hub.web[f"/sorted/{name}.jsonl.gz"] = jsonl([{"text": f"text of {name}"}], compressed=True)
    path = f"{hub.storage}/maps/sw.map"
    assert texts(Source(language="sw", path=path)) == ["text of 10_1", "text of 9_1", "text of 9_2"]
    assert texts(Source(language="sw", path=path, only="/9_*.jsonl.gz")) == ["text of 9_1", "text of 9_2"]
    with pytest.raises(BadInput, match=r"none of its 3 files matches only = '/8_\*', such as http"):
        texts(Source(language="sw", path=path, only="/8_*"))
    # Paths from the root of the server, as in warc.paths.gz.
    hub.web["/crawl/warc.paths.gz"] = gzip.compress(b"sorted/9_1.jsonl.gz\n")
    assert texts(Source(language="sw", path=f"{hub.storage}/crawl/warc.paths.gz")) == ["text of 9_1"]
    with pytest.raises(BadInput, match="no such file on the server"):
        texts(Source(language="sw", path=f"{hub.storage}/none.map"))
    before = origin_of(Source(language="sw", path=path))
    source = Source(language="sw", path=path)
    assert changed_text({**source.model_dump(mode="json"), **before}, source) is None
    with pytest.raises(ValueError, match="only chooses of a list of files"):
        Source(language="sw", path="a.jsonl", only="*")


def settings_of(tmp_path, small_model, **source):
    path = "hf://datasets/me/web/data/sw/train/*.parquet"
    return DataSettings(
        folder=str(tmp_path / "data"),
        tokenizer=str(small_model),
        seq_len=64,
        sources=(Source(**{"language": "sw", "path": path} | source),),
    )


def test_prepare_keeps_the_commit_that_it_began_with(hub, small_model, tmp_path):
    sha = put_web(hub)
    settings = settings_of(tmp_path, small_model)
    report = prepare(settings)
    assert report["languages"]["sw"]["rows"] == 18
    assert json.loads((tmp_path / "data" / "revisions.json").read_text()) == {"me/web@main": sha}
    entry = json.loads((tmp_path / "data" / "languages" / "sw.json").read_text())
    assert entry["sources"][0]["revision"] == sha

    # The hub has gone on; a start that resumes reads the same text, and a complete folder asks nothing.
    put_web(hub, shards=4)
    (tmp_path / "data" / "languages" / "sw.json").unlink()
    (tmp_path / "data" / "prepared.json").unlink()
    forget(hub)
    assert prepare(settings)["languages"]["sw"]["rows"] == 18
    forget(hub)
    assert prepare(settings) == report
    assert hub.requests == []
    # Asked for by its name, another commit is other text.
    with pytest.raises(BadInput, match="prepared from other text .*its revision"):
        prepare(settings_of(tmp_path, small_model, revision=hub.repos["datasets", "me/web"].refs["main"]))


@pytest.mark.parametrize(
    ("where", "numbers"),
    [
        ({"language_score": ">0.12"}, [13, 14, 15, 20, 21, 22, 23, 24, 25]),
        ({"language_score": "<=0.02", "id": "1"}, [1]),
        ({"id": ">=24"}, []),
        ({"none": "<1"}, []),
    ],
)
def test_filters_on_numbers(hub, where, numbers):
    put_web(hub)
    source = Source(language="sw", path="hf://datasets/me/web/data/sw/train/*.parquet", where=where)
    assert [int(text.split()[0]) for text in texts(source)] == numbers


def test_scores_that_are_lists(tmp_path, write_rows):
    rows = [{"text": f"{n}", "score": scores} for n, scores in enumerate([[1.0, 2.0, 6.0], [4.0], [], None])]
    write_rows(tmp_path / "a.jsonl", rows)

    def scores(**options):
        source = Source(language="sw", path=str(tmp_path / "a.jsonl"), **options)
        return [row.score for row in read_rows(source, BadRows.REFUSE, RowCounts())]

    assert scores() == [3.0, 4.0, None, None]
    assert scores(score_of="max") == [6.0, 4.0, None, None]
    assert scores(score_of="min") == [1.0, 4.0, None, None]
    assert scores(score_of="median", where={"score": "<3"}) == [2.0]
    with pytest.raises(ValueError, match=r'score = ">high": not a comparison|>high'):
        scores(where={"score": ">high"})


def test_parallel_text(tmp_path, write_rows):
    rows = [{"id": str(n), "text": f"Habari {n}.", "english": f"News {n}."} for n in range(40)]
    write_rows(tmp_path / "a.jsonl", [*rows, {"id": "x", "text": "Peke yake.", "english": " "}])
    parallel = {
        "text_key": "english",
        "language": "en",
        "template": "{language}: {text}\n{other}: {translation}",
    }
    source = Source(language="sw", path=str(tmp_path / "a.jsonl"), parallel=parallel)
    found = list(read_rows(source, BadRows.REFUSE, counts := RowCounts()))
    assert counts.empty == 1
    assert {row.kind for row in found} == {"parallel"}
    first = [row.text.split(":")[0] for row in found]
    # About half begin with each language, and always the same ones.
    assert 10 < first.count("Swahili") < 30
    assert first.count("English") == 40 - first.count("Swahili")
    assert "Swahili: Habari 0.\nEnglish: News 0." in {row.text for row in found} or (
        "English: News 0.\nSwahili: Habari 0." in {row.text for row in found}
    )
    assert list(read_rows(source, BadRows.REFUSE, RowCounts())) == found
    with pytest.raises(ValueError, match="a template has {text} and {translation}"):
        Source(language="sw", path="a.jsonl", parallel={**parallel, "template": "{text}"})
    with pytest.raises(BadInput, match="no 'german', which parallel.text_key names"):
        texts(
            source.model_copy(update={"parallel": source.parallel.model_copy(update={"text_key": "german"})})
        )
