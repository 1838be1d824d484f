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
    """The text of web pages with its location: the text of WET files, the main content of HTML pages of WARC
    files.

    A page that cannot be read gives a BadRowError. Raises BadInput for a file that cannot be read to its end.
    """
    warc = imported("fastwarc.warc", path, "warc")
    imported("resiliparse.extract.html2text", path, "warc")
    number = 0
    # Text of WET files, and answers of servers in WARC files. Requests and metadata have no text.
    kinds = warc.WarcRecordType.conversion | warc.WarcRecordType.response
    pages = _pages()
    with explained(path, lambda: f"record {number}"), decompressed(path) as stream:
        checked = _Whole(stream)
        for record in warc.ArchiveIterator(checked, record_types=kinds, parse_http=False):
            number += 1
            location, uri = f"{path}:{number}", record.headers.get("WARC-Target-URI")
            try:
                text = _text(record, record.record_type == warc.WarcRecordType.conversion, pages)
            except BadRowError as problem:
                yield location, problem
                continue
            except Exception as error:  # the parsers raise errors of many types
                yield location, BadRowError(f"the page cannot be read: {one_line(error)}")
                continue
            if text is not None:
                yield location, {source.id_key: uri, source.text_key: text}
        checked.check(path, number)


@functools.cache
def _pages() -> TextOfPages:
    """The parser of this process, started once: a start takes longer than most files."""
    return TextOfPages()


def _text(record: Any, is_text: bool, pages: TextOfPages) -> str | bytes | None:
    """The text of a record; None if it is no page of HTML."""
    if record.is_http and not is_text:
        record.parse_http()
    content = _without_codings(record.reader.read(MAX_DOCUMENT_BYTES), record.http_headers or {})
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
    """A page as text. If its charset is wrong or unknown, the charset is guessed."""
    detect = imported("resiliparse.parse.encoding", "WARC", "warc")
    text: str
    if charset is not None:
        with contextlib.suppress(LookupError, ValueError, TypeError, AssertionError):
            text = detect.bytes_to_str(content, charset)
            return text
    text = detect.bytes_to_str(content, detect.detect_encoding(content))
    return text


def _without_codings(content: bytes, headers: Any) -> bytes:
    """A page without the codings of its transfer.

    Some archives removed the codings but kept their names in the header, so a failure to decode is no error.
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
        # The header names codings in the order in which they were applied, so the last is removed first.
        for name in reversed(codings):
            if name in readers:
                with contextlib.suppress(OSError):
                    content = readers[name](io.BytesIO(content)).read(MAX_DOCUMENT_BYTES)
    return content


class _Whole(io.RawIOBase):
    """A stream of WARC records that can tell, after the end, if its last record was complete.

    The parser gives no error if a file ends within a record. Here the records are followed by their headers
    and lengths alone. If those differ from the standard (ISO 28500), no check is made.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        # The header read so far of the record that begins; else the bytes left of a record's content.
        self._header = b""
        self._left = 0
        self._is_known = True

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        if self._is_known:
            self._follow(block)
        result: bytes = block
        return result

    def tell(self) -> int:
        result: int = self._stream.tell()
        return result

    def readable(self) -> bool:
        return True

    def check(self, path: str, number: int) -> None:
        """Reads the rest. Raises BadInput if the last record is incomplete."""
        while self._is_known and self.read(MAX_DOCUMENT_BYTES):
            pass
        if self._is_known and (self._left or self._header.strip()):
            raise BadInput(f"{path}: ends within a record, after record {number}; the file was cut short")

    def _follow(self, block: bytes) -> None:
        """Follows the records through the next bytes of the stream."""
        position = 0
        while position < len(block) and self._is_known:
            # Within the content of a record.
            if self._left:
                passed = min(self._left, len(block) - position)
                self._left, position = self._left - passed, position + passed
                continue

            # Within a header, which may continue in the next block.
            before = len(self._header)
            self._header = (self._header + block[position : position + _MAX_HEADER_BYTES]).lstrip(b"\r\n")
            end = re.search(rb"\r?\n\r?\n", self._header)
            if end is None:
                position += _MAX_HEADER_BYTES
                begins_as_header = self._header[:5] in (b"WARC/", b"WARC/"[: len(self._header)])
                self._is_known = len(self._header) < _MAX_HEADER_BYTES and begins_as_header
                continue

            # At the end of a header: the content follows.
            header, rest = self._header[: end.end()], len(self._header) - end.end()
            position = min(len(block), position + _MAX_HEADER_BYTES) - rest
            length = _CONTENT_LENGTH.search(header)
            self._is_known = header.startswith(b"WARC/") and length is not None and before <= len(header)
            self._left = int(length[1]) if length is not None else 0
            self._header = b""
