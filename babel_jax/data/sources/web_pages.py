"""Web pages in WARC and WET files: their text, and whether the file was cut short."""

import contextlib
import functools
import io
import re
from collections.abc import Iterator
from typing import Any

from babel_jax.config import Source
from babel_jax.data.sources.html_text import PageError, TextOfPages
from babel_jax.data.sources.streams import (
    MAX_DOCUMENT_BYTES,
    BadRowError,
    decompressed,
    explained,
    imported,
    one_line,
    too_long,
)
from babel_jax.errors import BadInput

_MAX_CODINGS = 4  # of one page
_MAX_HEADER_BYTES = 1 << 20
_CONTENT_LENGTH = re.compile(
    rb"^content-length[ \t]*:[ \t]*(\d{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE
)


def page_records(path: str, source: Source) -> Iterator[tuple[str, Any]]:
    """The text of web pages, by place: of WET files as it is there, of WARC files the main content of HTML
    pages.

    A page that cannot be read is a BadRowError in its place. Raises BadInput for a file that cannot be read
    on.
    """
    warc = imported("fastwarc.warc", path, "warc")
    imported("resiliparse.extract.html2text", path, "warc")
    number = 0
    kinds = warc.WarcRecordType.conversion | warc.WarcRecordType.response
    pages = _pages()
    with explained(path, lambda: f"record {number}"), decompressed(path) as stream:
        checked = _Whole(stream)
        for record in warc.ArchiveIterator(checked, record_types=kinds, parse_http=False):
            number += 1
            place, uri = f"{path}:{number}", record.headers.get("WARC-Target-URI")
            try:
                text = _text(record, record.record_type == warc.WarcRecordType.conversion, pages)
            except BadRowError as problem:
                yield place, problem
                continue
            except Exception as error:  # the parsers raise errors of their own for what is in a page
                yield place, BadRowError(f"the page cannot be read: {one_line(error)}")
                continue
            if text is not None:
                yield place, {source.id_key: uri, source.text_key: text}
        checked.check(path, number)


@functools.cache
def _pages() -> TextOfPages:
    """The parser of this process: to start one takes longer than most files."""
    return TextOfPages()


def _text(record: Any, is_text: bool, pages: TextOfPages) -> str | bytes | None:
    """The text of a record; None where it is no page of HTML."""
    if record.is_http and not is_text:
        record.parse_http()
    content = _as_made(record.reader.read(MAX_DOCUMENT_BYTES), record.http_headers or {})
    if len(content) == MAX_DOCUMENT_BYTES:
        raise too_long()
    if is_text:
        return content
    if "html" not in (record.http_content_type or ""):
        return None
    try:
        return pages.text_of(_decoded(content, record.http_charset))
    except PageError as problem:
        raise BadRowError(problem) from None


def _decoded(content: bytes, charset: str | None) -> str:
    """A page as text. What it says of its charset may be no charset: then it is guessed."""
    detect = imported("resiliparse.parse.encoding", "WARC", "warc")
    if charset is not None:
        with contextlib.suppress(LookupError, ValueError, TypeError, AssertionError):
            return detect.bytes_to_str(content, charset)
    return detect.bytes_to_str(content, detect.detect_encoding(content))


def _as_made(content: bytes, headers: Any) -> bytes:
    """A page without the encodings in which it was sent.

    Some archives took these off and left their names in the head.
    """
    coders = imported("fastwarc.stream_io", "WARC", "warc")
    readers = {
        "chunked": coders.ChunkedReader,
        "gzip": coders.GzipReader,
        "deflate": functools.partial(coders.GzipReader, zlib=True),
        "br": coders.BrotliReader,
        "zstd": coders.ZstdReader,
    }
    for header in ("Transfer-Encoding", "Content-Encoding"):
        codings = headers.get(header, "").lower().replace(" ", "").split(",")
        if len(codings) > _MAX_CODINGS:
            raise BadRowError(f"{header} names {len(codings)} codings, which no page has")
        for name in reversed(codings):
            if name in readers:
                with contextlib.suppress(OSError):
                    content = readers[name](io.BytesIO(content)).read(MAX_DOCUMENT_BYTES)
    return content


class _Whole(io.RawIOBase):
    """A stream of WARC records that knows, when it has been read, whether its last record was whole.

    The parser ends without a word where a file ends within a record. Records are followed here by their
    headers and lengths alone; where they are not as the standard (ISO 28500) has them, nothing is said.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._header = b""  # of the record that begins, as far as it was read
        self._left = 0  # bytes of the record's content that are still to come
        self._is_known = True

    def read(self, size: int = -1) -> bytes:
        found = self._stream.read(size)
        if self._is_known:
            self._follow(found)
        return found

    def tell(self) -> int:
        return self._stream.tell()

    def readable(self) -> bool:
        return True

    def check(self, path: str, number: int) -> None:
        """Reads what is left. Raises BadInput where the last record is not whole."""
        while self._is_known and self.read(MAX_DOCUMENT_BYTES):
            pass
        if self._is_known and (self._left or self._header.strip()):
            raise BadInput(f"{path}: ends within a record, after record {number}; the file was cut short")

    def _follow(self, found: bytes) -> None:
        place = 0
        while place < len(found) and self._is_known:
            if self._left:
                passed = min(self._left, len(found) - place)
                self._left, place = self._left - passed, place + passed
                continue
            before = len(self._header)
            self._header = (self._header + found[place : place + _MAX_HEADER_BYTES]).lstrip(b"\r\n")
            end = re.search(rb"\r?\n\r?\n", self._header)
            if end is None:
                place += _MAX_HEADER_BYTES
                self._is_known = len(self._header) < _MAX_HEADER_BYTES and self._header[:5] in (
                    b"WARC/",
                    b"WARC/"[: len(self._header)],
                )
                continue
            header, rest = self._header[: end.end()], len(self._header) - end.end()
            place = min(len(found), place + _MAX_HEADER_BYTES) - rest
            length = _CONTENT_LENGTH.search(header)
            self._is_known = header.startswith(b"WARC/") and length is not None and before <= len(header)
            self._left = int(length[1]) if length is not None else 0
            self._header = b""
