"""Records as they stand in files (JSON lines, text, parquet, WARC), TFDS and Hugging Face datasets, streamed, with the place of each."""

import contextlib
import functools
import glob
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from babel_jax.config import Source
from babel_jax.errors import BadInput
from babel_jax.errors import one_line as printable_line

KIND_KEY = "kind"
# A longer line or paragraph is a bad row: it is passed over without being held in memory.
MAX_DOCUMENT_BYTES = 1 << 24
_ARCHIVES = (".warc", ".wet")
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_FORMATS = ".jsonl, .json, .txt, .warc and .wet (plain, .gz or .zst) and .parquet"
_LONGEST_REASON = 300  # characters
_PARQUET_BATCH = 1024
# Under these keys stores say that a file is another one.
_VERSIONS = ("ETag", "etag", "md5Hash", "crc32c", "generation", "LastModified", "last_modified", "mtime", "created")
_TFDS_PART = 100_000


class BadRowError(Exception):
    """Why one row cannot be used, as one printable line: rows are strangers', and what is wrong with them is written into reports."""

    def __init__(self, message: object):
        super().__init__(printable_line(message, _LONGEST_REASON))


Record = tuple[str, Any]  # a place, such as FILE:LINE, and a dict, or the BadRowError met in its stead


def source_files(source: Source) -> list[str]:
    """The files that a source's path or glob stands for, sorted by name. Raises BadInput when there is none."""
    assert source.path is not None
    if "://" in source.path:
        found = _remote_files(source.path)
    else:
        path = Path(source.path)
        if path.is_dir():
            raise BadInput(f"{path}: a folder; name its files, for example {path}/*.jsonl")
        found = [str(path)] if path.is_file() else []
        if not found and glob.has_magic(source.path):
            found = sorted(name for name in glob.glob(source.path, recursive=True) if Path(name).is_file())  # noqa: PTH207 - may be absolute
    if not found:
        problem = "no file matches" if glob.has_magic(source.path) else "no such file"
        raise BadInput(f"{source.path}: {problem} (source of language {source.language})")
    return found


def file_version(path: str) -> dict[str, Any]:
    """{"bytes", "version"} of a file, wherever it is: its size, and its time of change or what else its store tells versions by."""
    try:
        if "://" not in path:
            status = Path(path).stat()
            return {"bytes": status.st_size, "version": str(status.st_mtime_ns)}
        system, name = _remote(path)
        found = system.info(name)
        told = [f"{key}={found[key]}" for key in _VERSIONS if found.get(key) is not None]
        return {"bytes": int(found.get("size") or 0), "version": " ".join(told)}
    except FileNotFoundError as error:
        raise _gone(path) from error


def _check_begun(path: str) -> None:
    """Raises BadInput for an archive of no bytes: a compressed file of nothing has some."""
    if (Path(path).suffix in _COMPRESSION or Path(path).suffix in _ARCHIVES) and file_version(path)["bytes"] == 0:
        raise BadInput(f"{path}: has no bytes, so it was cut short; make it again or leave it out")


