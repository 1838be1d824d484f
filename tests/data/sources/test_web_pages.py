"""Web pages of strangers: a page that cannot be read is a bad row, and a file that was cut short is named."""

import gzip
import time

import pytest

from babel_jax.config import BadRows, Source
from babel_jax.data.sources import streams, web_pages
from babel_jax.data.sources.html_text import PageError, TextOfPages
from babel_jax.data.sources.rows import RowCounts, read_rows
from babel_jax.errors import BadInput

pytest.importorskip("fastwarc")
pytest.importorskip("resiliparse")

HTML = (
    "<html><body><main><p>The grandmother opens the window number {} and looks at the "
    "sea.</p></main></body></html>"
)


def record(kind, content, number=0):
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://a/{number}\r\nWARC-Date: "
        "2024-01-01T00:00:00Z\r\n"
    )
    head += (
        f"WARC-Record-ID: <urn:uuid:{number}>\r\nContent-Type: application/http; "
        f"msgtype={kind}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content + b"\r\n\r\n"


def page(number, content_type=b"text/html; charset=utf-8", body=None, more=b""):
    content = HTML.format(number).encode() if body is None else body
    return record(
        "response",
        b"HTTP/1.1 200 OK\r\nContent-Type: " + content_type + b"\r\n" + more + b"\r\n" + content,
        number,
    )


def read(path, bad_rows=BadRows.SKIP):
    counts = RowCounts()
    return [row.text for row in read_rows(Source(language="en", path=str(path)), bad_rows, counts)], counts


ODD = {
    "unknown charset": (page(1, b"text/html; charset=nonsense"), 3),
    "a codec that is no charset": (page(1, b"text/html; charset=hex"), 3),
    "charset of control characters": (page(1, b"text/html; charset=\x01\xff"), 3),
    "another charset than it says": (page(1, b"text/html; charset=utf-16"), None),
    "endless header": (page(1, more=b"X: " + b"y" * 3_000_000 + b"\r\n"), 2),
    "endless lines of headers": (page(1, more=b"X: y\r\n" * 300_000), 2),
    "many codings": (page(1, more=b"Content-Encoding: " + b"gzip, " * 100 + b"gzip\r\n"), 2),
    "no end of the header": (record("response", b"HTTP/1.1 200 OK\r\nContent-Type: text/html"), None),
    "nothing": (record("response", b""), 2),
    "gzip that is none": (page(1, more=b"Content-Encoding: gzip\r\n"), 3),
    "gzip of gigabytes": (page(1, body=gzip.compress(bytes(1 << 27)), more=b"Content-Encoding: gzip\r\n"), 2),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_page_does_not_end_the_file(tmp_path, name):
    odd, texts = ODD[name]
    path = tmp_path / "en.warc"
    path.write_bytes(page(0) + odd + page(2))
    found, counts = read(path)
    assert "window number 0" in found[0]
    assert "window number 2" in found[-1]
    assert texts is None or len(found) == texts
    if counts.bad:
        with pytest.raises(BadInput, match=r"en\.warc:2: .*data\.bad_rows"):
            read(path, BadRows.REFUSE)


SLOW = {
    "spaces": "<html><body><pre>" + " " * 100_000 + "x</pre></body></html>",
    "nested": "<html><body>" + "<div>" * 100_000 + "x",
    "attributes": "<html><body><p "
    + " ".join(f"a{number}=1" for number in range(300_000))
    + ">x</p></body></html>",
}


@pytest.mark.parametrize("name", SLOW)
def test_a_page_that_the_parser_does_not_end_with_is_a_bad_row(tmp_path, monkeypatch, name):
    pages = TextOfPages(seconds=1.0)
    monkeypatch.setattr(web_pages, "_pages", lambda: pages)
    path = tmp_path / "en.warc.gz"
    path.write_bytes(gzip.compress(page(0) + page(1, body=SLOW[name].encode()) + page(2)))
    start = time.monotonic()
    found, counts = read(path)
    assert time.monotonic() - start < 5
    assert [text for text in found if "window number" in text] == [found[0], found[-1]]
    assert counts.bad == 3 - len(found)


def test_a_parser_that_ends_is_started_again():
    pages = TextOfPages()
    assert "window number 7" in pages.text_of(HTML.format(7))
    pages._process.kill()
    pages._process.wait()
    with pytest.raises(PageError, match="the HTML parser ended on the page"):
        pages.text_of(HTML.format(8))
    assert "window number 9" in pages.text_of(HTML.format(9))
    pages.close()


@pytest.mark.parametrize("name", ["en.warc", "en.wet"])
def test_a_file_that_was_cut_within_a_record_is_named(tmp_path, name):
    """Plain files say nothing of their end. Between two records a cut cannot be seen."""
    first = page(0) if name == "en.warc" else record("conversion", b"The first text.")
    last = record("request" if name == "en.warc" else "conversion", b"GET / HTTP/1.1\r\n\r\n" * 3)
    path = tmp_path / name
    path.write_bytes(first + last)
    assert len(read(path)[0]) == (1 if name == "en.warc" else 2)
    for cut in [*range(len(first) + 1, len(first) + len(last) - 4, 11), 1, 40, len(first) - 20]:
        path.write_bytes((first + last)[:cut])
        with pytest.raises(BadInput, match="cut short"):
            read(path)
    path.write_bytes(first)
    assert len(read(path)[0]) == 1


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_expands_without_end_is_refused(tmp_path, monkeypatch, suffix):
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.setattr(streams, "EXPANSION_FREE_BYTES", 1 << 20)
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = tmp_path / f"en.jsonl{suffix}"
    for content in (b'{"text": "' + b"a" * (1 << 24), b" " * (1 << 24)):
        path.write_bytes(compress(content))
        with pytest.raises(BadInput, match=r"expands to more than \d+ MiB, over 200 times its size"):
            read(path)
    path.write_bytes(compress(b'{"text": "a text"}\n' * 1000))
    assert len(read(path)[0]) == 1000
