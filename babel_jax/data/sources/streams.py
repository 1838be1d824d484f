"""Files on any file system as streams of bytes, decompressed within bounds; errors become one line."""

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

from babel_jax.errors import BadInput
from babel_jax.errors import one_line as printable_line
from babel_jax.hub import ranges
from babel_jax.hub.datasets import hub_file, hub_path

# A longer line, paragraph or page is a bad row; it is skipped without being held in memory.
MAX_DOCUMENT_BYTES = 1 << 24
# A compressed file that expands to more than this many times its size is no text. Text is compressed to a
# third or a tenth of its size.
MAX_EXPANSION = 200
KIND_KEY = "kind"  # of a record; the kind of its source otherwise
EXPANSION_FREE_BYTES = 1 << 24  # small files may expand more
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_ARCHIVES = (".warc", ".wet")
_TOO_MUCH_THRIFT = "Exceeded size limit"  # Arrow's words for a parquet file's metadata of over 100 MB
_LONGEST_REASON = 300  # characters
# Keys under which stores keep the version of a file.
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

# A location, such as FILE:LINE, with the record as a dict, or with a BadRowError.
Record = tuple[str, Any]


class BadRowError(Exception):
    """The reason why a row cannot be used, as one printable line: rows come from strangers, and reports show
    the reason.
    """

    def __init__(self, message: object):
        super().__init__(printable_line(message, _LONGEST_REASON))


def too_long() -> BadRowError:
    """The reason for a document that is too long."""
    return BadRowError(f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB, which no document is")


@contextlib.contextmanager
def decompressed(path: str) -> Iterator[io.RawIOBase]:
    """The bytes of a file, decompressed by its suffix.

    Raises BadInput, during reading, for a file that expands too much.
    """
    check_begun(path)
    with opened(path) as file:
        # Arrow notices cut streams of both compressions; zstandard's own reader does not.
        stream = pyarrow.input_stream(file, compression=COMPRESSION.get(Path(path).suffix))
        yield _Bounded(stream, path)


class _Bounded(io.RawIOBase):
    """A stream that stops an archive that expands too much, and knows its position; Arrow's streams do
    not.
    """

    def __init__(self, stream: Any, path: str):
        self._stream, self._path, self._position, self._most = stream, path, 0, None
        if Path(path).suffix in COMPRESSION:
            self._most = max(EXPANSION_FREE_BYTES, MAX_EXPANSION * file_version(path)["bytes"])

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        self._count(len(block))
        result: bytes = block
        return result

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._count(count)
        result: int = count
        return result

    def _count(self, count: int) -> None:
        self._position += count
        if self._most is not None and self._position > self._most:
            raise BadInput(
                f"{self._path}: expands to more than {self._most >> 20} MiB, over {MAX_EXPANSION} times its "
                "size, which no text does; leave it out, or decompress it if this is intended"
            )

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True


def file_version(path: str) -> dict[str, Any]:
    """{"bytes", "version"} of a file on any file system: its size, and its time of change or its store's
    version.
    """
    try:
        if "://" not in path:
            status = Path(path).stat()
            return {"bytes": status.st_size, "version": str(status.st_mtime_ns)}
        on_web = web_file_of(path)
        if on_web is not None:
            return {"bytes": on_web.size, "version": on_web.version}
        # Other stores give the size, and some kind of version under a key of their own.
        system, name = remote(path)
        info = system.info(name)
        versions = [f"{key}={info[key]}" for key in _VERSIONS if info.get(key) is not None]
        return {"bytes": int(info.get("size") or 0), "version": " ".join(versions)}
    except FileNotFoundError as error:
        raise _gone(path) from error


def check_begun(path: str) -> None:
    """Raises BadInput for an archive without bytes: even an empty archive has some."""
    if (Path(path).suffix in COMPRESSION or Path(path).suffix in _ARCHIVES) and file_version(path)[
        "bytes"
    ] == 0:
        raise BadInput(f"{path}: has no bytes, so it was cut short; make it again or leave it out")


@contextlib.contextmanager
def opened_bytes(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file on any file system. Raises BadInput if it cannot be read."""
    with explained(path, lambda: "some bytes"), opened(path) as file_or_path:
        if isinstance(file_or_path, str):
            with open(file_or_path, "rb") as file:
                yield file
        else:
            yield file_or_path


@contextlib.contextmanager
def opened(path: str) -> Iterator[str | BinaryIO]:
    """The argument that Arrow takes: the path of a local file, or a stream."""
    if "://" not in path:
        yield path
        return
    on_web = web_file_of(path)
    if on_web is not None:
        with ranges.opened(on_web) as reader:
            yield reader
        return
    system, name = remote(path)
    with system.open(name, "rb") as file:
        yield file


def web_file_of(path: str) -> ranges.WebFile | None:
    """The file of a data set on the hub, or of a web server; None for other paths.

    Raises FileNotFoundError if there is no such file.
    """
    on_hub = hub_path(path)
    if on_hub is not None:
        return hub_file(on_hub)
    return _on_server(path) if path.startswith(("http://", "https://")) else None


@functools.lru_cache(maxsize=4096)
def _on_server(address: str) -> ranges.WebFile:
    return ranges.web_file(address)


@contextlib.contextmanager
def explained(path: str, reached: Any) -> Iterator[None]:
    """Turns errors of reading a file into BadInput. `reached()` returns the last good position, for the
    message.
    """
    try:
        yield
    except (BadInput, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise _gone(path) from error
    except Exception as error:  # Arrow, fsspec's stores and the WARC parser each raise errors of their own
        # This limit of Arrow looks like damage, and the file is whole.
        if _TOO_MUCH_THRIFT in str(error):
            raise BadInput(
                f"{path}: the description of its columns (footer, statistics) is larger than Arrow reads; "
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
    """A module of an optional package.

    Raises BadInput that names the extra to install, if it is missing.
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
        result: tuple[Any, str] = fsspec.core.url_to_fs(path)
        return result
    except (ImportError, ValueError) as error:
        raise BadInput(f"{path}: cannot be reached: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """The message of an error, on one line."""
    return printable_line(error, 200) or type(error).__name__