@contextlib.contextmanager
def opened_bytes(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, wherever it is. Raises BadInput where it cannot be read."""
    with _explained(path, lambda: "some bytes"), _opened(path) as opened:
        if isinstance(opened, str):
            with open(opened, "rb") as file:
                yield file
        else:
            yield opened


def dataset_version(source: Source) -> str:
    """What tells the versions of a TFDS or a Hugging Face dataset apart: its version and sizes, or the commit or times of its files."""
    if source.tfds is not None:
        info = _tfds(source).dataset_info
        splits = {name: (split.num_examples, split.num_bytes) for name, split in sorted(info.splits.items())}
        return f"{info.full_name} {splits}"
    datasets = _import("datasets", source.label, "hf")
    with _explained(source.label, lambda: "nothing"):
        builder = datasets.load_dataset_builder(source.huggingface, source.huggingface_config)
        files = builder.config.data_files or {}
        origins = {str(split): [list(origin) for origin in own.origin_metadata] for split, own in files.items()}
        return json.dumps([str(builder.hash), origins], sort_keys=True)


def parts(source: Source) -> list[str]:
    """What can be read of a source independently of the rest: its files, ranges of a TFDS dataset, or shards of a Hugging Face one."""
    if source.path is not None:
        return source_files(source)
    if source.tfds is not None:
        length = len(_tfds(source))
        return [f"{start}:{min(start + _TFDS_PART, length)}" for start in range(0, max(length, 1), _TFDS_PART)]
    number = _huggingface(source).num_shards
    return [f"{shard}/{number}" for shard in range(number)]


def read_records(source: Source, part: str) -> Iterator[Record]:
    """The records of one of `parts(source)`, in their order. A missing, corrupt or truncated file is BadInput."""
    if source.tfds is not None:
        yield from _tfds_records(source, *map(int, part.split(":")))
    elif source.huggingface is not None:
        yield from _huggingface_records(source, *map(int, part.split("/")))
    else:
        yield from _file_records(part, source)


# --- files -------------------------------------------------------------------------------------------------------------------


def _file_records(path: str, source: Source) -> Iterator[Record]:
    _check_begun(path)
    suffixes = Path(path).suffixes[-2:] if Path(path).suffix in _COMPRESSION else Path(path).suffixes[-1:]
    if suffixes == [".parquet"]:
        yield from _parquet_records(path, source)
    elif suffixes[:1] in ([".jsonl"], [".json"]):
        yield from _jsonl_records(path)
    elif suffixes[:1] == [".txt"]:
        yield from _paragraphs(path, source.text_key)
    elif suffixes[:1] in ([".warc"], [".wet"]):
        yield from _warc_records(path, source)
    else:
        raise BadInput(f"{path}: not a kind of file that can be read; readable are {_FORMATS}")


def _lines(path: str) -> Iterator[tuple[int, bytes | BadRowError]]:
    """Numbered lines (from 1) with their line ends. Arrow notices cut streams of both compressions; zstandard's own reader does not."""
    number = 0
    with _explained(path, lambda: f"line {number}"), _opened(path) as file:
        stream = pyarrow.input_stream(file, compression=_COMPRESSION.get(Path(path).suffix))
        with io.BufferedReader(stream) as lines:
            while line := lines.readline(MAX_DOCUMENT_BYTES):
                number += 1
                if len(line) == MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
                    while (rest := lines.readline(MAX_DOCUMENT_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    yield number, _too_long()
                else:
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _too_long() -> BadRowError:
    return BadRowError(f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB, which no document is")


def _jsonl_records(path: str) -> Iterator[Record]:
    for number, line in _lines(path):
        if isinstance(line, BadRowError):
            yield f"{path}:{number}", line
            continue
        if line.isspace():
            continue
        try:
            yield f"{path}:{number}", json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield f"{path}:{number}", BadRowError(f"not UTF-8 ({error.reason} at byte {error.start} of the line)")
        except (ValueError, RecursionError) as error:
            yield f"{path}:{number}", BadRowError(f"not readable JSON: {one_line(error)}")


def _paragraphs(path: str, text_key: str) -> Iterator[Record]:
    """Plain text: documents are the runs of lines between blank lines."""
    paragraph: list[bytes] = []
    start, size = 1, 0
    for number, line in _lines(path):
        blank = not isinstance(line, BadRowError) and line.isspace()
        if not blank:
            size += MAX_DOCUMENT_BYTES if isinstance(line, BadRowError) else len(line)
            if size < MAX_DOCUMENT_BYTES:
                assert isinstance(line, bytes)
                paragraph.append(line)
            else:
                paragraph.clear()
        else:
            yield from _paragraph(path, start, paragraph, size, text_key)
            paragraph, start, size = [], number + 1, 0
    yield from _paragraph(path, start, paragraph, size, text_key)


def _paragraph(path: str, start: int, lines: list[bytes], size: int, text_key: str) -> Iterator[Record]:
    if size:
        long = size >= MAX_DOCUMENT_BYTES
        yield f"{path}:{start}", _too_long() if long else {text_key: b"".join(lines).rstrip(b"\r\n")}


def _parquet_records(path: str, source: Source) -> Iterator[Record]:
    number = 0
    with _explained(path, lambda: f"row {number}"), _opened(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
        schema = file.schema_arrow
        if source.text_key not in schema.names:
            raise BadInput(f"{path}: no column {source.text_key!r}; set text_key to one of {', '.join(schema.names)}")
        wanted = (source.text_key, source.id_key, source.score_key, KIND_KEY, *source.where)
        columns = [name for name in dict.fromkeys(wanted) if name in schema.names]
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=columns):
            values = {name: _as_bytes(batch.column(name)).to_pylist() for name in columns}
            for row in range(batch.num_rows):
                number += 1
                yield f"{path}:{number}", {name: values[name][row] for name in columns}


def _as_bytes(column: pyarrow.Array) -> pyarrow.Array:
    """Strings as bytes, so that one value that is not UTF-8 spoils only its own row."""
    text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    return column.cast(pyarrow.large_binary()) if text else column


def _warc_records(path: str, source: Source) -> Iterator[Record]:
    """The text of web pages: of WET files as it stands there, of WARC files the main content of HTML pages."""
    warc = _import("fastwarc.warc", path, "warc")
    html2text, detect = _import("resiliparse.extract.html2text", path, "warc"), _import("resiliparse.parse.encoding", path, "warc")
    number = 0
    with _explained(path, lambda: f"record {number}"), _opened(path) as file:
        stream = pyarrow.input_stream(file, compression=_COMPRESSION.get(Path(path).suffix))
        kinds = warc.WarcRecordType.conversion | warc.WarcRecordType.response
        for record in warc.ArchiveIterator(_Told(stream), record_types=kinds, parse_http=True):
            number += 1
            place, page = f"{path}:{number}", {source.id_key: record.headers.get("WARC-Target-URI")}
            content = _as_made(record.reader.read(MAX_DOCUMENT_BYTES), record.http_headers or {})
            if len(content) == MAX_DOCUMENT_BYTES:
                yield place, _too_long()
            elif record.record_type == warc.WarcRecordType.conversion:
                yield place, {**page, source.text_key: content}
            elif "html" in (record.http_content_type or ""):
                html = detect.bytes_to_str(content, record.http_charset or detect.detect_encoding(content))
                yield place, {**page, source.text_key: html2text.extract_plain_text(html, main_content=True)}


def _as_made(content: bytes, headers: Any) -> bytes:
    """A page without the encodings in which it was sent. Some archives took these off and left their names in the head."""
    coders = _import("fastwarc.stream_io", "WARC", "warc")
    readers = {
        "chunked": coders.ChunkedReader,
        "gzip": coders.GzipReader,
        "deflate": functools.partial(coders.GzipReader, zlib=True),
        "br": coders.BrotliReader,
        "zstd": coders.ZstdReader,
    }
    for header in ("Transfer-Encoding", "Content-Encoding"):
        for name in reversed(headers.get(header, "").lower().replace(" ", "").split(",")):
            if name in readers:
                with contextlib.suppress(OSError):
                    content = readers[name](io.BytesIO(content)).read(MAX_DOCUMENT_BYTES)
    return content


class _Told(io.RawIOBase):
    """A stream that says where it is, which the WARC parser asks and Arrow's decompressing streams do not say."""

    def __init__(self, stream: Any):
        self._stream, self._place = stream, 0

    def read(self, size: int = -1) -> bytes:
        found = self._stream.read(size)
        self._place += len(found)
        return found

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True


def _import(module: str, wanted_by: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise BadInput(f"{wanted_by}: needs the package {module.split('.')[0]}; pip install 'babel-jax[{extra}]'") from None


def _remote(path: str) -> tuple[Any, str]:
    fsspec = _import("fsspec", path, "hf")
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise BadInput(f"{path}: cannot be reached: {one_line(error)}") from None


def _remote_files(path: str) -> list[str]:
    system, name = _remote(path)
    try:
        return [system.unstrip_protocol(found) for found in sorted(system.glob(name)) if system.isfile(found)]
    except Exception as error:  # each store raises errors of its own
        raise BadInput(f"{path}: cannot be listed: {one_line(error)}") from error


@contextlib.contextmanager
def _opened(path: str) -> Iterator[str | BinaryIO]:
    """What Arrow opens: the path of a local file, the stream of another."""
    if "://" not in path:
        yield path
        return
    system, name = _remote(path)
    with system.open(name, "rb") as file:
        yield file


@contextlib.contextmanager
def _explained(path: str, reached: Any) -> Iterator[None]:
    """Turns what goes wrong in reading a file into BadInput that says how far it came; `reached()` is the last good place."""
    try:
        yield
    except (BadInput, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise _gone(path) from error
    except Exception as error:  # Arrow, fsspec's stores and the WARC parser each raise errors of their own
        raise BadInput(f"{path}: unreadable after {reached()}: {one_line(error)}; the file is corrupt or cut short") from error


def _gone(path: str) -> BadInput:
    return BadInput(f"{path}: gone, though it was there when its folder was listed; run `babel prepare` again")


# --- datasets ----------------------------------------------------------------------------------------------------------------


def _tfds(source: Source) -> Any:
    import tensorflow_datasets  # slow to import, and few sources need it

    try:
        rows = tensorflow_datasets.data_source(source.tfds, split=source.tfds_split, data_dir=source.tfds_folder)
        len(rows)
    except Exception as error:  # TFDS raises errors of many unrelated types, and TensorFlow's absence as a missing module
        raise BadInput(f"TFDS dataset {source.tfds} (split {source.tfds_split}) cannot be read: {one_line(error)}") from error
    return rows


def _tfds_records(source: Source, start: int, stop: int) -> Iterator[Record]:
    rows = _tfds(source)
    for number in range(start, stop):
        yield f"{source.tfds}/{source.tfds_split}:{number + 1}", rows[number]


def _huggingface(source: Source) -> Any:
    datasets = _import("datasets", source.label, "hf")
    try:
        return datasets.load_dataset(source.huggingface, source.huggingface_config, split=source.huggingface_split, streaming=True)
    except Exception as error:  # from the hub, the file system and the formats
        raise BadInput(
            f"Hugging Face dataset {source.label} (split {source.huggingface_split}) cannot be read: {one_line(error)}"
        ) from error


def _huggingface_records(source: Source, shard: int, number: int) -> Iterator[Record]:
    rows = iter(_huggingface(source).shard(num_shards=number, index=shard))
    row = 0
    with _explained(source.label, lambda: f"row {row} of shard {shard}"):
        for record in rows:
            row += 1
            yield f"{source.label}/{source.huggingface_split}-{shard}:{row}", record


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return printable_line(error, 200) or type(error).__name__
