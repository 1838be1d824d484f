"""Files as streams of bytes, wherever they are, decompressed within bounds, and what goes wrong with them in
one line.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

from babel_jax.errors import BadInput
from babel_jax.errors import one_line as printable_line

# A longer line, paragraph or page is a bad row: it is passed over without being held in memory.
MAX_DOCUMENT_BYTES = 1 << 24
# A compressed file that becomes larger than this many times its size is none of text. Text takes a third to a
# tenth of its size.
MAX_EXPANSION = 200
EXPANSION_FREE_BYTES = 1 << 24  # small files may expand more
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_ARCHIVES = (".warc", ".wet")
_TOO_MUCH_THRIFT = "Exceeded size limit"  # Arrow's words for a parquet file's metadata of over 100 MB
_LONGEST_REASON = 300  # characters
# Under these keys stores say that a file is another one.
_VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "crc32c",
    "generation",
    "LastModified",
    "last_modified",
    "mtime",
    "created",
)


class BadRowError(Exception):
    """Why one row cannot be used, as one printable line: rows are strangers', and what is wrong with them is
    written into reports.
    """

    def __init__(self, message: object):
        super().__init__(printable_line(message, _LONGEST_REASON))


def too_long() -> BadRowError:
    """The reason of a document that is too long."""
    return BadRowError(f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB, which no document is")


@contextlib.contextmanager
def decompressed(path: str) -> Iterator[io.RawIOBase]:
    """The bytes of a file, decompressed by its suffix.

    Raises BadInput, while it is read, for a file that expands without end.
    """
    check_begun(path)
    with opened(path) as file:
        # Arrow notices cut streams of both compressions; zstandard's own reader does not.
        stream = pyarrow.input_stream(file, compression=COMPRESSION.get(Path(path).suffix))
        yield _Bounded(stream, path)


class _Bounded(io.RawIOBase):
    """A stream that ends an archive of too many bytes, and that says where it is, which Arrow's decompressing
    streams do not.
    """

    def __init__(self, stream: Any, path: str):
        self._stream, self._path, self._place, self._most = stream, path, 0, None
        if Path(path).suffix in COMPRESSION:
            self._most = max(EXPANSION_FREE_BYTES, MAX_EXPANSION * file_version(path)["bytes"])

    def read(self, size: int = -1) -> bytes:
        found = self._stream.read(size)
        self._count(len(found))
        return found

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._count(count)
        return count

    def _count(self, count: int) -> None:
        self._place += count
        if self._most is not None and self._place > self._most:
            raise BadInput(
                f"{self._path}: expands to more than {self._most >> 20} MiB, over {MAX_EXPANSION} times its "
                "size, which no text does; "
                "leave it out, or decompress it if it is meant so"
            )

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True


def file_version(path: str) -> dict[str, Any]:
    """{"bytes", "version"} of a file, wherever it is: its size, and its time of change or what else its store
    tells versions by.
    """
    try:
        if "://" not in path:
            status = Path(path).stat()
            return {"bytes": status.st_size, "version": str(status.st_mtime_ns)}
        system, name = remote(path)
        found = system.info(name)
        told = [f"{key}={found[key]}" for key in _VERSIONS if found.get(key) is not None]
        return {"bytes": int(found.get("size") or 0), "version": " ".join(told)}
    except FileNotFoundError as error:
        raise _gone(path) from error


def check_begun(path: str) -> None:
    """Raises BadInput for an archive of no bytes: a compressed file of nothing has some."""
    if (Path(path).suffix in COMPRESSION or Path(path).suffix in _ARCHIVES) and file_version(path)[
        "bytes"
    ] == 0:
        raise BadInput(f"{path}: has no bytes, so it was cut short; make it again or leave it out")


@contextlib.contextmanager
def opened_bytes(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, wherever it is. Raises BadInput where it cannot be read."""
    with explained(path, lambda: "some bytes"), opened(path) as place:
        if isinstance(place, str):
            with open(place, "rb") as file:
                yield file
        else:
            yield place


@contextlib.contextmanager
def opened(path: str) -> Iterator[str | BinaryIO]:
    """What Arrow opens: the path of a local file, the stream of another."""
    if "://" not in path:
        yield path
        return
    system, name = remote(path)
    with system.open(name, "rb") as file:
        yield file


@contextlib.contextmanager
def explained(path: str, reached: Any) -> Iterator[None]:
    """Turns what goes wrong in reading a file into BadInput that says how far it came; `reached()` is the
    last good place.
    """
    try:
        yield
    except (BadInput, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise _gone(path) from error
    except Exception as error:  # Arrow, fsspec's stores and the WARC parser each raise errors of their own
        if _TOO_MUCH_THRIFT in str(error):
            raise BadInput(
                f"{path}: what it says of its columns (footer, statistics) is larger than Arrow reads; "
                "write it again without statistics"
            ) from error
        raise BadInput(
            f"{path}: unreadable after {reached()}: {one_line(error)}; the file is corrupt or cut short"
        ) from error


def _gone(path: str) -> BadInput:
    return BadInput(
        f"{path}: gone, though it was there when its folder was listed; run `babel prepare` again"
    )


def imported(module: str, wanted_by: str, extra: str) -> Any:
    """A module that few need.

    Raises BadInput, with the extra of this package that brings it, where it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise BadInput(
            f"{wanted_by}: needs the package {module.split('.')[0]}; pip install 'babel-jax[{extra}]'"
        ) from None


def remote(path: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    fsspec = imported("fsspec", path, "hf")
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise BadInput(f"{path}: cannot be reached: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return printable_line(error, 200) or type(error).__name__
