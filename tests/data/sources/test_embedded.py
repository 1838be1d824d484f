import gzip
import json

import pytest

from babel_jax.data.sources.embedded import corpus_sources, embedded_corpus
from babel_jax.errors import BadInput
from babel_jax.languages import BABEL


def test_a_folder_of_files_named_by_language(tmp_path):
    for name in ("sw.jsonl", "en.jsonl", "notes.txt", "xx.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    (tmp_path / "ta.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n'))
    assert [(source.language, source.path) for source in corpus_sources(tmp_path)] == [
        ("en", str(tmp_path / "en.jsonl")),
        ("sw", str(tmp_path / "sw.jsonl")),
        ("ta", str(tmp_path / "ta.jsonl.gz")),
    ]


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(BadInput, match="no such folder of text"):
        corpus_sources(tmp_path / "missing")
    with pytest.raises(BadInput, match=r"no file named by a language, such as en.jsonl"):
        corpus_sources(tmp_path)
    for name in ("sw.jsonl", "sw.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadInput, match=r"sw is there twice: sw.jsonl, sw.jsonl.gz"):
        corpus_sources(tmp_path)


def test_the_embedded_corpus_is_parallel_and_complete():
    corpus = embedded_corpus()
    assert tuple(corpus) == BABEL
    ids = [row.id for row in corpus["en"]]
    assert len(set(ids)) == len(ids)
    for language, rows in corpus.items():
        assert [(row.id, row.kind) for row in rows] == [(row.id, row.kind) for row in corpus["en"]], language
        assert {row.kind for row in rows} == {"web", "textbook"}
        assert sum(len(row.text.encode()) for row in rows) >= 6000, language
        assert len({row.text for row in rows}) == len(rows), language
        assert all(row.text == row.text.strip() and json.dumps(row.text) for row in rows), language
